"""KTO 的损失与它的参考点 z0：偏好的一页（:mod:`minimind.recipes.dpo`）在 ``--loss_type kto`` 时用它。

z0 是策略离参考模型多远的估计：各条的提问接上别人的回答（:class:`minimind.dataset.KTODataset`），Δ 的平均，小于 0 记 0。
训练时它在更新之前由这一步的全部微批次、全部进程一起算出，所以批怎么切、卡怎么分都不改变结果；验证时按批各算各的。
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from minimind.dataset.collate import rows_between, to_device
from minimind.objectives.preference import kto_loss, sequence_logprobs
from minimind.runtime.device import autocast_context, stat_dtype
from minimind.runtime.distributed import all_reduce_sum
from minimind.trainer.recipe import Batch, LossResult, Run, Window


def count_answers(batch: Batch) -> float:
    """分母：这一批里的回答数。"""
    return float(len(batch["desirable"]))


def unpaired_loss(
    model: nn.Module, batch: Batch, args: Any, reference: nn.Module | None = None
) -> LossResult:
    """训练循环要的 ``(损失和, metrics)``，分母是回答数；参数同 :func:`minimind.recipes.dpo.dpo_loss`。"""
    size = len(batch["desirable"])
    kl = batch["kl"] if "kl" in batch else mean_at_least_zero(mismatched_ratios(model, batch, reference))
    own = rows_between(batch, 0, size)
    policy = sequence_logprobs(model, own)
    reference_logps = _reference_logps(batch, own, slice(0, size), reference)
    result = kto_loss(
        policy.logps - reference_logps,
        batch["desirable"],
        kl,
        beta=args.beta,
        desirable_weight=args.desirable_weight,
        undesirable_weight=args.undesirable_weight,
    )
    metrics = result.metrics(batch["desirable"], args.beta * kl)
    loss = result.losses.sum() + policy.aux_loss * size
    if args.sft_coef:  # 只加在好的回答上，按词元平均
        loss = loss - args.sft_coef * (policy.logps / policy.lengths.clamp_min(1))[batch["desirable"]].sum()
    return loss, metrics


@torch.no_grad()
def mismatched_ratios(model: nn.Module, batch: Batch, reference: nn.Module | None) -> Tensor:
    """``[B]``：不配对的回答上的 Δ。"""
    size, was_training = len(batch["desirable"]), model.training
    rows = rows_between(batch, size, 2 * size)
    model.eval()
    logps = sequence_logprobs(model, rows).logps
    model.train(was_training)
    return logps - _reference_logps(batch, rows, slice(size, 2 * size), reference)


def _reference_logps(batch: Batch, rows: Batch, part: slice, reference: nn.Module | None) -> Tensor:
    """参考模型给这些行的对数概率：批里带着的，或现算。"""
    if reference is None:
        return batch["reference_logps"][part]
    with torch.no_grad():
        return sequence_logprobs(reference, rows).logps


def mean_at_least_zero(ratios: Tensor) -> float:
    return max(float(ratios.mean()), 0.0)


def with_reference_point(reference: nn.Module | None) -> Callable[[Run, Window], Iterator[Window]]:
    """配方的 ``prepare``：先算出这一步的 z0，放进各微批次的 ``kl``，也记进日志。"""

    def prepare(run: Run, window: Window) -> Iterator[Window]:
        totals = torch.zeros(2, dtype=stat_dtype(run.device), device=run.device)
        for ids, batch in window:
            if ids:  # 凑数的批不算
                with autocast_context(run.device, run.dtype):
                    ratios = mismatched_ratios(run.model, to_device(batch, run.device), reference)
                totals += torch.stack([ratios.sum(), ratios.new_tensor(float(len(ratios)))])
        total, number = all_reduce_sum(totals).tolist()
        kl = max(total / max(number, 1.0), 0.0)
        run.record(kl=(kl, 1))
        yield [(ids, {**batch, "kl": kl}) for ids, batch in window]

    return prepare
