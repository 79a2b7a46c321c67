"""训练循环看得到的一切：配方的记录（一个配方一份）、数据的记录、一次训练的状态；另有预训练、SFT 一族共用的损失和它的分母。

状态怎么建起来见 :mod:`minimind.trainer.setup`，怎么存盘见 :mod:`minimind.trainer.archive`。
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from minimind.console import Meter
from minimind.dataset.collate import model_inputs
from minimind.model import MiniMindConfig
from minimind.runtime.device import DTYPES, stat_dtype
from minimind.runtime.distributed import all_reduce_sum, world_size
from minimind.trainer.journal import Journal
from minimind.trainer.progress import Progress
from minimind.trainer.vital_signs import VitalSigns

Batch = dict[str, Any]
Window = list[tuple[list[int], Batch]]  # 一次更新的各微批次：（样本编号，批）；编号为空的是凑数的批
LossResult = tuple[Tensor, dict[str, Any]]


def language_model_loss(model: nn.Module, batch: Batch) -> LossResult:
    """预训练与 SFT 的损失：目标词元上的交叉熵之和，混合专家再加负载均衡损失（乘目标数，与前者同一口径）。"""
    out = model(**model_inputs(batch, "labels", "loss_weights"), return_logits=False)
    ce, aux = out.loss_sum, out.aux_loss * out.target_count
    if not aux.requires_grad:  # 稠密模型，或不在训练
        return ce, {}
    return ce + aux, {"ce": ce.detach(), "aux_loss": aux.detach()}


def count_targets(batch: Batch) -> float:
    """一个微批次里的目标词元数；有 ``loss_weights`` 时是权重之和。在 CPU 上数，不惊动加速卡。"""
    is_target = batch["labels"][:, 1:] != -100  # 第 0 列没有前文，永远不是目标
    if "loss_weights" in batch:
        return float((batch["loss_weights"][:, 1:] * is_target).sum())
    return float(is_target.sum())


@dataclass(frozen=True)
class Data:
    """训练集与验证集：有 ``len`` 与下标；``val`` 为 ``None`` 不验证。"""

    train: Any
    val: Any = None


@dataclass(frozen=True)
class Recipe:
    """一个配方：损失、它的分母、批怎么拼，必有；其余各是一处与众不同。

    Args:
        name: 配方的名字，写进旁注与存档。
        loss: ``(model, batch) -> (loss_sum, metrics)``。``loss_sum`` 是目标上的损失 *之和*（0 维张量），除以全局的分母
            才是损失；``metrics`` 的每一项也是目标上的和（同一个分母），或自带分母的 ``(和, 个数)``。
        collate: 把若干样本拼成一个微批次；送得进另起的进程（模块里的函数、``partial``、对象的方法）。
        count: 在 CPU 上数一个微批次的目标数，即损失的分母。
        prepare: ``prepare(run, window)``（``run`` 是 :class:`Run`）把取到的一窗微批次变成若干窗，每窗更新一次权重；强化学习在这里采样、打分，
            一步之内可以更新几次。可以是生成器：下一窗开始时上一窗已经更新完。各进程给出的窗数必须相同；
            过程中的指标用 :meth:`Run.record` 记下。默认就用取到的那一窗。
        health: 每行日志之后调用 ``health(record)``，返回的每一句是发现的毛病，照样打印。
        on_eval: 每次验证后在主进程调用 ``on_eval(model, step)``，返回的数是指标，一并记录；另可带着
            :data:`minimind.trainer.exhibits.EXHIBITS` 里的几样，随样例一起看。
        extra_state: 配方自己要存进续训存档的对象，有 ``state_dict``（给出拷贝）与 ``load_state_dict``。
        identity: 数据与分词器之外，结果还依赖哪些文件：``{"教师": 内容的指纹}``；写进存档，续训时核对。
        weights: 权重写到哪里，默认 ``{save_dir}/{save_weight}_{hidden_size}[_moe].pth``。
        weights_of: ``weights_of(model)`` 给出要存为权重的张量（只存适配器、只存策略……），默认全部。
        lr_scales: 参数名的前缀 → 学习率的倍数，例如 ``{"critic.": 2.0}``。
    """

    name: str
    loss: Callable[[nn.Module, Batch], LossResult]
    collate: Callable[[list[Any]], Batch]
    count: Callable[[Batch], float] = count_targets
    prepare: Callable[[Any, Window], Iterable[Window]] | None = None
    health: Callable[[dict[str, float]], list[str]] | None = None
    on_eval: Callable[[nn.Module, int], dict[str, Any]] | None = None
    extra_state: Mapping[str, Any] = field(default_factory=dict)
    identity: Mapping[str, str] = field(default_factory=dict)
    weights: Path | None = None
    weights_of: Callable[[nn.Module], Mapping[str, Tensor]] | None = None
    lr_scales: Mapping[str, float] = field(default_factory=dict)

    @property
    def cross_entropy(self) -> bool:
        """损失就是每个目标词元的交叉熵，瞎猜时等于 ln V。"""
        return self.loss is language_model_loss


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
        vitals: 体征；meter: 速度与剩余时间；journal: 日志。
        samples: 每次验证答一遍的样例（:class:`minimind.trainer.samples.Sampler`）；不要样例时没有。
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
    samples: Any = None
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
    def reads_late(self) -> bool:
        """一次更新的数晚一步读（:mod:`minimind.trainer.tally`）：只在一张 CUDA 卡上。float16 的缩放器自己要读；有 ``prepare`` 的
        （强化学习……）采样、打分反正每步要读；几张卡时有的会比卡住的那张先走一步，收到信号就存不成；MPS、NPU 没有试过。"""
        plain = not self.scaler.is_enabled() and self.recipe.prepare is None
        return self.device.type == "cuda" and plain and world_size() == 1

    @property
    def config(self) -> MiniMindConfig:
        """模型的配置。"""
        return self.model.config

    @property
    def compiled(self) -> Any:
        """编译的包装（:class:`minimind.trainer.compiling.CompiledBlocks`）；不编译时是 ``None``。"""
        inner = self.wrapped.module if isinstance(self.wrapped, DistributedDataParallel) else self.wrapped
        return None if inner is self.model else inner

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
