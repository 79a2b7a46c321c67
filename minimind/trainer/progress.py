"""训练走到哪里：步数、轮次、样本位置与它们之间的换算；位置按全局样本数记，与进程数无关。"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from minimind.trainer.schedule import lr_at


@dataclass
class TrainState:
    """训练走到哪里了；整个存进续训存档。

    epoch: 正在第几轮（从 0 数）；samples: 本轮已用的全局样本数；step: 完成的优化步数；
    lr: 最近一步的学习率；seconds: 累计用时；tokens: 累计有效（非填充）词元；nonfinite_in_row: 连续多少步不是有限数；
    kept: 另外留着存档的那些步；
    interval: 上一行日志以来的各项之和，存下来才能让续训后的日志与没中断时一样。
    """

    epoch: int = 0
    samples: int = 0
    step: int = 0
    lr: float = 0.0
    seconds: float = 0.0
    tokens: float = 0.0
    nonfinite_in_row: int = 0
    kept: list[int] = field(default_factory=list)
    interval: dict[str, float] = field(default_factory=dict)


class Progress:
    """由参数、行数与进程数推出总步数、下一窗的大小、学习率。

    Args:
        args: 需要 ``epochs max_steps batch_size accumulation_steps`` 与学习率日程的参数。
        rows: 训练集的行数。
        world_size: 进程数。
        state: 从哪里开始；随训练就地更新。
    """

    def __init__(self, args: Any, rows: int, world_size: int, state: TrainState):
        self.args, self.rows, self.state = args, rows, state
        self.global_batch = args.batch_size * world_size  # 一个全局微批次的样本数
        self.total_steps = self._count_steps()

    def _steps(self, samples: int) -> int:
        """这么多样本要走多少个优化步；末尾不满的窗口也算一步。"""
        return math.ceil(math.ceil(samples / self.global_batch) / self.args.accumulation_steps)

    def _count_steps(self) -> int:
        epochs_left = self.args.epochs - self.state.epoch
        left = 0
        if epochs_left > 0:
            left = self._steps(self.rows - self.state.samples) + (epochs_left - 1) * self._steps(self.rows)
        total = self.state.step + left
        return min(total, self.args.max_steps) if self.args.max_steps else total

    def window_size(self) -> tuple[int, int]:
        """下一个优化步的（微批次数，全局样本数）；一轮的末尾可能不满。"""
        left = self.rows - self.state.samples
        micro = min(self.args.accumulation_steps, math.ceil(left / self.global_batch))
        return micro, min(left, micro * self.global_batch)

    def learning_rate(self, samples: int) -> float:
        """即将走的这一步的学习率：按样本进度（换了进程数也不跳），由 ``--max_steps`` 截断时按步数进度。"""
        args, state = self.args, self.state
        if args.max_steps and self.total_steps == args.max_steps:
            position = (state.step + 0.5, args.max_steps)
        else:
            done = state.epoch * self.rows + state.samples + samples / 2
            position = (done, args.epochs * self.rows)
        return lr_at(
            *position,
            peak=args.learning_rate,
            schedule=args.schedule,
            warmup_ratio=args.warmup_ratio,
            decay_ratio=args.decay_ratio,
        )

    def advance(self, samples: int) -> None:
        """一步走完：样本位置前移，到头则进入下一轮。"""
        state = self.state
        state.step += 1
        state.samples += samples
        if state.samples >= self.rows:
            state.epoch, state.samples = state.epoch + 1, 0

    @property
    def epoch_for_people(self) -> int:
        """从 1 数的轮次；一轮刚走完时仍说是那一轮。"""
        return self.state.epoch + (self.state.samples > 0 or self.state.step == 0)
