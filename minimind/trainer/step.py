"""一个优化步：数全局目标词元，逐个微批次前向反向，裁剪并更新；不是有限数的步一位权重也不动。"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from minimind.console import say
from minimind.dataset.base import source_words
from minimind.dataset.collate import to_device
from minimind.errors import UserError
from minimind.runtime.device import autocast_context, stat_dtype
from minimind.runtime.distributed import all_reduce_sum, gather_objects, on_main, world_size
from minimind.runtime.interrupt import StopSignal
from minimind.trainer.recipe import Run, Window

# 连续这么多步不是有限数就停：偶尔一步可能是坏样本，接连三步说明训练已经发散
MAX_NONFINITE_IN_ROW = 3


def forward_backward(run: Run, window: Window, stop: StopSignal) -> tuple[dict[str, float], list[Tensor]]:
    """一窗微批次的前向反向；梯度留在参数上，已按全局目标数归一并反缩放。

    Returns:
        各进程合起来的各项之和（``loss count tokens context stop`` 与 metrics，加上 ``grad_norm``），
        以及本进程每个微批次的损失和。全程只与加速卡同步一次。
    """
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
    totals = torch.cat([reduced, grad_norm.to(reduced)[None]]).tolist()
    return dict(zip([*sums, "grad_norm"], totals)), micro_losses


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


def update_weights(run: Run, sums: dict[str, float], grad_clip: float) -> bool:
    """裁剪并走一步；损失或梯度不是有限数、一个目标也没有、或梯度恰好全是 0 时，权重与优化器状态一位也不动。

    梯度全是 0 而照走，动量与权重衰减仍会推着权重走（Muon 不论梯度多小都走满一步）：没有信号的一步什么也不该改。

    Args:
        grad_clip: 梯度范数的上限，0 是不裁剪。

    Returns:
        这一步是否正常（float16 的梯度溢出由缩放器照例处理，算正常）。
    """
    finite_loss, finite_grad = math.isfinite(sums["loss"]), math.isfinite(sums["grad_norm"])
    overflow = run.scaler.is_enabled() and finite_loss and not finite_grad and run.scaler.get_scale() > 1.0
    healthy = sums["count"] > 0 and finite_loss and (finite_grad or overflow)
    empty = healthy and sums["grad_norm"] == 0.0
    if empty:
        run.state.interval["zero_grad"] = run.state.interval.get("zero_grad", 0.0) + 1
    elif healthy:
        if grad_clip and finite_grad:
            norm = torch.tensor(sums["grad_norm"], device=run.device)
            torch.nn.utils.clip_grads_with_norm_(run.model.parameters(), grad_clip, norm)
        run.scaler.step(run.optimizer)
    if run.scaler.is_enabled():
        run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    return healthy


def report_nonfinite(run: Run, window: Window, micro_losses: list[Tensor], sums: dict[str, float]) -> None:
    """不是有限数：说出步数与样本编号；连续三次就停，上一个好的存档还在。"""
    state, step = run.state, run.state.step + 1
    state.nonfinite_in_row += 1
    everything_finite = math.isfinite(sums["loss"])  # 损失都好、只有梯度坏：整窗都有嫌疑
    suspects = [
        sample
        for (ids, _), loss in zip(window, micro_losses)
        for sample in ids
        if everything_finite or not bool(torch.isfinite(loss))
    ]
    samples = sorted(sample for part in gather_objects(suspects) for sample in part)
    names = "、".join(map(str, samples[:16])) + (f" 等 {len(samples)} 个" if len(samples) > 16 else "")
    if hasattr(run.data.train, "source_lines"):
        names += f"（{source_words(run.data.train, samples[:16])}）"
    what = "损失" if not math.isfinite(sums["loss"]) else "梯度范数"
    say(f"第 {step} 步的{what}不是有限数，这一步不更新权重；涉及的样本：{names}。")
    if state.nonfinite_in_row >= MAX_NONFINITE_IN_ROW:
        rescue = f"；第 {state.saved_step} 步的存档完好，可加 --from_resume 1 从那里继续"
        rescue = rescue if state.saved_step > 0 else ""
        stopped = UserError(
            f"连续 {MAX_NONFINITE_IN_ROW} 步的{what}不是有限数，训练停止",
            where=f"第 {step} 步，样本 {names}",
            fix=f"降低 --learning_rate 或检查这些样本{rescue}",
        )

        def stop_all() -> None:
            raise stopped

        on_main(stop_all)
