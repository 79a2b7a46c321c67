"""配方的记录：训练循环要知道的一切，一个配方一份；另有数据的记录，与预训练、SFT 一族共用的损失和它的分母。"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from minimind.dataset.collate import model_inputs

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
        prepare: ``prepare(run, window)``（``run`` 是 :class:`minimind.trainer.run.Run`）把取到的一窗微批次变成若干窗，每窗更新一次权重；强化学习在这里采样、打分，
            一步之内可以更新几次。可以是生成器：下一窗开始时上一窗已经更新完。各进程给出的窗数必须相同；
            过程中的指标用 :meth:`minimind.trainer.run.Run.record` 记下。默认就用取到的那一窗。
        health: 每行日志之后调用 ``health(record)``，返回的每一句是发现的毛病，照样打印。
        on_eval: 每次验证后在主进程调用 ``on_eval(model, step)``，返回的指标一并记录；另可带着
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
