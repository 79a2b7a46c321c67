"""可验证的规则奖励：每条都是纯函数 ``f(sample) -> float``，不用模型，不看别的样本。

答案对错的规则先去掉 ``<think>`` 段（没有收尾的去到末尾：没想完就是没有答），再取 ``<answer>`` 里的文字（没有就取全部），
然后归一化全半角、空白、大小写与句末标点，与微世界判分器用的是同一套；参考答案里的 ``####`` 之后是最终答案（GSM8K 的写法）。
写到长度上限还没停的回答不算答完，对错一律 0 分：否则模型没有理由学会结束。
"""

from __future__ import annotations

import math
import re
import unicodedata
from typing import TYPE_CHECKING

from minimind.microworld.graders import (
    GRADERS,
    final_answer,
    grade,
    normalize,
    strip_frame,
    well_formed,
)

if TYPE_CHECKING:
    from minimind.rl.rewards import Sample

TAGS = ("<think>", "</think>", "<answer>", "</answer>")

_N = r"\d+(?:\.\d+)?"
# 依次是带分数 5(1/2)、括号里的分数 (3/4)、不带括号的分数与普通的数；前面紧挨数字或右括号的“-”是减号
_NUMBER = re.compile(
    rf"(?:(?<![\d)])-)?(?:(?P<whole>\d+)\((?P<a>{_N})/(?P<b>{_N})\)|\((?P<c>{_N})/(?P<d>{_N})\)"
    rf"|(?P<e>{_N})/(?P<f>{_N})|(?P<n>{_N}))(?P<percent>%)?"
)
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_LONE = re.compile(rf"\((-?{_N})\)")
# 参考答案除了这个数只有单位、“x=”之类：按数值比
_SHORT_ANSWER = 8


def reference_answer(reference: str) -> str:
    """参考答案里真正要比的那一段：``####`` 之后，否则 ``<answer>`` 里面，否则去掉 ``<think>`` 的全文。"""
    return final_answer(reference.rsplit("####", 1)[-1]).strip()


def last_number(text: str, fractions: bool = True) -> float | None:
    """文字里最后一个数；认得千分位、百分数、分数与带分数 ``5(1/2)``，没有数返回 None。

    Args:
        fractions: 假则 ``a/b`` 算两个数：参考答案是 5 时，只列出 ``35/7`` 而不算出来不能得分。
    """
    text = unicodedata.normalize("NFKC", _THOUSANDS.sub("", text)).replace("−", "-").replace(" ", "")
    while (bare := _LONE.sub(r"\1", text)) != text:  # ((7)/(2)) → (7/2)
        text = bare
    found = None
    for found in _NUMBER.finditer(text):  # noqa: B007  只要最后一个
        pass
    if found is None:
        return None
    groups = found.groupdict()
    if groups["n"]:
        value = float(groups["n"])
    elif not fractions:
        value = float(next(groups[k] for k in "bdf" if groups[k]))
    else:
        top, bottom = next((groups[a], groups[b]) for a, b in ("ab", "cd", "ef") if groups[a])
        if not float(bottom):
            return None
        value = float(groups["whole"] or 0) + float(top) / float(bottom)
    value = value / 100 if groups["percent"] else value
    return -value if found[0].startswith("-") else value


def exact(sample: Sample) -> float:
    """归一化并去掉“答案是”之类之后，与参考答案逐字相同得 1，否则 0。"""
    got, want = (
        strip_frame(normalize(t)) for t in (final_answer(sample.response), reference_answer(sample.reference))
    )
    return float(not sample.truncated and bool(want) and got == want)


def numeric(sample: Sample) -> float:
    """回答里最后一个数等于参考答案里最后一个数得 1（相对误差 1e-6 以内），否则 0。"""
    answer = reference_answer(sample.reference)
    want = last_number(answer)
    if want is None:
        raise ValueError(f"参考答案 {answer[:40]!r} 里没有数；不是数值题就用 exact")
    got = last_number(final_answer(sample.response), fractions="/" in answer)
    if sample.truncated or got is None:
        return 0.0
    return float(math.isclose(got, want, rel_tol=1e-6, abs_tol=1e-9))


def is_numeric(reference: str) -> bool:
    """参考答案是不是一个数（允许前后有单位、``x=`` 之类几个字）。"""
    answer = strip_frame(normalize(reference_answer(reference)))
    rest = _NUMBER.sub("", _THOUSANDS.sub("", answer), count=1)
    return rest != _THOUSANDS.sub("", answer) and len(rest) <= _SHORT_ANSWER and last_number(rest) is None


def microworld(sample: Sample) -> float:
    """用记录自己的 ``grader`` 与 ``answer`` 判分，0 到 1。"""
    missing = [name for name in ("grader", "answer") if name not in sample.record]
    if missing:
        raise ValueError(f"这条记录没有 {'、'.join(missing)} 字段，不是微世界的题")
    if sample.record["grader"] not in GRADERS:
        raise ValueError(f"不认识的判分器 {sample.record['grader']!r}，有 {'、'.join(GRADERS)}")
    return 0.0 if sample.truncated else grade(sample.record, sample.response)


def auto(sample: Sample) -> float:
    """答案对不对：记录带判分器就用它，参考答案是一个数就比数值，否则逐字比。"""
    if "grader" in sample.record and "answer" in sample.record:
        return microworld(sample)
    if not sample.reference.strip():
        raise ValueError(
            "没有参考答案（末尾的助手回合是空的），也没有判分器，对错无从判断；"
            "给数据补上参考答案，或用 --reward_model_path、--reward 文件.py:函数"
        )
    return numeric(sample) if is_numeric(sample.reference) else exact(sample)


def format_tags(sample: Sample) -> float:
    """四个标签每个恰好出现一次各得 0.25，整体恰是 ``<think>…</think><answer>…</answer>`` 再得 0.5，满分 1.5。"""
    each = sum(0.25 for tag in TAGS if sample.response.count(tag) == 1)
    return each + 0.5 * well_formed(sample.response)


def length(sample: Sample, low: int = 1, high: int = 256) -> float:
    """字数在 ``[low, high]`` 内得 0；太短按缺的比例、太长按超出的比例扣，最多扣到 −1；被截断的得 −1。"""
    if sample.truncated:
        return -1.0
    n = len(sample.response.strip())
    return -min(max((low - n) / max(low, 1), (n - high) / max(high, 1), 0.0), 1.0)


def repetition(sample: Sample, n: int = 4) -> float:
    """重复的字符 n 元组所占的比例，取负，−1 到 0；中文没有空格，按词切会把整段循环当成一个词。

    正常文字也有重复：五千条真实中文回答的中位数 0、99 分位 0.25（500 字以上的 0.34），八百条英文的九成在
    0.26 以下，所以免扣 0.3；循环起来的回答在 0.8 以上。
    """
    text = "".join(sample.response.split())
    grams = [text[i : i + n] for i in range(len(text) - n + 1)]
    if not grams:
        return 0.0
    rate = 1 - len(set(grams)) / len(grams)
    return -max(rate - 0.3, 0.0) / 0.7
