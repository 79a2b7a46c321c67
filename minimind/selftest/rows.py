"""自检的骨架：一行查一件事，给出若干个数与各自的限度；出错、不适用、时间不够都如实写明，没有悄悄算过的行。"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

PASSED, FAILED, SKIPPED, UNTESTED = "✓", "✗", "—", "…"


@dataclass(frozen=True)
class Measure:
    """一个数与它的限度；限度都是 None 的只供参考，不参与判定。

    Args:
        name: 中文名，含单位。
        value: 测到的数；不是有限数就算不合格。
        low, high: 至少、至多。
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None

    @property
    def judged(self) -> bool:
        return self.low is not None or self.high is not None

    @property
    def ok(self) -> bool:
        inside = (self.low is None or self.value >= self.low) and (
            self.high is None or self.value <= self.high
        )
        return math.isfinite(self.value) and inside

    def __str__(self) -> str:
        text = f"{self.name} {_short(self.value)}"
        if self.high is not None:
            text += f"{'≤' if self.value <= self.high else '>'}{_short(self.high)}"
        if self.low is not None and (self.high is None or self.value < self.low):
            text += f"{'≥' if self.value >= self.low else '<'}{_short(self.low)}"
        return text


def _short(value: float) -> str:
    """写短些：``1.2e-6``、``0.016``、``1,234``。"""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) >= 0.01:
        return f"{value:.3g}"
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


@dataclass
class Outcome:
    """一项检查的结果：几个数，外加一句可有可无的说明。"""

    measures: Sequence[Measure]
    note: str = ""


class NotApplicable(Exception):
    """这一行在这台机器上无从谈起；消息就是原因。"""


@dataclass(frozen=True)
class Check:
    """一项检查。

    Args:
        group, name: 表里的组与行名，合起来不重复。
        run: 做这项检查；抛 :class:`NotApplicable` 表示不适用，抛别的都算不合格。
        seconds: 头一次做之前猜它要多久；同组做过一项之后，按最近一项的用时。
    """

    group: str
    name: str
    run: Callable[[], Outcome]
    seconds: float = 0.0


@dataclass
class ResultRow:
    """表里的一行：``status`` 是 ✓、✗、—（不适用）、…（时间到，没测）之一。"""

    group: str
    name: str
    status: str
    measures: Sequence[Measure] = field(default_factory=list)
    note: str = ""
    seconds: float = 0.0


def run_check(check: Check) -> ResultRow:
    """做一项检查；里面出什么错都变成 ✗ 与一句原因，别的行照做。"""
    start = time.perf_counter()
    measures: Sequence[Measure] = ()
    try:
        outcome = check.run()
        measures, note = outcome.measures, outcome.note
        if not any(measure.judged for measure in measures):
            raise RuntimeError("这一行没有给出可以判定的数")
        status = PASSED if all(measure.ok for measure in measures) else FAILED
    except NotApplicable as reason:
        status, note = SKIPPED, str(reason)
    except Exception as error:  # 没见过的设备上什么都可能抛，一行坏了不能连累别的行
        status, note = FAILED, one_line(error)
    return ResultRow(check.group, check.name, status, measures, note, time.perf_counter() - start)


def one_line(error: BaseException) -> str:
    """异常 → 一行：类型与第一句不空的话。"""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}：{lines[0][:160]}" if lines else type(error).__name__


def run_checks(
    checks: Sequence[Check],
    budget: float,
    tell: Callable[[int, ResultRow], None] = lambda number, row: None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[ResultRow]:
    """依次做完；剩下的时间不够做下一项（按同组最近一项的用时估计）就记“未测：时间到”。

    Args:
        budget: 一共多少秒。
        tell: 每出一行叫一次 ``tell(第几行, 行)``，显示进度用。
    """
    start, last, rows = clock(), {}, []
    for number, check in enumerate(checks, start=1):
        if clock() - start + last.get(check.group, check.seconds) > budget:
            row = ResultRow(check.group, check.name, UNTESTED, note="未测：时间到")
        else:
            row = run_check(check)
            if row.status != SKIPPED:
                last[check.group] = row.seconds
        rows.append(row)
        tell(number, row)
    return rows
