"""可验证的规则奖励：每条都是纯函数 ``f(sample) -> float``，不用模型，不看别的样本。

答案对错的规则先去掉 ``<think>`` 段（没有收尾的去到末尾：没想完就是没有答），再取 ``<answer>`` 里的文字（没有就取全部），
然后归一化全半角、空白、大小写与句末标点，与微世界判分器用的是同一套（:mod:`minimind.answers`）；参考答案里的 ``####`` 之后是最终答案（GSM8K 的写法）。
写到长度上限还没停的回答不算答完，对错一律 0 分：否则模型没有理由学会结束。
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from minimind.answers import (
    final_answer,
    is_numeric,
    last_number,
    normalize,
    reference_answer,
    strip_lead_in,
    well_formed,
)

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


@dataclass
class Sample:
    """一个要打分的回答。

    Args:
        messages: 提示消息，``{"role", "content"}`` 的列表。
        prompt: 提示的文字，即最后一条消息的内容。
        response: 模型写的文字，不含结束符。
        reference: 参考答案，没有时为空串。
        record: 数据文件里的原始记录，判分器要的字段在这里。
        line: 数据文件里的行号，从 1 起；``source`` 是哪个文件，报错时用。
        truncated: 写到长度上限还没有结束。
        conversation: 带工具的多轮对话（:class:`minimind.rl.conversations.Trajectory`）；一问一答的没有。
    """

    messages: list[dict[str, Any]]
    prompt: str
    response: str
    reference: str = ""
    record: dict[str, Any] = field(default_factory=dict)
    line: int = 0
    truncated: bool = False
    source: str = ""
    conversation: Any = None


def exact(sample: Sample) -> float:
    """归一化并去掉“答案是”之类之后，与参考答案逐字相同得 1，否则 0。"""
    got, want = (
        strip_lead_in(normalize(t))
        for t in (final_answer(sample.response), reference_answer(sample.reference))
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


def microworld(sample: Sample) -> float:
    """用记录自己的 ``grader`` 与 ``answer`` 判分，0 到 1。"""
    from minimind.microworld.graders import GRADERS, grade  # 只有微世界的题用得上

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
