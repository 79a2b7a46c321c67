"""带工具的对话怎么打分：看结果对不对，另扣写坏的调用、多余与漏掉的调用、没收尾的标签、没写完。

=================  ==========================================================================
结果               0 到 1。记录有判分器（微世界）就用它；否则是 ``gt`` 里的值有几成出现在最后的回答里
−0.2 × 比例        不合说明的调用占全部调用的比例
−0.1 × 比例        多了或少了几次调用，与应有的次数相比，至多 1；应有 ``calls`` 次，没写就是 ``gt`` 的个数
−0.1               有没收尾的标签
−0.2               没写完（到了回合数或长度的上限）；没写完的也就没有回答，结果是 0
=================  ==========================================================================

各项都有界，答对总比答错强：全部扣满是 −0.6，答对而处处有毛病也有 0.6。没有 ``gt`` 也没有判分器的题只有扣分项，
要别的标准就再加一条奖励（``--reward agent,我的.py:函数``）或奖励模型。
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from minimind.answers import THOUSANDS, is_numeric, last_number, normalize, numbers_in
from minimind.dataset.jsonl import short
from minimind.errors import UserError
from minimind.rl.reward_rules import Sample

INVALID, GAP, UNCLOSED, UNFINISHED = 0.2, 0.1, 0.1, 0.2
LOWEST = -(INVALID + GAP + UNCLOSED + UNFINISHED)


def agent(sample: Sample) -> float:
    """一段对话的分数，见本文件开头的表。"""
    talk = sample.conversation
    if talk is None:
        raise ValueError("agent 只能给带工具的多轮对话打分（minimind agent）")
    score = outcome(sample.record, talk.answer) or 0.0
    calls, wrong = len(talk.calls), sum(problem is not None for problem in talk.problems)
    wrong += sum(talk.opening.tools.problem(call) is not None for call in talk.calls[len(talk.problems) :])
    expected = expected_calls(sample.record)
    score -= INVALID * wrong / max(calls, 1)
    score -= GAP * min(1.0, abs(calls - expected) / max(expected, 1))
    score -= UNCLOSED * talk.unclosed
    return score - UNFINISHED * sample.truncated


def outcome(record: dict[str, Any], answer: str) -> float | None:
    """最后的回答对了几成；没有判分器也没有 ``gt`` 的无从判断，是 ``None``。空的回答是 0。"""
    if "grader" in record and "answer" in record:
        from minimind.microworld.graders import grade  # 只有微世界的题用得上

        return grade(record, answer) if answer else 0.0
    wanted = expected_values(record)
    return share_found(answer, wanted) if wanted else None


def expected_values(record: dict[str, Any]) -> list[Any]:
    """``gt`` 里的各个值；公开数据写成列表，单独一个值也收。"""
    gt = record.get("gt")
    if gt is None or gt == "":
        return []
    return list(gt) if isinstance(gt, (list, tuple)) else [gt]


def check_expected(*datasets: Any) -> None:
    """每道题的 ``gt`` 都是能在回答里找的值，``calls`` 是次数；``None`` 的数据集跳过。

    别的值（对象、null、空串、只有标点）永远找不到，这道题就总是 0 分。

    Raises:
        UserError: 哪一行的哪个值。
    """
    for item in (item for dataset in datasets if dataset is not None for item in dataset):
        calls = item["record"].get("calls")
        if calls is not None and (type(calls) is not int or calls < 0):
            raise UserError(
                f"是 {short(calls)}",
                where=f"{item['source']}:{item['line']} 字段 calls",
                expected="应有几次调用，0 以上的整数；不写就按 gt 的个数",
                fix="改成整数，或去掉它",
            )
        check_grader(item)
        for value in expected_values(item["record"]):
            finite = type(value) in (str, int) or (type(value) is float and math.isfinite(value))
            if not finite or not normalize(str(value)):
                raise UserError(
                    f"有一个值是 {short(value)}",
                    where=f"{item['source']}:{item['line']} 字段 gt",
                    expected='数或不空的文字的列表，例如 ["319976"]；没有标准答案写 []',
                    fix="改成最后的回答里该出现的值，或去掉它",
                )


def check_grader(item: dict[str, Any]) -> None:
    """
    Raises:
        UserError: 这一行写着不认识的判分器：采样到它的那一步才出错，可能已经走了几千步。
    """
    if "grader" not in item["record"]:
        return
    from minimind.microworld.graders import GRADERS

    name = item["record"]["grader"]
    if not isinstance(name, str) or name not in GRADERS:
        raise UserError(
            f"是 {short(name)}",
            where=f"{item['source']}:{item['line']} 字段 grader",
            expected="、".join(GRADERS),
            fix="改成其中之一；不用判分器就去掉它，答案写在 gt 里",
        )


def expected_calls(record: dict[str, Any]) -> int:
    """应有几次调用：微世界的题写着，公开数据一个值一次。"""
    calls = record.get("calls")
    return calls if calls is not None else len(expected_values(record))


def share_found(text: str, wanted: Sequence[Any]) -> float:
    """``wanted`` 里有几成出现在文字里：是数的比数值（相对或绝对误差 1e-6），别的比归一化后的文字。"""
    numbers, plain = numbers_in(text), normalize(THOUSANDS.sub("", text))
    found = 0
    for value in wanted:
        want = str(value).strip()
        number = last_number(want) if is_numeric(want) else None
        if number is not None and re.fullmatch(r"[-+]?[\d,.]+", want):
            found += any(math.isclose(number, n, rel_tol=1e-6, abs_tol=1e-6) for n in numbers)
        else:
            found += bool(normalize(want)) and normalize(want) in plain
    return found / len(wanted)
