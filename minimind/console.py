"""给人看的输出：只有主进程说话；有终端就画进度条，没有终端就按时打印一行；还要多久由最近的步时估计。"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from statistics import fmean, median
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")
WINDOW = 50  # 步时只看最近这么多步：机器忙闲变化、序列长短变化都跟得上

# 进度与日志走 stderr，stdout 只留给命令的结果，方便管道
console = Console(stderr=True, highlight=False, soft_wrap=True)


def is_main_process() -> bool:
    """torchrun 下只有 RANK 0 打印；单进程总是主进程。"""
    return int(os.environ.get("RANK", "0")) == 0


def say(message: str) -> None:
    """主进程打印一行；文本原样输出，不解释 rich 标记。"""
    if is_main_process():
        console.print(message, markup=False)


def format_duration(seconds: float) -> str:
    """秒数写成人读的时长：``45 秒``、``3 分 05 秒``、``2 小时 07 分``。"""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} 秒"
    minutes, rest = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes} 分 {rest:02d} 秒"
    return f"{minutes // 60} 小时 {minutes % 60:02d} 分"


class LineProgress:
    """没有终端时的进度：至多每 ``every`` 秒打印一行，含剩余时间。"""

    def __init__(self, description: str, total: float | None, unit: str, every: float = 10.0):
        self.description, self.total, self.unit, self.every = description, total, unit, every
        self.done, self.start = 0.0, time.monotonic()
        self.last = self.start

    def advance(self, amount: float = 1) -> None:
        self.done += amount
        now = time.monotonic()
        if now - self.last < self.every:
            return
        self.last = now
        line = f"{self.description}：{self.done:,.0f}"
        if self.total:
            left = (now - self.start) / self.done * max(self.total - self.done, 0) if self.done else 0
            line += f"/{self.total:,.0f} {self.unit}，剩余约 {format_duration(left)}"
        say(line)


class BarProgress:
    """有终端时的 rich 进度条。"""

    def __init__(self, bar: Progress, description: str, total: float | None):
        self.bar, self.task = bar, bar.add_task(description, total=total)

    def advance(self, amount: float = 1) -> None:
        self.bar.advance(self.task, amount)


_bars: list[Progress] = []  # 正在显示的进度条；终端底部只放得下一条，嵌套的里层改为按时打印


@contextmanager
def progress(
    description: str, total: float | None = None, unit: str = "项", *, lines: bool = True
) -> Iterator[LineProgress | BarProgress]:
    """``with progress("分词", total=n) as bar: bar.advance(k)``；非主进程什么也不显示。

    ``lines=False``：没有终端时也不打印，给自己已经在打印日志的循环用。
    """
    if not is_main_process():
        yield LineProgress(description, total, unit, every=float("inf"))
    elif not console.is_terminal or _bars:
        yield LineProgress(description, total, unit, every=10.0 if lines else float("inf"))
    else:
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit)]
        with Progress(
            *columns, TimeElapsedColumn(), TextColumn("剩余"), TimeRemainingColumn(), console=console
        ) as bar:
            _bars.append(bar)
            try:
                yield BarProgress(bar, description, total)
            finally:
                _bars.remove(bar)


def track(items: Iterable[T], description: str, total: float | None = None, unit: str = "项") -> Iterator[T]:
    """边遍历边显示进度。"""
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    with progress(description, total, unit) as bar:
        for item in items:
            yield item
            bar.advance()


class Meter:
    """记每步用时，以及验证、存盘这些“停顿”的用时。

    Args:
        eval_guess: 还没验证过时，对一次验证用时的猜测（以训练步数计）。
    """

    def __init__(self, eval_guess_steps: float = 0.0):
        self.steps: deque[float] = deque(maxlen=WINDOW)
        self.pauses: dict[str, list[float]] = {"eval": [], "save": [], "compile": []}
        self.eval_guess_steps = eval_guess_steps
        self.seen = 0
        self.mark = self.start = time.perf_counter()

    def lap(self) -> float:
        """一步结束：返回这一步的秒数（不含其间的停顿）。"""
        now = time.perf_counter()
        seconds, self.mark = now - self.mark, now
        self.seen += 1
        # 第一步含编译、缓存预热，不代表以后；有了别的就丢掉它
        if self.seen == 2:
            self.steps.clear()
        self.steps.append(seconds)
        return seconds

    @contextmanager
    def pause(self, kind: str) -> Iterator[None]:
        """里面的时间不算在训练速度里；验证与存盘还会再有，算进剩余时间，编译只有一次，不算。"""
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self.pauses[kind].append(seconds)
            self.mark += seconds

    def seconds_left(self, steps: int, evals: int, saves: int) -> float:
        """还要多久：剩余步数 × 最近的平均步时 + 剩余验证与存盘次数 × 各自的典型用时。"""
        per_step = fmean(self.steps) if self.steps else 0.0
        eval_seconds = self.pauses["eval"][-5:] or [self.eval_guess_steps * per_step]
        save_seconds = self.pauses["save"][-5:] or [0.0]
        return steps * per_step + evals * median(eval_seconds) + saves * median(save_seconds)

    def elapsed(self) -> float:
        """从建立到现在的秒数。"""
        return time.perf_counter() - self.start
