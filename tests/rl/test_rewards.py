"""奖励：规则的对错、组合的写法、用户函数，以及出错时指出是哪个样本。"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minimind.dataset import RLAIFDataset
from minimind.errors import UserError
from minimind.rl import reward_rules as rules
from minimind.rl.rewards import REWARDS, Sample, build_rewards, make_samples
from minimind.tokenizer import load_tokenizer


def sample(response: str, reference: str = "", **changes) -> Sample:
    messages = [{"role": "user", "content": "48+23 等于多少？"}]
    settings = {"messages": messages, "prompt": messages[0]["content"], "line": 7, **changes}
    return Sample(response=response, reference=reference, **settings)


# ---------------------------------------------------------------- 规则


@pytest.mark.parametrize(
    "response, reference, want",
    [
        ("36", "#### 36", 1),
        ("12+18+6=36，所以是36条。", "一共 12 + 18 + 6 = 36。\n#### 36", 1),
        ("答案是 36.0。", "36", 1),
        ("1,234 元", "1234", 1),
        ("１２３４", "1,234", 1),  # 全角
        ("37", "36", 0),
        ("36 或者 37", "36", 0),  # 只看最后一个数，列一串碰运气没有用
        ("不知道", "36", 0),
        ("", "36", 0),
        ("20%", "0.2", 1),
        ("0.2", "20%", 1),
        ("20", "0.2", 0),
        ("−5", "-5", 1),  # 数学减号
        ("60-25=35", "35", 1),  # 等号前的“-”是减号
        ("5", "-5", 0),
        ("0.75", "(3/4)", 1),
        ("3/4", "((3)/(4))", 1),
        ("5.5", "5(1/2)", 1),
        ("70/2", "35", 0),  # 只列式不计算
        ("1/0", "((1)/(2))", 0),
        ("<think>36</think><answer>35</answer>", "36", 0),  # 想对了、答错了
        ("<think>35</think><answer>36</answer>", "36", 1),
        ("<think>所以是 36", "36", 0),  # 没想完
        ("<think>所以<answer>36</answer>", "36", 0),
        ("0.3333333333", "1/3", 1),
        ("0.333", "1/3", 0),
    ],
)
def test_数值(response, reference, want):
    assert rules.numeric(sample(response, reference)) == want


@given(st.integers(-(10**12), 10**12), st.text(alphabet="答案是元。， \n", max_size=12))
def test_任何整数写在回答末尾都认得(number, prefix):
    assert rules.last_number(f"{prefix}{number}") == number
    assert rules.last_number(f"{prefix}{number:,}") == number


@given(st.text(max_size=80))
def test_规则对任何文字都给出范围之内的数(text):
    for name in ("exact", "numeric", "format", "length", "repetition", "auto"):
        rule = REWARDS[name]
        for response in (text, text * 4, f"<answer>{text}</answer>"):
            assert rule.low <= rule.score(sample(response, "36")) <= rule.high


@pytest.mark.parametrize(
    "response, reference, want",
    [
        ("乔木镇", "乔木镇", 1),
        ("答案是：乔木镇。", "乔木镇", 1),
        ("<think>想一想</think><answer>乔木镇</answer>", "乔木镇。", 1),
        ("是乔木镇和石桥镇", "乔木镇", 0),
        ("", "乔木镇", 0),
        ("<answer></answer>", "", 0),
    ],
)
def test_逐字相同(response, reference, want):
    assert rules.exact(sample(response, reference)) == want


@pytest.mark.parametrize(
    "reference, numeric",
    [("36", True), ("答案是36。", True), ("x=2.8", True), ("36 公里/小时", True), ("1,234", True), ("(3/4)", True),
     ("20%", True), ("3月5日", False), ("乔木镇", False), ("2024-01-05", False), ("5 个苹果和 3 个梨", False),
     ("他在第 3 年搬到了很远的石桥镇居住", False)],
)  # fmt: skip
def test_参考答案是不是数(reference, numeric):
    assert rules.is_numeric(reference) is numeric


@pytest.mark.parametrize(
    "response, want",
    [
        ("<think>想</think><answer>答</answer>", 1.5),
        ("\n<think>想\n再想</think>\n<answer>答</answer>\n", 1.5),
        ("<think>想</think>然后<answer>答</answer>", 1.0),  # 四个标签各一次，中间多了话
        ("<answer>答</answer><think>想</think>", 1.0),  # 次序反了
        ("<think>想</think>答", 0.5),
        ("<think><think>想</think><answer>答</answer>", 0.75),  # 重复的标签不得分
        ("答", 0.0),
    ],
)
def test_格式_每个标签四分之一_整体一半(response, want):
    assert rules.format_tags(sample(response)) == want


@pytest.mark.parametrize(
    "response, limits, want",
    [
        ("字" * 10, (1, 20), 0),
        ("字" * 20, (1, 20), 0),
        ("字" * 30, (1, 20), -0.5),
        ("字" * 90, (1, 20), -1),
        ("", (1, 20), -1),
        ("  ", (1, 20), -1),
        ("字" * 5, (10, 20), -0.5),
        ("", (0, 20), 0),
    ],
)
def test_长度(response, limits, want):
    assert rules.length(sample(response), *limits) == pytest.approx(want)
    assert rules.length(sample(response, truncated=True), *limits) == -1


def test_重复_中文没有空格也看得出():
    normal = "云川的清晨总是从河边开始，渔人收网，面包店飘出麦香，孩子们沿着石桥跑向学堂。"
    assert rules.repetition(sample(normal)) == 0
    assert rules.repetition(sample("我不知道" * 30)) < -0.9
    assert rules.repetition(sample(" ".join("我不知道") + " " + "我不知道" * 30)) < -0.9
    assert rules.repetition(sample("好")) == 0
    half = rules.repetition(sample(normal + "我不知道" * 10))
    assert -0.9 < half < -0.1  # 只有一半在循环，扣一部分


def test_微世界判分用记录自己的字段():
    record = {"grader": "contains", "answer": "乔木镇", "reject": ["石桥镇"]}
    assert rules.microworld(sample("他住在乔木镇。", record=record)) == 1
    assert rules.microworld(sample("乔木镇，也许石桥镇", record=record)) == 0
    assert rules.auto(sample("他住在乔木镇。", "乔木镇", record=record)) == 1  # auto 优先用判分器
    assert rules.auto(sample("他住在乔木镇。", "乔木镇")) == 0


@pytest.mark.parametrize("name", ["auto", "exact", "numeric", "microworld"])
def test_没写完的回答不算答对(name):
    settings = {"reference": "71", "record": {"grader": "numeric", "answer": "71"}}
    score = REWARDS[name].score
    assert score(sample("71", **settings)) == 1
    assert score(sample("71", truncated=True, **settings)) == 0


# ---------------------------------------------------------------- 组合


def test_默认是可验证的规则():
    right, wrong = sample("<think>算</think><answer>71</answer>", "71"), sample("70", "71")
    plain = build_rewards()
    assert plain.weights == {"auto": 1} and plain.bounds == (0, 1)
    assert plain([right, wrong]).total.tolist() == [1, 0]
    thinking = build_rewards(reasoning=1)
    assert thinking.weights == {"auto": 1, "format": 0.5}
    result = thinking([right, wrong])
    assert result.total.tolist() == [1.75, 0] and result.total.dtype == torch.float32
    assert result.parts["format"].tolist() == [1.5, 0]  # 各条的分数未加权
    # 格式再好也不如答对
    assert (
        thinking([sample("<think>算</think><answer>70</answer>", "71")]).total
        < thinking([sample("71", "71")]).total
    )


def test_加权组合与范围():
    rewards = build_rewards("exact:2, numeric , repetition:-1,length(5-10):0.5")
    assert rewards.weights == {"exact": 2, "numeric": 1, "repetition": -1, "length": 0.5}
    assert rewards.bounds == (-0.5, 4)  # 负权重的区间翻过来
    s = sample("71", "71")
    result = rewards([s])
    assert result.total.item() == pytest.approx(2 + 1 + 0 - 0.5 * 3 / 5)
    assert rewards([]).total.shape == (0,)
    assert rewards.describe() == "奖励：exact × 2 + numeric × 1 + repetition × -1 + length × 0.5"


@pytest.mark.parametrize(
    "spec, words",
    [
        ("exakt", "没有这条奖励 'exakt'.*exact.*my_reward.py:score"),
        ("exact:", "没有这条奖励"),
        ("exact:很多", "权重是 '很多'"),
        ("exact:nan", "权重是 'nan'"),
        ("exact,,format", "有一项是空的"),
        ("exact,exact:2", "exact 写了两次"),
        ("length(9)", "length\\(最少字数-最多字数\\)"),
        ("length(20-10)", "length\\(最少字数-最多字数\\)"),
        ("exact(1-2)", "只有 length 带参数"),
        ("model", "--reward_model_path"),
    ],
)
def test_写法不对时说清怎么写(spec, words):
    with pytest.raises(UserError, match=words):
        build_rewards(spec)


def test_和数据集的一批对上(tmp_path):
    path = tmp_path / "rl.jsonl"
    path.write_text(
        '{"conversations": [{"role": "system", "content": "只答数字"}, {"role": "user", "content": "1+1"}, '
        '{"role": "assistant", "content": "2"}]}\n'
        '{"conversations": [{"role": "user", "content": "2+3"}], "grader": "numeric", "answer": "5"}\n',
        encoding="utf-8",
    )
    dataset = RLAIFDataset(path, load_tokenizer(), cache_dir=tmp_path / "cache")
    batch = dataset.collate([dataset[0], dataset[1]])
    samples = make_samples(batch, ["2", "3", "5", "6"], [0, 0, 1, 1], [False, False, False, True])
    assert [(s.prompt, s.reference, s.line, s.truncated) for s in samples] == [
        ("1+1", "2", 1, False), ("1+1", "2", 1, False), ("2+3", "", 2, False), ("2+3", "", 2, True),
    ]  # fmt: skip
    assert build_rewards(data_path=path)(samples).total.tolist() == [1, 0, 1, 0]


# ---------------------------------------------------------------- 出错：指出样本与修法


@pytest.mark.parametrize(
    "spec, changes, words",
    [
        ("auto", {}, "没有参考答案.*没有判分器.*--reward_model_path"),
        ("numeric", {"reference": "乔木镇"}, "参考答案 '乔木镇' 里没有数"),
        ("microworld", {"reference": "1"}, "没有 grader、answer 字段"),
        ("microworld", {"record": {"grader": "猜", "answer": "1"}}, "不认识的判分器 '猜'.*numeric"),
    ],
)
def test_规则用不上时指出样本_绝不悄悄给零分(spec, changes, words):
    rewards = build_rewards(spec, data_path="dataset/rl.jsonl")
    with pytest.raises(UserError, match=words) as caught:
        rewards([sample("七十一", **changes)])
    text = str(caught.value)
    assert (
        "dataset/rl.jsonl:7" in text
        and "48+23 等于多少？" in text
        and "七十一" in text
        and "修复办法" in text
    )


def write(path, body: str) -> str:
    path.write_text("import math\n\n\n" + body, encoding="utf-8")
    return str(path)


def test_用户的函数(tmp_path, monkeypatch):
    (tmp_path / "helper_for_reward.py").write_text("BONUS = 2\n")
    file = write(
        tmp_path / "mine.py",
        "from helper_for_reward import BONUS\n\n"
        "def score(prompt, response, reference):\n    return BONUS * (response == reference)\n\n"
        "def rich(prompt, response, reference, *, record, truncated):\n    return record['x'] - truncated\n\n"
        "class Callable:\n    def __call__(self, prompt, response, reference=''):\n        return len(prompt)\n\n"
        "instance = Callable()\n",
    )
    rewards = build_rewards(f"{file}:score:0.5,{file}:rich,{file}:instance,exact")
    assert rewards.bounds is None  # 用户的函数不知道范围
    result = rewards(
        [sample("71", "71", record={"x": 3}), sample("70", "71", record={"x": 4}, truncated=True)]
    )
    assert result.parts["score"].tolist() == [2, 0] and result.parts["rich"].tolist() == [3, 3]
    assert result.total.tolist() == [1 + 3 + 11 + 1, 0 + 3 + 11 + 0]
    monkeypatch.chdir(tmp_path)
    assert build_rewards("mine.py:score").weights == {"score": 1}  # 相对路径


@pytest.mark.parametrize(
    "returns", ["1", "0.5", "True", "np.float32(0.5)", "np.array([2.0])", "torch.tensor(0.25)"]
)
def test_各种写法的一个数都收(tmp_path, returns):
    file = write(tmp_path / "m.py", f"import numpy as np, torch\ndef f(p, r, ref):\n    return {returns}\n")
    assert build_rewards(f"{file}:f")([sample("x")]).total.isfinite().all()


@pytest.mark.parametrize(
    "body, words",
    [
        ("return float('nan')", "奖励 f 返回 nan"),
        ("return math.inf", "奖励 f 返回 inf"),
        ("return None", "返回 'None'.*忘了 return"),
        ("pass", "忘了 return"),
        ("return '0.5'", "返回 .*0.5.*float"),
        ("return [1, 2]", "返回 .*1, 2"),
        ("import torch\n    return torch.ones(2)", "返回 .*tensor"),
        ("return 1 / (len(response) - 1)", "m.py:5.*ZeroDivisionError division by zero"),
        ("return int(response)", "ValueError invalid literal"),
        ("raise KeyError", "KeyError"),
    ],
)
def test_用户的函数出错_指出样本与代码行(tmp_path, body, words):
    file = write(tmp_path / "m.py", f"def f(prompt, response, reference):\n    {body}\n")
    rewards = build_rewards(f"{file}:f", data_path="rl.jsonl")
    with pytest.raises(UserError, match=words) as caught:
        rewards([sample("x")])
    text = str(caught.value)
    assert "rl.jsonl:7" in text and "48+23" in text and "'x'" in text and "修复办法" in text
    if "出错" in text:
        assert f"{file}:5" in text  # 使用者文件里抛异常的那一行


@pytest.mark.parametrize(
    "text, name, words",
    [
        (None, "f", "没有这个文件"),
        ("def score(p, r, ref):\n    return 1\n", "scor", "没有函数 scor.*其中之一：score.*改成 .*:score"),
        ("x = 1\n", "f", "没有函数 f.*f\\(prompt, response, reference\\)"),
        ("f = 3\n", "f", "f 不是函数"),
        ("def f(a, b):\n    return 1\n", "f", "参数是 \\(a, b\\).*f\\(prompt, response, reference\\)"),
        ("def f(a, b, c, d):\n    return 1\n", "f", "参数是 \\(a, b, c, d\\)"),
        ("def f(a, b, c):\n  return 1 +\n", "f", "m.py:5.*SyntaxError"),
        ("import no_such_module_here\n", "f", "m.py:4.*ModuleNotFoundError"),
    ],
)
def test_函数文件不对_训练之前就说(tmp_path, text, name, words):
    file = str(tmp_path / "m.py") if text is None else write(tmp_path / "m.py", text)
    with pytest.raises(UserError, match=words) as caught:
        build_rewards(f"{file}:{name}")
    assert "修复办法" in str(caught.value)
