"""速度、利用率与剩余时间：只用最近的步估计，把验证与存盘的时间也算进去。"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import fmean, median

WINDOW = 50  # 只看最近这么多步：机器忙闲变化、序列长短变化都跟得上


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


def events_left(step: int, total: int, interval: int) -> int:
    """从第 ``step`` 步之后到 ``total`` 步为止，“每 interval 步一次、结束时必有一次”的事还会发生几次。"""
    if step >= total:
        return 0
    if interval <= 0:
        return 1
    regular = total // interval - step // interval
    return regular + (total % interval != 0)
