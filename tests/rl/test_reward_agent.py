"""带工具的对话怎么打分：答对总比答错强，各项有界；数比数值，文字比文字；没写完就没有回答。"""

from __future__ import annotations

import itertools

import pytest

from minimind.errors import UserError
from minimind.inference.reply import Reply
from minimind.inference.tool_calls import ToolCall
from minimind.rl.conversations import ANSWERED, OUT_OF_LENGTH, OUT_OF_TURNS, Opening, Trajectory
from minimind.rl.reward_agent import (
    LOWEST,
    agent,
    check_expected,
    expected_calls,
    expected_values,
    outcome,
    share_found,
)
from minimind.rl.reward_rules import Sample
from minimind.rl.rewards import build_rewards
from minimind.tools import EXAMPLE_TOOLS, Toolbox

GOOD = ToolCall("calculator", '{"expression": "1+1"}', "")
BAD = ToolCall("calculator", '{"formula": "1+1"}', "")


def sample(answer="是2。", calls=(GOOD,), ending=ANSWERED, unclosed=False, **record):
    box = Toolbox(EXAMPLE_TOOLS)
    replies = [*(Reply(calls=[call]) for call in calls), *([Reply(answer)] if ending == ANSWERED else [])]
    one = Trajectory(Opening([1], box), 0, 0, [1], [False], replies=replies, ending=ending, unclosed=unclosed)
    one.problems = [box.problem(call) for call in calls]
    cut = ending != ANSWERED
    return Sample([], "问", one.answer, record={"gt": ["2"]} | record, truncated=cut, conversation=one)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 1.0),
        ({"answer": "是3。"}, 0.0),
        ({"calls": (BAD,)}, 0.8),
        ({"calls": (GOOD, BAD)}, 1 - 0.2 / 2 - 0.1),  # 一半不合说明，多了一次
        ({"calls": ()}, 0.9),  # 漏了一次
        ({"calls": (GOOD,) * 4}, 0.9),  # 多了三次，至多扣一份
        ({"unclosed": True}, 0.9),
        ({"calls": (GOOD,), "ending": OUT_OF_TURNS}, -0.2),
        ({"calls": (BAD,) * 3, "ending": OUT_OF_LENGTH, "unclosed": True}, LOWEST),
        ({"gt": ["2", "5"], "answer": "2", "calls": (GOOD, GOOD)}, 0.5),
        ({"gt": []}, -0.1),  # 没有 gt：只有扣分项，多调用了一次
        ({"gt": [], "calls": ()}, 0.0),
        ({"grader": "numeric", "answer": "所以是2。", "gt": ["9"]}, 1.0),  # 下面把 answer 字段补上
        ({"gt": ["2"], "calls": (), "answer": "2"}, 0.9),
    ],
)
def test_分数(options, expected):
    made = sample(**options)
    if "grader" in made.record:
        made.record["answer"] = "2"
    assert agent(made) == pytest.approx(expected)


def test_有界_答对的总比答错的高():
    flaws = {"calls": [(), (GOOD,), (BAD,) * 5], "unclosed": [False, True]}
    right, wrong = [], []
    for values in itertools.product(*flaws.values()):
        options = dict(zip(flaws, values))
        right.append(agent(sample(answer="2", **options)))
        wrong += [agent(sample(answer="3", **options)), agent(sample(ending=OUT_OF_TURNS, **options))]
    assert min(wrong) >= LOWEST and max(wrong) < min(right) and max(right) <= 1
    assert build_rewards("agent").bounds == (LOWEST, 1)


@pytest.mark.parametrize(
    ("text", "wanted", "share"),
    [
        ("一共是 1,234.5 元", ["1234.5"], 1),
        ("一共是 1,234.5 元", [1234.5], 1),
        ("是 1234", ["234"], 0),
        ("约 0.3333333", ["0.33333333"], 1),
        ("约 0.333", ["0.33333333"], 0),
        ("天气晴，28°C", ["晴", "28°C"], 1),
        ("天气阴", ["晴", "28°C"], 0),
        ("HELLO world", ["Hello World"], 1),
        ("", ["2"], 0),
        ("2025-03-07 14:30:00", ["2025-03-07 14:30:00"], 1),
    ],
)
def test_出现在回答里的值(text, wanted, share):
    assert share_found(text, wanted) == share


def test_gt的各种写法():
    assert expected_values({"gt": ["1", 2]}) == ["1", 2] and expected_values({"gt": 0}) == [0]
    assert expected_values({"gt": []}) == expected_values({"gt": None}) == expected_values({}) == []
    assert expected_calls({"gt": ["1", "2"]}) == 2 and expected_calls({"gt": ["1"], "calls": 0}) == 0
    assert outcome({"gt": []}, "好") is None and outcome({"gt": ["好"]}, "好") == 1


def test_一问一答用它_说清用不了():
    with pytest.raises(UserError, match="minimind agent"):
        build_rewards("agent")([Sample([], "问", "答", record={"gt": ["1"]})])


def test_使用者的奖励函数拿得到整段对话(tmp_path):
    (tmp_path / "r.py").write_text(
        "def score(prompt, response, reference, conversation):\n    return len(conversation.calls)\n"
    )
    result = build_rewards(f"{tmp_path / 'r.py'}:score")([sample(calls=(GOOD, GOOD))])
    assert result.total.tolist() == [2.0]


def test_回答里的负号写成数学符号_不当作正数():
    assert share_found("等于−5。", ["-5"]) == 1 and share_found("等于−5。", ["5"]) == 0
    assert share_found("60−25=35", ["25"]) == 1  # 前面是数字的是减号


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"gt": ["。"]}, "字段 gt"),
        ({"gt": [float("nan")]}, "字段 gt"),
        ({"gt": [True]}, "字段 gt"),
        ({"gt": ["1"], "calls": "2"}, "字段 calls"),
        ({"gt": ["1"], "calls": -1}, "字段 calls"),
        ({"gt": ["1"], "calls": True}, "字段 calls"),
        ({"gt": ["1"], "grader": "number", "answer": "1"}, "字段 grader"),
        ({"gt": [], "grader": ["exact"], "answer": "1"}, "字段 grader"),
    ],
)
def test_永远找不到的gt与不是次数的calls_开训之前就说(record, words):
    check_expected([{"source": "a.jsonl", "line": 1, "record": {"gt": ["1", 2, 2.5], "calls": 0}}], None)
    with pytest.raises(UserError, match=rf"a\.jsonl:3 {words}"):
        check_expected([{"source": "a.jsonl", "line": 3, "record": record}])
