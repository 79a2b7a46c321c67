"""从文字里读出答案：标签、数、工具调用。微世界的判分器、强化学习的规则与应用题的评测都用这一份。

``<think>`` 里写什么都不算回答，没有想完（没有 ``</think>``）就是没有答；其余有 ``<answer>`` 就只看里面；
参考答案里的 ``####`` 之后是最终答案（GSM8K 的写法）。
"""

from __future__ import annotations

import json
import re
import unicodedata

# 前面紧挨数字的“-”是减号，不是负号：60-25=35
NUMBER = re.compile(r"(?<!\d)-?\d+(?:\.\d+)?")
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
ANSWER_SPAN = re.compile(r"<answer>(.*?)</answer>", re.S)
THINK_SPAN = re.compile(r"<think>.*?(?:</think>|\Z)", re.S)
TOOL_SPAN = re.compile(r"<tool_call>(.*?)</tool_call>", re.S)
_TEXT = r"(?:(?!</?(?:think|answer)>).)*"
WELL_FORMED = re.compile(rf"\s*<think>{_TEXT}</think>\s*<answer>{_TEXT}</answer>\s*", re.S)
LEAD_IN = re.compile(r"^(?:答案是|答案为|答案|结果是|答|answer|a):?")
EDGES = ".,;:!?、"

_N = r"\d+(?:\.\d+)?"
# 依次是带分数 5(1/2)、括号里的分数 (3/4)、不带括号的分数与普通的数；前面紧挨数字或右括号的“-”是减号
_VALUE = re.compile(
    rf"(?:(?<![\d)])-)?(?:(?P<whole>\d+)\((?P<a>{_N})/(?P<b>{_N})\)|\((?P<c>{_N})/(?P<d>{_N})\)"
    rf"|(?P<e>{_N})/(?P<f>{_N})|(?P<n>{_N}))(?P<percent>%)?"
)
_LONE = re.compile(rf"\((-?{_N})\)")
# 参考答案除了这个数只有单位、“x=”之类：按数值比
_SHORT_ANSWER = 8


# ---------------------------------------------------------------- 文字与标签


def normalize(text: str) -> str:
    """全角转半角、小写、去空白与首尾标点；句号统一成半角，顿号保留。"""
    text = unicodedata.normalize("NFKC", text).replace("。", ".").lower()
    # 去掉空白后组合符可能贴上前一个字母，所以再合并一次
    return unicodedata.normalize("NFKC", re.sub(r"\s+", "", text)).strip(EDGES)


def strip_lead_in(text: str) -> str:
    """去掉开头的“答案是”之类；输入是 :func:`normalize` 之后的样子。"""
    return LEAD_IN.sub("", text).strip(EDGES)


def after_thinking(response: str) -> str:
    """去掉思考之后的文字：``<think>`` 到 ``</think>``，没有收尾的到末尾；只有收尾的（开头写在提示里）取它之后。"""
    return THINK_SPAN.sub("", response).rpartition("</think>")[2]


def final_answer(response: str) -> str:
    """:func:`after_thinking` 里有 ``<answer>`` 就取最后一个里面的文字，否则取全部。"""
    spoken = after_thinking(response)
    spans = ANSWER_SPAN.findall(spoken)
    return spans[-1] if spans else spoken


def reference_answer(reference: str) -> str:
    """参考答案里真正要比的那一段：``####`` 之后，否则 ``<answer>`` 里面，否则去掉 ``<think>`` 的全文。"""
    return final_answer(reference.rsplit("####", 1)[-1]).strip()


def well_formed(response: str) -> bool:
    """恰好是一段 ``<think>`` 接一段 ``<answer>``，前后没有别的话。"""
    return WELL_FORMED.fullmatch(response) is not None


# ---------------------------------------------------------------- 数


def numbers_in(text: str) -> list[float]:
    """文字里出现的数，按顺序。半角千分位逗号属于数，全角逗号总是分隔。"""
    text = THOUSANDS.sub("", text)
    return [float(n) for n in NUMBER.findall(unicodedata.normalize("NFKC", text).replace("−", "-"))]


def last_number(text: str, fractions: bool = True) -> float | None:
    """文字里最后一个数；认得千分位、百分数、分数与带分数 ``5(1/2)``，没有数返回 None。

    Args:
        fractions: 假则 ``a/b`` 算两个数：参考答案是 5 时，只列出 ``35/7`` 而不算出来不能得分。
    """
    text = unicodedata.normalize("NFKC", THOUSANDS.sub("", text)).replace("−", "-").replace(" ", "")
    while (bare := _LONE.sub(r"\1", text)) != text:  # ((7)/(2)) → (7/2)
        text = bare
    found = None
    for found in _VALUE.finditer(text):  # noqa: B007  只要最后一个
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


def is_numeric(reference: str) -> bool:
    """参考答案是不是一个数（允许前后有单位、``x=`` 之类几个字）。"""
    answer = THOUSANDS.sub("", strip_lead_in(normalize(reference_answer(reference))))
    rest = _VALUE.sub("", answer, count=1)
    return rest != answer and len(rest) <= _SHORT_ANSWER and last_number(rest) is None


# ---------------------------------------------------------------- 工具调用


def parse_call(text: str) -> dict | None:
    """一段 JSON → ``{"name", "arguments"}``；不是合法调用就返回 None。"""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    return {"name": call["name"], "arguments": arguments} if isinstance(arguments, dict) else None


def parse_tool_calls(response: str) -> list[dict | None]:
    """回答里的全部调用；没有 ``<tool_call>`` 标签时把全文当作一次调用。"""
    return [parse_call(span.strip()) for span in TOOL_SPAN.findall(response) or [response]]
