"""一个优化步：数全局目标词元，逐个微批次前向反向，裁剪并更新；不是有限数的步一位权重也不动。"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from minimind.dataset.collate import to_device
from minimind.runtime.device import autocast_context, stat_dtype
from minimind.runtime.distributed import all_reduce_sum, world_size
from minimind.runtime.interrupt import StopSignal
from minimind.trainer.recipe import Run, Window
from minimind.trainer.tally import Update


def forward_backward(run: Run, window: Window, stop: StopSignal) -> Update:
    """一窗微批次的前向反向；梯度留在参数上，已按全局目标数归一并反缩放。各项之和留在设备上，主机不等。"""
    recipe, precision = run.recipe, stat_dtype(run.device)
    counts = [recipe.count(batch) if ids else 0.0 for ids, batch in window]
    total = all_reduce_sum(torch.tensor(sum(counts), dtype=precision).to(run.device, non_blocking=True))
    scale = (world_size() / total.where(total > 0, 1.0)).float()

    sums: dict[str, Any] = {"loss": 0.0, "count": sum(counts)}
    sums["tokens"], sums["context"] = count_tokens(window)
    micro_losses = []
    for index, (ids, batch) in enumerate(window):
        last = index == len(window) - 1
        # 只在最后一个微批次归约梯度，前面的就地累加
        distributed = isinstance(run.wrapped, DistributedDataParallel)
        with run.wrapped.no_sync() if distributed and not last else contextlib.nullcontext():
            with autocast_context(run.device, run.dtype):
                loss_sum, metrics = recipe.loss(run.wrapped, to_device(batch, run.device, run.dtype))
            real = float(bool(ids))  # 凑数的批乘 0：梯度为零，但照样参加归约
            run.scaler.scale(loss_sum * scale * real).backward()
        micro_losses.append(loss_sum.detach() * real)
        sums["loss"] = sums["loss"] + micro_losses[-1]
        add_metrics(sums, metrics, counts[index], real)

    stop.committed()
    sums["stop"] = float(stop.requested)  # 搭这一次归约的车：只要有一个进程收到信号，大家走完这一步一起停
    run.scaler.unscale_(run.optimizer)  # 没启用时是空操作
    grad_norm = run.vitals.gradient_norm()
    # 主机上的数一次送过去，不一个个地送：每送一个都要与卡同步
    host = torch.tensor([0.0 if isinstance(v, Tensor) else v for v in sums.values()], dtype=precision)
    numbers = host.to(run.device, non_blocking=True).unbind()
    values = [
        v.to(run.device, precision) if isinstance(v, Tensor) else n for v, n in zip(sums.values(), numbers)
    ]
    reduced = all_reduce_sum(torch.stack(values))
    totals = torch.cat([reduced, grad_norm.to(reduced)[None]])
    return Update(run.state.step + 1, window, micro_losses, [*sums, "grad_norm"], totals)


def add_metrics(sums: dict[str, Any], metrics: dict[str, Any], count: float, real: float) -> None:
    """把一个微批次的 metrics 加进 ``sums``：键 ``name/sum`` 与 ``name/count``；``count`` 是损失的分母。"""
    for name, value in metrics.items():
        total, number = value if isinstance(value, tuple) else (value, count)
        for key, part in ((f"{name}/sum", total), (f"{name}/count", number)):
            part = part.detach() if isinstance(part, Tensor) else part
            sums[key] = sums.get(key, 0.0) + part * real


def count_tokens(window: Window) -> tuple[float, float]:
    """有效（非填充）词元数，以及各词元所在段长之和（算注意力代价用）。"""
    tokens = context = 0.0
    for ids, batch in window:
        if not ids or "input_ids" not in batch:
            continue
        x = batch["input_ids"]
        real = float(batch.get("num_tokens", x.numel()))
        tokens += real
        if "cu_seqlens" in batch:
            lengths = batch["cu_seqlens"].diff().double()
            context += real * float(lengths.square().sum() / lengths.sum())
        else:
            context += real * x.shape[-1]
    return tokens, context


def worth_taking(sums: Mapping[str, Any]) -> Any:
    """这一步走不走：有目标，损失与梯度都是有限数，梯度不全是 0。给主机上的数得 bool；给设备上的张量得 0 维张量，不读它。

    梯度全是 0 而照走，动量与权重衰减仍会推着权重走（Muon 不论梯度多小都走满一步）：没有信号的一步什么也不该改。
    """
    loss, norm = sums["loss"], sums["grad_norm"]
    # 无穷减无穷、NaN 减 NaN 都是 NaN：差为 0 的才是有限数
    return (sums["count"] > 0) & (loss - loss == 0) & (norm - norm == 0) & (norm != 0)


def update_weights(run: Run, update: Update, grad_clip: float) -> None:
    """裁剪并走一步；不该走的（:func:`worth_taking`），权重与优化器状态一位也不动。

    晚一步读时主机不知道该不该走，把这个问题连同答案留在设备上：优化器照样排上去，``found_inf`` 为 1 就什么也不改。
    float16 的梯度溢出由缩放器照例处理。

    Args:
        grad_clip: 梯度范数的上限，0 是不裁剪。
    """
    if run.reads_late:
        taking = True
        run.optimizer.found_inf = (~worth_taking(update.on_device)).float()
    else:
        sums = update.numbers
        overflow = run.scaler.is_enabled() and math.isfinite(sums["loss"]) and not update.finite
        update.overflow = overflow and run.scaler.get_scale() > 1.0
        taking = worth_taking(sums) or (update.overflow and sums["count"] > 0)
    if taking:
        if grad_clip:
            norm = update.on_device["grad_norm"].float()
            torch.nn.utils.clip_grads_with_norm_(run.model.parameters(), grad_clip, norm)
        run.scaler.step(run.optimizer)
    if run.scaler.is_enabled():
        run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
