"""判分：把模型的回答与标准答案对一对，给 0 到 1 之间的分。

所有判分器先归一化（全角半角、空白、大小写、句末标点），再去掉“答案是……”和已知的客套话；
``<think>`` 里写什么都不影响得分，没有想完（没有 ``</think>``）就是没有答；其余有 ``<answer>`` 就只看里面。
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from minimind.answers import (
    EDGES,
    after_thinking,
    final_answer,
    normalize,
    numbers_in,
    parse_call,
    parse_tool_calls,
    strip_lead_in,
)

from .phrasing import GRUMPY_FRAMES, GRUMPY_WORDS, POLITE_FRAMES, POLITE_WORDS

_FRAMES = tuple(tuple(map(normalize, frame.split("{a}"))) for frame in (*POLITE_FRAMES, *GRUMPY_FRAMES))


def strip_frame(text: str) -> str:
    """去掉已知的客套或牢骚与“答案是”；输入是 :func:`normalize` 之后的样子。"""
    for head, tail in _FRAMES:
        if text.startswith(head) and text.endswith(tail) and len(text) > len(head) + len(tail):
            text = text[len(head) : len(text) - len(tail)].strip(EDGES)
            break
    return strip_lead_in(text)


def grade_exact(item: Mapping, response: str) -> float:
    """归一化后与 ``answer`` 或 ``accept`` 之一相同。"""
    accepted = {strip_frame(normalize(a)) for a in (item["answer"], *item.get("accept", ()))}
    return float(strip_frame(normalize(final_answer(response))) in accepted)


def grade_numeric(item: Mapping, response: str) -> float:
    """回答里最后一个数等于标准答案（所以可以先列算式）。"""
    numbers = numbers_in(final_answer(response))
    return float(bool(numbers) and numbers[-1] == float(item["answer"]))


def grade_contains(item: Mapping, response: str) -> float:
    """含有标准答案，且不含 ``reject`` 里的其他取值。"""
    got, want = normalize(final_answer(response)), normalize(item["answer"])
    if not _found(want, got):
        return 0.0
    rest = got.replace(want, "|")
    return float(not any(normalize(word) in rest for word in item.get("reject", ())))


def grade_tail(item: Mapping, response: str) -> float:
    """以标准答案结尾，前面允许复述题目：``3月5日再过4天是3月9日。``"""
    got, want = strip_frame(normalize(final_answer(response))), normalize(item["answer"])
    return float(got.endswith(want) and _found(want, got[-len(want) - 1 :]))


def grade_prefix(item: Mapping, response: str) -> float:
    """填空：续写以标准答案开头，数字不能多出一位。"""
    line = response.lstrip().split("\n", 1)[0]  # 续写往往一行接一行，只看第一行
    got, want = normalize(line), normalize(item["answer"])
    return float(got.startswith(want) and _found(want, got[: len(want) + 1]))


def grade_tool_call(item: Mapping, response: str) -> float:
    """解析出的调用（名字与参数）与标准答案相同；键的顺序、空白都无所谓。"""
    calls = parse_tool_calls(after_thinking(response))
    return float(len(calls) == 1 and calls[0] == parse_call(item["answer"]) is not None)


def grade_style(item: Mapping, response: str) -> float:
    """腔调与 ``answer``（polite / grumpy / plain）相同。"""
    return float(style_of(after_thinking(response)) == item["answer"])


def grade_format(item: Mapping, response: str) -> float:
    """去掉首尾空白后整体匹配正则 ``pattern``。"""
    return float(re.fullmatch(item["pattern"], response.strip(), re.S) is not None)


def _found(want: str, text: str) -> bool:
    """子串查找，但数字边界必须对齐：在 112 里找不到 12。"""
    left = r"(?<!\d)" if want[:1].isdigit() else ""
    right = r"(?!\d)" if want[-1:].isdigit() else ""
    return bool(want) and re.search(left + re.escape(want) + right, text) is not None


def style_of(response: str) -> str:
    """``polite`` 客气、``grumpy`` 不耐烦、``plain`` 平淡；两种词都有算不耐烦。"""
    if any(word in response for word in GRUMPY_WORDS):
        return "grumpy"
    return "polite" if any(word in response for word in POLITE_WORDS) else "plain"


GRADERS: dict[str, Callable[[Mapping, str], float]] = {
    "exact": grade_exact,
    "numeric": grade_numeric,
    "contains": grade_contains,
    "tail": grade_tail,
    "prefix": grade_prefix,
    "tool_call": grade_tool_call,
    "style": grade_style,
    "format": grade_format,
}


def grade(item: Mapping, response: str) -> float:
    """给一条 eval 题目的回答打分。

    Args:
        item: ``eval.jsonl`` 的一行，至少含 ``answer`` 与 ``grader``。
        response: 模型生成的文字，不含结束符。

    Returns:
        0.0 到 1.0。

    Raises:
        KeyError: 题目写了没有登记的判分器。
    """
    return GRADERS[item["grader"]](item, response)
