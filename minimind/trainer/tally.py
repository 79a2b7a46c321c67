"""账本：一次更新的数（损失、梯度范数、停不停）读到主机上，按次序入账；坏的一步在这里说出来。

在卡上读一个数，主机要等排着的活都做完，下一步才排得上去，卡就空等。所以 CUDA 上晚一步读（:attr:`Run.reads_late`）：
第 n 步排上去就开始往回拷，等第 n+1 步也排上去了才看，那时早就到了；走不走这一步由卡自己定
（:func:`minimind.trainer.step.update_weights`）。记录、存盘、验证、停，要准数的地方都先读完。
别处每次更新当场就读，是“至多留零次没有读”，同一个写法。
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from minimind.console import say
from minimind.dataset.base import source_words
from minimind.errors import UserError
from minimind.runtime.distributed import gather_objects, on_main
from minimind.trainer.progress import TrainState
from minimind.trainer.recipe import Run, Window

# 连续这么多步不是有限数就停：偶尔一步可能是坏样本，接连三步说明训练已经发散
MAX_NONFINITE_IN_ROW = 3


@dataclass
class Update:
    """一次更新的数，各进程合起来；建好就开始往主机拷，用 :attr:`numbers` 时才等它到。

    step: 第几步，从 1 数；window: 用掉的一窗微批次；micro_losses: 本进程每个微批次的损失和，0 维，在设备上；
    names, totals: 各项的名字与和（``loss count tokens context stop``、各项 metrics、``grad_norm``），``[len(names)]``，在设备上；
    overflow: float16 的梯度溢出，缩放器照例处理，不算坏。
    """

    step: int
    window: Window
    micro_losses: list[Tensor]
    names: list[str]
    totals: Tensor
    overflow: bool = False

    def __post_init__(self) -> None:
        self.host, self.arrived = start_copy(self.totals)

    @cached_property
    def on_device(self) -> dict[str, Tensor]:
        """各项之和，0 维，还在设备上。"""
        return dict(zip(self.names, self.totals.unbind()))

    @cached_property
    def numbers(self) -> dict[str, float]:
        """各项之和，在主机上；还没拷到就等。"""
        if self.arrived is not None:
            self.arrived.synchronize()
        return dict(zip(self.names, self.host.tolist()))

    @property
    def finite(self) -> bool:
        """损失与梯度都是有限数。"""
        return math.isfinite(self.numbers["loss"]) and math.isfinite(self.numbers["grad_norm"])

    @property
    def bad(self) -> bool:
        """有目标，而损失或梯度不是有限数：没有走的一步。"""
        return self.numbers["count"] > 0 and not self.finite and not self.overflow


def start_copy(values: Tensor) -> tuple[Tensor, Any]:
    """开始把 ``values`` 拷到主机：CUDA 上不等（锁页内存，由 torch 分配），返回主机上的张量与拷完的记号；别处当场拷完，没有记号。"""
    if values.device.type != "cuda":
        return values.cpu(), None
    host = values.to("cpu", non_blocking=True)
    arrived = torch.cuda.Event(blocking=True)  # 等的时候不占着核，读数据的子进程用得上
    arrived.record()
    return host, arrived


class Tally:
    """还没有读的更新：晚一步读时至多一次，否则一次也没有。

    Attributes:
        stopping: 入了账的更新里，有进程收到了退出信号；各进程读的是同样的数，同时知道。
    """

    def __init__(self, run: Run):
        self.run, self.unread = run, []
        self.depth = int(run.reads_late)
        self.stopping = False

    def add(self, update: Update) -> None:
        """记下刚排上去的一次更新，读出在它之前的（不晚读的，连它也读）。"""
        self.unread.append(update)
        self.settle(self.depth)

    def settle(self, leave: int = 0) -> None:
        """按次序入账，至多留下 ``leave`` 次没有读；坏的说出来，连续三次就停。"""
        while len(self.unread) > leave:
            update = self.unread.pop(0)
            account(self.run.state, update)
            self.stopping = self.stopping or update.numbers["stop"] > 0
            if update.bad:
                report_nonfinite(self.run, update)


def account(state: TrainState, update: Update) -> None:
    """一次更新并入 ``state``：本记录区间的和（不是有限数的不计入）、跳过与没有梯度的次数、词元数、连续几步坏。"""
    sums, interval = update.numbers, state.interval
    if sums["count"] > 0:
        state.nonfinite_in_row = state.nonfinite_in_row + 1 if update.bad else 0
        if update.finite and sums["grad_norm"] == 0.0:
            interval["zero_grad"] = interval.get("zero_grad", 0.0) + 1
    for key, value in sums.items():
        if update.finite and key != "stop":
            interval[key] = interval.get(key, 0.0) + value
    interval["steps"] = interval.get("steps", 0.0) + update.finite
    interval["skipped"] = interval.get("skipped", 0.0) + (not update.finite)
    state.tokens += sums["tokens"]


def report_nonfinite(run: Run, update: Update) -> None:
    """不是有限数：说出步数与样本编号；连续三次就停，上一个好的存档还在。"""
    state, everything_finite = run.state, math.isfinite(update.numbers["loss"])
    suspects = [  # 损失都好、只有梯度坏：整窗都有嫌疑
        sample
        for (ids, _), loss in zip(update.window, update.micro_losses)
        for sample in ids
        if everything_finite or not bool(torch.isfinite(loss))
    ]
    samples = sorted(sample for part in gather_objects(suspects) for sample in part)
    names = "、".join(map(str, samples[:16])) + (f" 等 {len(samples)} 个" if len(samples) > 16 else "")
    if hasattr(run.data.train, "source_lines"):
        names += f"（{source_words(run.data.train, samples[:16])}）"
    what = "梯度范数" if everything_finite else "损失"
    say(f"第 {update.step} 步的{what}不是有限数，这一步不更新权重；涉及的样本：{names}。")
    if state.nonfinite_in_row >= MAX_NONFINITE_IN_ROW:
        rescue = f"；第 {state.saved_step} 步的存档完好，可加 --from_resume 1 从那里继续"
        rescue = rescue if state.saved_step > 0 else ""
        stopped = UserError(
            f"连续 {MAX_NONFINITE_IN_ROW} 步的{what}不是有限数，训练停止",
            where=f"第 {update.step} 步，样本 {names}",
            fix=f"降低 --learning_rate 或检查这些样本{rescue}",
        )

        def stop_all() -> None:
            raise stopped

        on_main(stop_all)
