"""微世界的判分器：该对的写法都算对，投机的写法都不算。"""

from __future__ import annotations

import json
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimind.answers import normalize, numbers_in, well_formed
from minimind.microworld import TASKS, grade
from minimind.microworld.core import HELDOUT, TRAIN, stream
from minimind.microworld.graders import GRADERS, style_of
from minimind.microworld.phrasing import GRUMPY_FRAMES, POLITE_FRAMES
from minimind.microworld.stages import chat_item, dress, stylable

ASKING = [task for task in TASKS.values() if task.share.evaluate]
numbers = st.integers(-9999, 9999)


def item(grader: str, answer: str, **extra) -> dict:
    return {"grader": grader, "answer": answer, **extra}


def widen(text: str) -> str:
    """半角 ASCII 写成全角。"""
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


@given(st.text(max_size=60))
def test_归一化再做一次不变(text):
    assert normalize(normalize(text)) == normalize(text)


@given(st.sampled_from(sorted(GRADERS)), st.text(max_size=80), st.text(min_size=1, max_size=12))
def test_任何回答都得到零到一之间的分(grader, response, answer):
    answer = "7" if grader == "numeric" else answer
    assert 0.0 <= grade(item(grader, answer, pattern="[0-9]+"), response) <= 1.0


@given(numbers)
def test_数值判分认得各种写法(n):
    for text in (
        f"{n}",
        f"{n}。",
        f"答案是{n}。",
        f" {n} ",
        widen(str(n)),
        f"得{n}个",
        f"<think>3+4=7</think><answer>{n}</answer>",
    ):
        assert grade(item("numeric", str(n)), text) == 1.0, text


@given(numbers, numbers)
def test_数值判分只认最后一个数(n, other):
    if n != other:
        assert grade(item("numeric", str(n)), f"先是{n}，后是{other}。") == 0.0


@given(st.integers(1, 99), st.integers(1, 99))
def test_减号不当负号(a, b):
    assert numbers_in(f"{a}-{b}={a - b}") == [a, b, a - b]
    assert grade(item("numeric", str(a - b)), f"{a}-{b}={a - b}。") == 1.0


def test_半角千分位属于数而全角逗号是分隔():
    assert numbers_in("1,234") == [1234]
    assert numbers_in("12+7=19，190-5=185") == [12, 7, 19, 190, 5, 185]


@given(st.integers(0, 999), st.integers(0, 9))
def test_数字边界对齐_多一位不算对(n, digit):
    assert grade(item("contains", str(n)), f"是{n}{digit}。") == 0.0
    assert grade(item("prefix", str(n)), f"{n}{digit}") == 0.0
    assert grade(item("prefix", str(n)), f"{n}，其余略") == 1.0
    assert grade(item("prefix", str(n)), f"{n}\n{digit}+1=2") == 1.0
    if digit:
        assert grade(item("tail", f"{n}日"), f"是{digit}{n}日。") == 0.0


def test_把候选全列出来不算对():
    one = item("contains", "烤海鱼", reject=["柳条篮", "麦芽糖"])
    assert grade(one, "白马港的特产是烤海鱼。") == 1.0
    assert grade(one, "柳条篮、麦芽糖、烤海鱼，总有一个对。") == 0.0
    assert grade(one, "白马港的特产是柳条篮。") == 0.0


def test_答案是别的候选的一部分时不误伤():
    assert grade(item("contains", "白猫", reject=["猫"]), "是白猫。") == 1.0


@given(
    st.sampled_from((*POLITE_FRAMES, *GRUMPY_FRAMES)), st.sampled_from(("梨、桃", "52比37大", "纸金、纸金"))
)
def test_整句判分不受客套影响(frame, answer):
    assert grade(item("exact", answer), frame.format(a=f"{answer}。")) == 1.0
    assert grade(item("exact", answer), frame.format(a=f"{answer}吗。")) == 0.0


def test_整句判分接受别的写法():
    one = item("exact", "52比37大", accept=["52", "52大"])
    assert [grade(one, text) for text in ("52 比 37 大！", "52。", "答案是52", "37", "52比37小。", "")] == [
        1,
        1,
        1,
        0,
        0,
        0,
    ]


