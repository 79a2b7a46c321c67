"""演示的步调：什么精度最快、全程要多久、慢的机器上少走几步。"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from minimind.console import format_duration, say

# 少走也不少于安排的几成：再少，后面的段没有像样的起点
LEAST = 0.3


def fit_pace(seconds: Callable[[float], float], budget: float) -> float:
    """各段走安排的几成，才在 ``budget`` 秒里走得完；1 是走满，最少 ``LEAST``。

    Args:
        seconds: 走几成 → 预计多少秒，越多越久。
    """
    if seconds(1.0) <= budget:
        return 1.0
    low, high = LEAST, 1.0
    while high - low > 0.005:
        middle = (low + high) / 2
        low, high = (middle, high) if seconds(middle) <= budget else (low, middle)
    return round(low, 2)


@dataclass
class Timetable:
    """全程的预计用时：各步先给估计，走完一步就用实际用时换掉，并按快慢修正剩下的。

    Args:
        estimates: 阶段 → 秒。
        speed: 测得的速度，词元/秒。
    """

    estimates: dict[str, float]
    speed: float
    start: float = field(default_factory=time.perf_counter)
    actual: dict[str, float] = field(default_factory=dict)
    expected: float = field(init=False)

    def __post_init__(self) -> None:
        #: 一开始给出的全程用时，含建立时钟之前已花的
        self.expected = self.elapsed() + self.left()

    def left(self) -> float:
        """还要多少秒。"""
        return self.ratio() * sum(s for name, s in self.estimates.items() if name not in self.actual)

    def ratio(self) -> float:
        """走完的几段，实际用时是估计的几倍；还没有就是 1。"""
        done = sum(self.estimates[name] for name in self.actual)
        return sum(self.actual.values()) / done if done else 1.0

    def begin(self, name: str, title: str) -> None:
        number = list(self.estimates).index(name) + 1
        say(f"\n[{number}/{len(self.estimates)}] {title}（全程剩余约 {format_duration(self.left())}）")
        self._mark = time.perf_counter()

    def end(self, name: str) -> None:
        self.actual[name] = time.perf_counter() - self._mark

    def elapsed(self) -> float:
        return time.perf_counter() - self.start


def probe_speed(model, dataset, rows: int, row_length: int) -> tuple[str, float]:
    """选精度并测速：用真数据走几个完整的训练步，每步 ``rows`` 行。

    Returns:
        ``(精度的名字, 每秒多少个词元)``。
    """
    import torch

    from minimind.dataset import collate_packed
    from minimind.dataset.collate import to_device
    from minimind.runtime.device import autocast_context, choose_dtype, pick_threads, synchronize, time_call
    from minimind.trainer.optim import build_optimizer
    from minimind.trainer.recipe import count_targets, language_model_loss
    from minimind.trainer.train_args import TrainArguments

    device = next(model.parameters()).device

    def take(count: int) -> dict:
        return to_device(collate_packed([dataset[i % len(dataset)] for i in range(count)]), device)

    def step(dtype: torch.dtype, batch: dict, optimizer=None) -> None:
        with autocast_context(device, dtype):
            loss, _ = language_model_loss(model, batch)
        (loss / count_targets(batch)).backward()
        if optimizer is not None:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        synchronize(device)

    few, full = take(max(rows // 4, 1)), take(rows)
    if device.type == "cpu":
        pick_threads(lambda: step(torch.float32, few))
    dtype = choose_dtype("auto", device, lambda dtype: step(dtype, few))
    name = str(dtype).removeprefix("torch.")
    precision = name if dtype == torch.bfloat16 else "float32"
    optimizer = build_optimizer(model, TrainArguments(), newton_schulz_dtype=precision)
    # 全程走几成由它定：两次里最快的还会差两成，六次的才稳
    return name, rows * row_length / time_call(lambda: step(dtype, full, optimizer), repeats=6)
