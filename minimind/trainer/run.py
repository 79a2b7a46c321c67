"""一次训练的状态：循环看得到的一切都在这里，怎么存盘也在这里；怎么建起来见 :mod:`minimind.trainer.setup`。"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from minimind.model import MiniMindConfig
from minimind.runtime import checkpoint, distributed
from minimind.runtime.device import rng_state, stat_dtype
from minimind.trainer import history, resume
from minimind.trainer.journal import Journal
from minimind.trainer.meter import Meter
from minimind.trainer.progress import Progress
from minimind.trainer.recipe import Data, Recipe
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
        device, dtype: 设备与计算精度。
        numerics: 设备、精度、矩阵乘峰值、线程数；写进存档供续训沿用。
        state: 走到哪里。
        vitals: 体征；meter: 速度与剩余时间；journal: 日志。
    """

    args: Any
    recipe: Recipe
    data: Data
    tokenizer: Any
    model: nn.Module
    wrapped: nn.Module
    optimizer: Any
    scaler: torch.amp.GradScaler
    device: torch.device
    dtype: torch.dtype
    numerics: dict[str, Any]
    state: Progress
    vitals: VitalSigns
    meter: Meter
    journal: Journal

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
        totals = distributed.all_reduce_sum(values.to(self.device)).tolist()
        interval = self.state.interval
        for name, pair in zip(metrics, totals):
            for part, value in zip(("sum", "count"), pair):
                interval[f"{name}/{part}"] = interval.get(f"{name}/{part}", 0.0) + value

    # ------------------------------------------------------------ 存盘

    def snapshot(self) -> dict[str, Any]:
        """权重与优化器之外、这一刻的全部：进度、本进程的随机数、配方状态；都是拷贝，此后怎么走都不变。"""
        return {
            "step": self.state.step,
            "progress": asdict(self.state),
            "rng": rng_state(self.device),
            "vitals": self.vitals.state_dict(),
            "recipe_state": {name: part.state_dict() for name, part in self.recipe.extra_state.items()},
        }

    def save(self) -> None:
        """存权重与续训存档；多进程时只有主进程写，写不成则一起停。"""
        snapshot = self.snapshot()
        rng = distributed.gather_objects(snapshot["rng"])
        distributed.on_main(lambda: self.write(snapshot, rng))
        self.state.saved_step = self.state.step

    def write(self, snapshot: dict[str, Any], rng: list[dict[str, Any]]) -> None:
        """把此刻的权重、优化器与 ``snapshot`` 写盘；``rng`` 是各进程的随机数状态。"""
        args, recipe, progress = self.args, self.recipe, dict(snapshot["progress"])
        if args.keep_checkpoints > 1 and progress["step"] not in progress["kept"]:
            progress["kept"] = [*progress["kept"], progress["step"]]
        what = recipe.weights_of(self.model) if recipe.weights_of else self.model
        checkpoint.save_weights(what, recipe.weights, self.sidecar())
        checkpoint.lm_checkpoint(
            self.config,
            args.save_weight,
            model=self.model,
            optimizer=self.optimizer,
            epoch=progress["epoch"],
            step=progress["step"],
            wandb=self.journal.tracker,
            save_dir=args.checkpoint_dir,
            scaler=self.scaler,
            progress=progress,
            rng=rng,
            numerics=self.numerics,
            identity=resume.identity_of(recipe, self.data, self.tokenizer),
            vitals=snapshot["vitals"],
            val_identity=resume.val_identity(self.data),
            args=resume.options_of(args),
            lr_scales=dict(recipe.lr_scales),
            total_steps=self.state.total_steps,
            train_loss=self.state.train_loss,
            metrics=self.state.metrics,
            recipe_state=snapshot["recipe_state"],
        )
        if args.keep_checkpoints > 1:
            self.state.kept = history.keep_recent(self, progress["kept"])

    def sidecar(self) -> dict[str, Any]:
        """权重旁边的 JSON：聊天、服务、导出与下一阶段靠它认尺寸。"""
        return {
            "config": checkpoint.config_dict(self.config),
            "tokenizer_hash": resume.tokenizer_hash(self.tokenizer),
            "recipe": self.recipe.name,
            "step": self.state.step,
            "epoch": self.state.epoch,
            "metrics": {"train_loss": self.state.train_loss, **self.state.metrics},
            "options": resume.public_options(self.args),
        }
