"""应用题：中英文各种写法里取得出答案；取不出、取错都不算对。"""

import itertools
import json

import pytest
from eval_helpers import saved_pair_argv
from hypothesis import given
from hypothesis import strategies as st

from minimind.dataset.jsonl import DataError
from minimind.evaluate import gsm
from minimind.evaluate.gsm import (
    Problem,
    chinese_number,
    correct,
    encode_problem,
    final_number,
    read_problems,
    same,
    spoken,
    stated_number,
)
from minimind.tokenizer import load_tokenizer


@pytest.mark.parametrize(
    ("response", "value"),
    [
        ("16 - 3 = 13\n13 * 2 = 26\n#### 26", 26),
        ("#### 1,234 dollars", 1234),
        ("#### -5", -5),
        ("The answer is 18.", 18),
        ("So the final answer is: $2,500.50 per year", 2500.5),
        ("... = 18 eggs. The answer is 18 eggs a day, not 16.", 18),
        (r"所以 \boxed{3/4}", 0.75),
        (r"所以 \boxed{\frac{3}{4}}。", 0.75),
        ("#### ((1)/(2))", 0.5),
        ("<think>先算 99</think><answer>12</answer>", 12),
        ("答案是35。一共有 7 天。", 35),
        ("因此，最终答案为：１２个。", 12),
        ("解：3+4=7。\n答：7", 7),
        ("答案是 20%", 0.2),
        ("答案：5(1/2)", 5.5),
        ("答案是十二个。", 12),
        ("答案是 8，不对，答案是 9", 9),
    ],
)
def test_写明的答案(response, value):
    assert same(stated_number(response), value)
    assert same(final_number(response), value)


@pytest.mark.parametrize(
    ("response", "value"),
    [
        ("3+4=7，再加 5 得 12。", 12),
        ("He has 5 apples and eats 2, so 3.", 3),
        ("一共有三百零五人。", 305),
        ("不知道", None),
        ("", None),
    ],
)
def test_没写明就取最后一个数(response, value):
    assert stated_number(response) is None
    assert final_number(response) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("十", 10), ("十二", 12), ("二十", 20), ("一百零五", 105), ("两千三百", 2300), ("三千零五", 3005),
        ("一万", 10_000), ("十二万三千", 123_000), ("一亿二千万", 120_000_000), ("三点一四", 3.14), ("负七", -7),
        ("二〇二四", 2024), ("零", 0), ("没有数", None),
    ],
)  # fmt: skip
def test_汉字数(text, value):
    assert chinese_number(text) == (None if value is None else pytest.approx(value))


def spell(n):
    """0 到 99,999,999 的标准读法，独立写一遍。"""
    if n >= 10_000:
        high, low = divmod(n, 10_000)
        gap = "零" if 0 < low < 1000 else ""
        return f"{spell(high)}万{gap}{spell(low) if low else ''}"
    out, zero = "", False
    for unit, name in ((1000, "千"), (100, "百"), (10, "十"), (1, "")):
        digit, n = divmod(n, unit)
        if digit:
            out += ("零" if zero and out else "") + "零一二三四五六七八九"[digit] + name
            zero = False
        else:
            zero = True
    return out or "零"


@given(st.integers(0, 99_999_999))
def test_汉字数_标准读法都读得回(n):
    assert chinese_number(spell(n)) == n


@given(st.text(max_size=60) | st.text("0123456789.,-/%()#答案是：十百万点 ", max_size=40))
def test_任意文字都不崩(text):
    for value in (stated_number(text), final_number(text)):
        assert value is None or isinstance(value, float)


@pytest.mark.parametrize(
    ("got", "want", "right"),
    [(None, 0.0, False), (1 / 3, 0.3333333333, True), (26.0, 26, True), (26.01, 26, False), (0.0, 0.0, True)],
)
def test_数值相等(got, want, right):
    assert same(got, want) is right


def write(path, *records):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def test_两种格式都读得懂_坏行指出位置(tmp_path):
    turns = [{"role": "user", "content": "1+1？"}, {"role": "assistant", "content": "是 2。\n#### 2"}]
    records = [{"question": "1+1？", "answer": "#### 2"}, {"conversations": turns}]
    problems = read_problems(write(tmp_path / "a.jsonl", *records))
    assert [(p.question, p.values) for p in problems] == [("1+1？", (2,)), ("1+1？", (2,))]
    with pytest.raises(DataError, match=r"b.jsonl:2.*没有数"):
        read_problems(write(tmp_path / "b.jsonl", records[0], {"question": "谁", "answer": "他"}))


def test_真实题库的标准答案都取得出(shared_dir):
    problems = read_problems(shared_dir / "data" / "gsm8k_test.jsonl")
    assert len(problems) == 1319 and problems[0].values == (18,)
    problems += read_problems(shared_dir / "data" / "heldout" / "math_zh.heldout.jsonl")
    assert len(problems) == 1319 + 814
    # 标准解答本身就该得满分，换一道题的解答几乎都不得分
    assert all(correct(p.solution, p.values, strict=True) for p in problems)
    shifted = [correct(p.solution, q.values, strict=True) for p, q in itertools.pairwise(problems)]
    assert sum(shifted) < 0.03 * len(shifted)


@pytest.mark.parametrize(
    ("response", "strict", "flexible"),
    [
        ("#### 208, 156", True, True),
        ("答案是 156 和 208", True, True),
        ("先设未知数。\n甲 208 元，乙 156 元。", False, True),
        ("#### 208", False, False),
        ("#### 208, 157", False, False),
    ],
)
def test_问两个数的题_两个都要对(response, strict, flexible):
    values = (208.0, 156.0)
    assert correct(response, values, strict=True) is strict
    assert correct(response, values, strict=False) is flexible


def test_提示_续写与对话():
    tokenizer = load_tokenizer()
    problem, example = Problem("乙？", "#### 2", (2,)), Problem("甲？", "#### 1", (1,))
    plain = tokenizer.decode(encode_problem(tokenizer, problem, [example], False, None))
    assert plain == "<|im_start|>题目：甲？\n解答：#### 1\n\n题目：乙？\n解答："
    chat = tokenizer.decode(encode_problem(tokenizer, problem, [example], True, False))
    assert chat.count("<|im_start|>user") == 2 and chat.endswith("assistant\n<think>\n\n</think>\n\n")


def test_命令行(tmp_path, monkeypatch, capsys):
    data = write(
        tmp_path / "a.jsonl", *[{"question": f"{i}+1？", "answer": f"#### {i + 1}"} for i in range(5)]
    )
    argv = saved_pair_argv(tmp_path, data)
    assert gsm.main([*argv, "--max_new_tokens", "4", "--batch_size", "2", "--save_items"]) == 0
    result = json.loads((tmp_path / "full_sft_32_gsm.json").read_text("utf-8"))
    assert [item["answer"] for item in result["items"]] == [[1], [2], [3], [4], [5]]
    assert set(result["methods"]) == {"strict", "flexible", "stated", "stopped"}
    assert "flexible" in capsys.readouterr().out


def test_提示里开着思考_没想完就没有答案():
    tokenizer, problem = load_tokenizer(), Problem("1+1？", "2", (2.0,))
    prompts = {
        thinking: encode_problem(tokenizer, problem, [], True, thinking) for thinking in (True, False, None)
    }
    unfinished = {k: final_number(spoken(tokenizer, p, "先加一，得 2")) for k, p in prompts.items()}
    assert unfinished == {True: None, False: 2, None: 2}
    assert final_number(spoken(tokenizer, prompts[True], "得 3\n</think>\n\n答案是 2")) == 2
