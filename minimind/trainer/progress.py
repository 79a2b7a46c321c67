"""训练走到哪里、这一步多大的学习率：步数、轮次、样本位置与它们之间的换算；位置按全局样本数记，与进程数无关。"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


def lr_at(
    step: float,
    total: float,
    *,
    peak: float,
    schedule: str = "wsd",
    warmup_ratio: float = 0.02,
    decay_ratio: float = 0.3,
) -> float:
    """进度 ``step / total`` 处的学习率；纯函数。

    ``step`` 与 ``total`` 只看比值，单位随意：训练循环用样本数，进程数变了日程也不跳。循环取每个优化步的
    *中点*（例如第 0 步取 0.5），于是第一步不为零、最后一步也不为零，预热与衰减的面积恰好是线性的。

    Args:
        peak: 最高学习率。
        warmup_ratio: 线性预热占总量的比例。
        decay_ratio: ``wsd`` 末段线性衰减占总量的比例；从头平稳到尾取 0。

    Raises:
        ValueError: 不认识的 ``schedule``。
    """
    progress = min(max(step / total, 0.0), 1.0) if total > 0 else 1.0
    warm = min(1.0, progress / warmup_ratio) if warmup_ratio > 0 else 1.0
    if schedule == "wsd":
        shape = min(1.0, (1.0 - progress) / decay_ratio) if decay_ratio > 0 else 1.0
    elif schedule == "cosine":
        after_warmup = max(progress - warmup_ratio, 0.0) / max(1.0 - warmup_ratio, 1e-9)
        shape = 0.1 + 0.45 * (1.0 + math.cos(math.pi * after_warmup))
    else:
        raise ValueError(f"不认识的学习率日程 {schedule!r}，可选 wsd、cosine")
    return peak * min(warm, shape)


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


class Progress(TrainState):
    """走到哪里，加上由参数、行数与进程数推出的总步数、下一窗的大小、学习率；随训练就地更新。

    Args:
        args: 需要 ``epochs max_steps batch_size accumulation_steps``、学习率的日程、验证与存盘的间隔。
        rows: 训练集的行数。
        world_size: 进程数。
        saved: 存档里的 :class:`TrainState`；重新训练时没有。

    Attributes:
        saved_step: 哪一步刚存过盘，-1 还没有；train_loss: 最后一个记录区间的平均损失；
        metrics: 最后一次验证的结果。这三样另存，不随 :class:`TrainState`。
    """

    def __init__(self, args: Any, rows: int, world_size: int, **saved: Any):
        super().__init__(**saved)
        self.rows, self.epochs, self.max_steps = rows, args.epochs, args.max_steps
        self.global_batch = args.batch_size * world_size  # 一个全局微批次的样本数
        self.accumulation = args.accumulation_steps
        self.eval_interval, self.save_interval = args.eval_interval, args.save_interval
        names = ("schedule", "warmup_ratio", "decay_ratio")
        self.shape = {"peak": args.learning_rate, **{name: getattr(args, name) for name in names}}
        self.total_steps = self._count_steps()
        self.saved_step = self.step if saved else -1
        self.train_loss, self.metrics = math.nan, {}

    def _steps(self, samples: int) -> int:
        """这么多样本要走多少个优化步；末尾不满的窗口也算一步。"""
        return math.ceil(math.ceil(samples / self.global_batch) / self.accumulation)

    def _count_steps(self) -> int:
        epochs_left = self.epochs - self.epoch
        left = 0
        if epochs_left > 0:
            left = self._steps(self.rows - self.samples) + (epochs_left - 1) * self._steps(self.rows)
        total = self.step + left
        return min(total, self.max_steps) if self.max_steps else total

    def window_size(self) -> tuple[int, int]:
        """下一个优化步的（微批次数，全局样本数）；一轮的末尾可能不满。"""
        left = self.rows - self.samples
        micro = min(self.accumulation, math.ceil(left / self.global_batch))
        return micro, min(left, micro * self.global_batch)

    def learning_rate(self, samples: int) -> float:
        """即将走的这一步的学习率：按样本进度（换了进程数也不跳），由 ``--max_steps`` 截断时按步数进度。"""
        if self.max_steps and self.total_steps == self.max_steps:
            return lr_at(self.step + 0.5, self.max_steps, **self.shape)
        done = self.epoch * self.rows + self.samples + samples / 2
        return lr_at(done, self.epochs * self.rows, **self.shape)

    def advance(self, samples: int) -> None:
        """一步走完：样本位置前移，到头则进入下一轮。"""
        self.step += 1
        self.samples += samples
        if self.samples >= self.rows:
            self.epoch, self.samples = self.epoch + 1, 0

    def owes_evaluation(self) -> bool:
        """这一步走完该不该验证：到了间隔，或到了末尾。"""
        return self.step == self.total_steps or due(self.step, self.eval_interval)

    def pauses_left(self) -> tuple[int, int]:
        """还会有几次验证、几次存盘。"""
        intervals = self.eval_interval, self.save_interval
        evals, saves = (events_left(self.step, self.total_steps, interval) for interval in intervals)
        return evals, saves

    @property
    def epoch_for_people(self) -> int:
        """从 1 数的轮次；一轮刚走完时仍说是那一轮。"""
        return self.epoch + (self.samples > 0 or self.step == 0)


def due(step: int, interval: int) -> bool:
    """每 ``interval`` 步一次的事这一步该不该做；0 表示从不。"""
    return interval > 0 and step % interval == 0


def events_left(step: int, total: int, interval: int) -> int:
    """从第 ``step`` 步之后到 ``total`` 步为止，“每 interval 步一次、结束时必有一次”的事还会发生几次。"""
    if step >= total:
        return 0
    if interval <= 0:
        return 1
    regular = total // interval - step // interval
    return regular + (total % interval != 0)