arguments = st.dictionaries(
    st.text(string.ascii_lowercase, min_size=1), st.text() | st.integers(), max_size=3
)


@given(st.text(min_size=1), arguments)
def test_工具调用比的是内容不是写法(name, values):
    call = {"name": name, "arguments": values}
    one = item("tool_call", json.dumps(call, ensure_ascii=False))
    shuffled = json.dumps({"arguments": dict(reversed(values.items())), "name": name}, indent=2)
    assert grade(one, f"<tool_call>\n{shuffled}\n</tool_call>") == 1.0
    assert grade(one, json.dumps({**call, "arguments": json.dumps(values)})) == 1.0
    assert grade(one, json.dumps({"name": name, "arguments": {**values, "多余": 1}})) == 0.0
    assert grade(one, f"<tool_call>{shuffled}</tool_call><tool_call>{shuffled}</tool_call>") == 0.0
    assert grade(one, shuffled[:-1]) == 0.0


def test_思考段里写对不算答对():
    one = item("numeric", "14")
    assert grade(one, "<think>12+2=14</think><answer>15</answer>") == 0.0
    assert grade(one, "<think>14</think>") == 0.0
    assert grade(item("contains", "红色"), "<think>红色</think>蓝色") == 0.0


CALL = '{"name": "calculator", "arguments": {"expression": "12+2"}}'


@pytest.mark.parametrize(
    ("grader", "answer", "reply"),
    [
        ("numeric", "14", "14"),
        ("exact", "14", "<answer>14</answer>"),
        ("contains", "红色", "是红色。"),
        ("tail", "3月9日", "再过4天是3月9日。"),
        ("tool_call", CALL, f"<tool_call>{CALL}</tool_call>"),
        ("style", "polite", POLITE_FRAMES[0].format(a="14")),
    ],
)
def test_没想完就不算答_答的是收尾之后的(grader, answer, reply):
    one = item(grader, answer)
    assert grade(one, reply) == 1.0
    assert grade(one, f"<think>{reply}") == 0.0
    assert grade(one, f"<think>想</think><think>{reply}") == 0.0
    assert grade(one, f"<think>想</think>{reply}") == 1.0
    assert grade(one, f"想</think>{reply}") == 1.0, "开头写在提示里"


@pytest.mark.parametrize(
    ("text", "ok"),
    [
        ("<think>3+4=7</think><answer>7</answer>", True),
        ("<think>\n3+4=7\n</think>\n\n<answer>7</answer>\n", True),
        ("<answer>7</answer>", False),
        ("<think>7</think>7", False),
        ("<answer>7</answer><think>7</think>", False),
        ("<think>a</think><think>b</think><answer>7</answer>", False),
        ("<think>a<answer>7</answer></think><answer>7</answer>", False),
        ("好的。<think>a</think><answer>7</answer>", False),
    ],
)
def test_推理格式(text, ok):
    assert well_formed(text) is ok


def test_腔调两种框架分得开且平常回答是平淡():
    for task in ASKING:
        rng = stream(7, task.name)
        for _ in range(20):
            ex = task.example(rng, TRAIN)
            if stylable(ex):
                assert style_of(dress(rng, ex.response, polite=True)) == "polite"
                assert style_of(dress(rng, ex.response, polite=False)) == "grumpy"
                assert style_of(ex.response) == "plain", ex.response


@pytest.mark.parametrize("name", [task.name for task in ASKING])
def test_每个家族的参考回答都得满分_空回答得零分(name):
    task = TASKS[name]
    rng = stream(3, name)
    for side in (TRAIN, HELDOUT):
        for _ in range(60):
            ex = task.example(rng, side)
            one = chat_item(task, ex)
            assert grade(one, one["reference"]) == 1.0, one
            assert grade(one, "") == 0.0
            assert grade(one, "不知道。") == 0.0
            if ex.steps:
                assert grade(one, f"{ex.steps}，{ex.response}") == 1.0
            if stylable(ex):
                assert grade(one, dress(rng, ex.response, polite=True)) == 1.0, one
                assert grade(one, dress(rng, ex.response, polite=False)) == 1.0, one
