"""一次训练的状态：循环看得到的一切。怎么建起来见 :mod:`minimind.trainer.setup`，怎么存盘见 :mod:`minimind.trainer.archive`。"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from minimind.model import MiniMindConfig
from minimind.runtime.device import DTYPES, stat_dtype
from minimind.runtime.distributed import all_reduce_sum
from minimind.trainer.meter import Meter
from minimind.trainer.progress import Progress
from minimind.trainer.recipe import Data, Recipe
from minimind.trainer.samples import Sampler
from minimind.trainer.tracking import Journal
from minimind.trainer.vital_signs import VitalSigns


@dataclass
class Run:
    """一次训练。

    Args:
        args: 命令行参数，:class:`minimind.trainer.train_args.TrainArguments` 或其子类。
        recipe: 配方；``weights`` 已经定下。
        data: 训练集与验证集。
        tokenizer: 算每字节比特数与指纹用，可以没有。
        model: 没有包装的模型，存档的键名因此干净。
        wrapped: 训练时前向的那个：编译在里、DDP 在外。
        optimizer: 优化器；scaler: float16 的梯度缩放器，别的精度下是直通的。
        numerics: 设备、精度、矩阵乘峰值、线程数；写进存档供续训沿用。
        state: 走到哪里。
        vitals: 体征；meter: 速度与剩余时间；journal: 日志；samples: 每次验证答一遍的样例。
        exhibits: 配方这一步放在这里、随下一次样例一起看的：强化学习采样里最好、居中、最差的回答。
    """

    args: Any
    recipe: Recipe
    data: Data
    tokenizer: Any
    model: nn.Module
    wrapped: nn.Module
    optimizer: Any
    scaler: torch.amp.GradScaler
    numerics: dict[str, Any]
    state: Progress
    vitals: VitalSigns
    meter: Meter
    journal: Journal
    samples: Sampler
    exhibits: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """模型所在的设备。"""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """计算精度。"""
        return DTYPES[self.numerics["dtype"]]

    @property
    def config(self) -> MiniMindConfig:
        """模型的配置。"""
        return self.model.config

    @property
    def evaluates(self) -> bool:
        """期间有没有验证要做。"""
        return self.data.val is not None or self.recipe.on_eval is not None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exc_info) -> None:
        """松开 DDP：它要在进程组解散之前析构，见 :func:`minimind.runtime.distributed.shutdown_distributed`。"""
        self.wrapped = None

    def record(self, **metrics: tuple[float, float]) -> None:
        """记下这一步的指标，供配方的 ``prepare`` 用：``run.record(reward=(和, 个数))``。

        各进程的和与个数分别相加，记录时是区间里的平均。每个进程都要调用，键与次序相同。
        """
        if not metrics:
            return
        values = torch.tensor(
            [list(map(float, pair)) for pair in metrics.values()], dtype=stat_dtype(self.device)
        )
        totals = all_reduce_sum(values.to(self.device)).tolist()
        interval = self.state.interval
        for name, pair in zip(metrics, totals):
            for part, value in zip(("sum", "count"), pair):
                interval[f"{name}/{part}"] = interval.get(f"{name}/{part}", 0.0) + value
