"""演示的步调：什么精度最快、全程要多久。"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from minimind.console import format_duration, say


@dataclass
class Timetable:
    """全程的预计用时：各步先给估计，走完一步就用实际用时换掉，并按快慢修正剩下的。"""

    estimates: dict[str, float]
    start: float = field(default_factory=time.perf_counter)
    actual: dict[str, float] = field(default_factory=dict)
    expected: float = field(init=False)

    def __post_init__(self) -> None:
        #: 一开始给出的全程用时，含建立时钟之前已花的
        self.expected = self.elapsed() + self.left()

    def left(self) -> float:
        """还要多少秒。"""
        done = sum(self.estimates[name] for name in self.actual)
        ratio = sum(self.actual.values()) / done if done else 1.0
        return ratio * sum(seconds for name, seconds in self.estimates.items() if name not in self.actual)

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
    return name, rows * row_length / time_call(lambda: step(dtype, full, optimizer))
