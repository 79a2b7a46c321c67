"""训练循环：九个配方共用的这一个，从上往下读就是训练的过程。

攒一窗微批次 → 数全局目标词元 → 逐个前向反向 → 裁剪 → 走一步 → 记录 → 存盘 → 验证。

损失的归一化：每个微批次的损失和乘 ``进程数 / N``，``N`` 是这一个优化步在所有微批次、所有进程上的目标词元
总数；DDP 对进程取平均之后，梯度恰好是“全局损失和 / N”的梯度。微批次怎么切、进程怎么分、末尾的窗口满不满，
都不影响结果。
"""

from __future__ import annotations

import contextlib
import math
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from minimind.console import format_duration, progress, say
from minimind.errors import UserError
from minimind.trainer.checkpoint import write_sidecar
from minimind.trainer.device import autocast_context, peak_memory_bytes, preserved_rng
from minimind.trainer.distributed import (
    all_reduce_sum,
    barrier,
    gather_objects,
    is_main_process,
    on_main,
)
from minimind.trainer.interrupt import StopSignal
from minimind.trainer.loader import Batch, training_batches
from minimind.trainer.meter import events_left
from minimind.trainer.optim import set_learning_rate
from minimind.trainer.run import Run
from minimind.trainer.validation import count_targets, to_device, validate

# 连续这么多步不是有限数就停：偶尔一步可能是坏样本，接连三步说明训练已经发散
MAX_NONFINITE_IN_ROW = 3
# 走过这么多步之后才估全程用时：头一步含预热，不作数
FIRST_STEPS = 3

# 批里交给模型的键；其余（如 num_tokens）是给训练循环看的，传进去会让 torch.compile 反复重编
MODEL_INPUTS = (
    "input_ids", "attention_mask", "position_ids", "labels", "loss_weights", "cu_seqlens", "max_seqlen",
)  # fmt: skip

LossResult = tuple[Tensor, Any, dict[str, Any]]
Window = list[tuple[list[int], Batch]]


@dataclass
class TrainResult:
    """训练的结果。

    weights、log: 权重与 JSON 行日志的位置；step: 完成的优化步数；train_loss: 最后一个记录区间的平均损失；
    metrics: 最后一次验证的结果（val_loss、val_bpb 与 on_eval 给出的）；seconds: 累计用时（含续训之前的）。
    """

    weights: Path
    log: Path
    step: int
    train_loss: float
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)


def language_model_loss(model: nn.Module, batch: Batch) -> LossResult:
    """预训练与 SFT 的损失：目标词元上的交叉熵之和，混合专家再加负载均衡损失（乘目标数，与前者同一口径）。"""
    inputs = {key: value for key, value in batch.items() if key in MODEL_INPUTS}
    out = model(**inputs, return_logits=False)
    ce, aux, count = out.loss_sum, out.aux_loss * out.target_count, out.target_count
    if not aux.requires_grad:  # 稠密模型，或不在训练
        return ce, count, {}
    return ce + aux, count, {"ce": ce.detach(), "aux_loss": aux.detach()}


def train(
    args: Any,
    model: nn.Module,
    tokenizer: Any,
    train_ds: Any,
    compute_loss: Callable[[nn.Module, Batch], LossResult],
    *,
    collate: Callable[[list[Any]], Batch] | None = None,
    val_ds: Any = None,
    recipe: str = "pretrain",
    count: Callable[[Batch], float] = count_targets,
    extra_state: dict[str, Any] | None = None,
    on_eval: Callable[[nn.Module, int], dict[str, float]] | None = None,
) -> TrainResult:
    """训练 ``model`` 到 ``args`` 规定的步数，期间记录、存盘、验证；可从任意一次存盘逐位续上。

    Args:
        args: :class:`minimind.trainer.train_args.TrainArguments` 或其子类。
        model: 已放在设备上、未包装的模型，有 ``config``。
        tokenizer: 算每字节比特数与指纹用；``None`` 则都不算。
        train_ds: 有 ``len`` 与下标的数据集。
        compute_loss: ``(model, batch) -> (loss_sum, count, metrics)``。``loss_sum`` 是目标上的损失 *之和*
            （0 维张量），``count`` 必须等于 ``count(batch)``；``metrics`` 的每一项是目标上的和（除以 N 后记录），
            或 ``(和, 个数)``。
        collate: 把若干样本拼成一个微批次；默认是打包行的 ``collate_packed``。
        val_ds: 验证集；``None`` 不验证。
        recipe: 配方的名字，写进旁注与存档。
        count: 在 CPU 上数一个微批次的目标数，损失的归一化由它决定。
        extra_state: 配方自己要存进续训存档的对象，有 ``state_dict`` 与 ``load_state_dict``。
        on_eval: 每次验证后在主进程调用 ``on_eval(model, step)``，返回的指标一并记录。

    Raises:
        UserError: 存档与设置不符、磁盘满、连续三步不是有限数……
        SystemExit: 收到 SIGTERM（143）或 Ctrl-C（130），已存盘。
    """
    if collate is None:
        from minimind.dataset.lm_dataset import collate_packed as collate
    run = Run(args, model, tokenizer, train_ds, compute_loss, val_ds, recipe, collate, extra_state or {})
    run.evaluates = val_ds is not None or on_eval is not None
    state = run.state
    batches = training_batches(
        train_ds,
        collate,
        seed=args.seed,
        epochs=args.epochs,
        batch_size=args.batch_size,
        rank=run.rank,
        world_size=run.world_size,
        start=(state.epoch, state.samples),
        num_workers=run.num_workers,
        pin_memory=run.device.type == "cuda",
    )
    run.announce()
    with StopSignal() as stop, progress(recipe, run.total_steps - state.step, "步", lines=False) as bar:
        stopping = run.owes_evaluation() and not evaluate(run, compute_loss, on_eval, stop)
        while state.step < run.total_steps and not stopping:
            micro_batches, samples = run.window_size()
            window = list(islice(batches, micro_batches))
            lr = run.learning_rate(samples)
            set_learning_rate(run.optimizer, lr)

            sums, micro_losses = forward_backward(run, window, compute_loss, count, stop)
            if update_weights(run, sums):
                state.nonfinite_in_row = 0
            elif sums["count"]:
                report_nonfinite(run, window, micro_losses, sums)

            epoch = state.epoch
            run.advance(samples)
            bar.advance()
            accumulate_interval(run, sums)
            last, stopping = state.step == run.total_steps, sums["stop"] > 0
            if due(state.step, args.log_interval) or last:
                log_interval(run, epoch, lr)
            evaluating = run.evaluates and (due(state.step, args.eval_interval) or last)
            if due(state.step, args.save_interval) or last or evaluating or stopping:
                with run.meter.pause("save"):
                    run.save()
            if evaluating and not stopping:
                stopping = not evaluate(run, compute_loss, on_eval, stop)
    if stopping:
        say(f"已在第 {state.step} 步存盘，加 --from_resume 1 继续。")
        run.close()
        raise SystemExit(128 + (stop.signum or signal.SIGTERM))
    return finish(run)


def due(step: int, interval: int) -> bool:
    """每 ``interval`` 步一次的事这一步该不该做；0 表示从不。"""
    return interval > 0 and step % interval == 0


# ---------------------------------------------------------------- 一个优化步


def forward_backward(
    run: Run, window: Window, compute_loss: Callable, count: Callable[[Batch], float], stop: StopSignal
) -> tuple[dict[str, float], list[Tensor]]:
    """一窗微批次的前向反向；梯度留在参数上，已按全局目标数归一并反缩放。

    Returns:
        各进程合起来的各项之和（``loss count tokens context stop`` 与 metrics，加上 ``grad_norm``），
        以及本进程每个微批次的损失和。全程只与加速卡同步一次。
    """
    counts = [count(batch) if ids else 0.0 for ids, batch in window]
    total = all_reduce_sum(torch.tensor(sum(counts), dtype=run.stat_dtype, device=run.device))
    scale = (run.world_size / total.where(total > 0, 1.0)).float()

    sums: dict[str, Any] = {"loss": 0.0, "count": sum(counts)}
    sums["tokens"], sums["context"] = count_tokens(window)
    micro_losses = []
    for index, (ids, batch) in enumerate(window):
        last = index == len(window) - 1
        # 只在最后一个微批次归约梯度，前面的就地累加
        distributed = isinstance(run.wrapped, DistributedDataParallel)
        with run.wrapped.no_sync() if distributed and not last else contextlib.nullcontext():
            with autocast_context(run.device, run.dtype):
                loss_sum, n, metrics = compute_loss(run.wrapped, to_device(batch, run.device))
            real = float(bool(ids))  # 凑数的批乘 0：梯度为零，但照样参加归约
            run.scaler.scale(loss_sum * scale * real).backward()
        if run.meter.seen == 0 and ids and abs(float(n) - counts[index]) > 1e-3 * max(counts[index], 1.0):
            raise RuntimeError(
                f"compute_loss 返回的个数 {float(n)} 与 count(batch) 数出的 {counts[index]} 不一致"
            )
        micro_losses.append(loss_sum.detach() * real)
        sums["loss"] = sums["loss"] + micro_losses[-1]
        add_metrics(sums, metrics, n, real)

    sums["stop"] = float(stop.requested)  # 只要有一个进程收到信号，大家走完这一步一起停
    run.scaler.unscale_(run.optimizer)  # 没启用时是空操作
    grads = [p.grad for p in run.model.parameters() if p.grad is not None]
    grad_norm = torch.nn.utils.get_total_norm(grads)
    values = [torch.as_tensor(v, dtype=run.stat_dtype, device=run.device) for v in sums.values()]
    reduced = all_reduce_sum(torch.stack(values))
    numbers = torch.cat([reduced, grad_norm.to(reduced)[None]]).tolist()
    return dict(zip([*sums, "grad_norm"], numbers)), micro_losses


def add_metrics(sums: dict[str, Any], metrics: dict[str, Any], n: Any, real: float) -> None:
    """把一个微批次的 metrics 加进 ``sums``：键 ``name/sum`` 与 ``name/count``。"""
    for name, value in metrics.items():
        total, number = value if isinstance(value, tuple) else (value, n)
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
        lengths = (
            batch["cu_seqlens"].diff().double()
            if "cu_seqlens" in batch
            else torch.full((1,), x.shape[-1]).double()
        )
        tokens += real
        context += real * float(lengths.square().sum() / lengths.sum())
    return tokens, context


def update_weights(run: Run, sums: dict[str, float]) -> bool:
    """裁剪并走一步；损失或梯度不是有限数、或一个目标也没有时，权重一位也不动。

    Returns:
        这一步是否正常（float16 的梯度溢出由缩放器照例处理，算正常）。
    """
    finite_loss, finite_grad = math.isfinite(sums["loss"]), math.isfinite(sums["grad_norm"])
    overflow = run.scaler.is_enabled() and finite_loss and not finite_grad and run.scaler.get_scale() > 1.0
    healthy = sums["count"] > 0 and finite_loss and (finite_grad or overflow)
    if healthy:
        if run.args.grad_clip and finite_grad:
            norm = torch.tensor(sums["grad_norm"], device=run.device)
            torch.nn.utils.clip_grads_with_norm_(run.model.parameters(), run.args.grad_clip, norm)
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
    if hasattr(run.train_ds, "source_lines"):
        lines = sorted({line for sample in samples[:16] for line in run.train_ds.source_lines(sample)})
        names += f"（源文件第 {'、'.join(map(str, lines[:16]))} 行{'等' if len(lines) > 16 else ''}）"
    what = "损失" if not math.isfinite(sums["loss"]) else "梯度范数"
    say(f"第 {step} 步的{what}不是有限数，这一步不更新权重；涉及的样本：{names}。")
    if state.nonfinite_in_row >= MAX_NONFINITE_IN_ROW:
        stopped = UserError(
            f"连续 {MAX_NONFINITE_IN_ROW} 步的{what}不是有限数，训练停止",
            where=f"第 {step} 步，样本 {names}",
            fix="降低 --learning_rate 或检查这些样本"
            + (
                f"；第 {run.saved_step} 步的存档完好，可加 --from_resume 1 从那里继续"
                if run.saved_step > 0
                else ""
            ),
        )

        def stop_all() -> None:
            raise stopped

        on_main(stop_all)


# ---------------------------------------------------------------- 记录与验证


def accumulate_interval(run: Run, sums: dict[str, float]) -> None:
    """并入本记录区间；不是有限数的步不计入平均。"""
    interval, state = run.state.interval, run.state
    seconds = run.meter.lap()
    state.seconds += seconds
    good = math.isfinite(sums["loss"]) and math.isfinite(sums["grad_norm"])
    for key, value in sums.items():
        if key != "stop" and good:
            interval[key] = interval.get(key, 0.0) + value
    interval["seconds"] = interval.get("seconds", 0.0) + seconds
    interval["steps"] = interval.get("steps", 0.0) + good
    interval["skipped"] = interval.get("skipped", 0.0) + (not good)
    state.tokens += sums["tokens"]


def log_interval(run: Run, epoch: int, lr: float) -> None:
    """打印一行，写一行 JSON。"""
    args, state, sums = run.args, run.state, run.state.interval
    run.train_loss = sums["loss"] / sums["count"] if sums.get("count") else math.nan
    speed = sums.get("tokens", 0.0) / max(sums["seconds"], 1e-9)
    record: dict[str, Any] = {
        "step": state.step,
        "epoch": epoch + 1,
        "loss": run.train_loss,
        "lr": lr,
        "grad_norm": sums.get("grad_norm", math.nan) / max(sums["steps"], 1.0),
        "tokens": int(state.tokens),
        "tokens_per_s": speed,
        "time": state.seconds,
        **interval_metrics(sums),
    }
    if sums["skipped"]:
        record["skipped_steps"] = int(sums["skipped"])
    flops = run.flops_per_second(speed, sums.get("context", 0.0) / max(sums.get("tokens", 0.0), 1.0))
    peak = run.numerics["peak_flops"]
    if flops and peak:
        record["mfu"] = flops / (peak * run.world_size)
    run.write_log(record)
    state.interval.clear()

    left = run.meter.seconds_left(
        run.total_steps - state.step,
        events_left(state.step, run.total_steps, args.eval_interval) if run.evaluates else 0,
        events_left(state.step, run.total_steps, args.save_interval),
    )
    metrics = "".join(f" {k} {record[k]:.4f}" for k in interval_metrics(sums))
    if run.meter.seen >= FIRST_STEPS and not run.announced_total:
        run.announced_total = True
        say(f"按现在的速度，本次全程约 {format_duration(run.meter.elapsed() + left)}（含验证与存盘）。")
    say(
        f"第 {epoch + 1}/{args.epochs} 轮 {state.step}/{run.total_steps} 步 loss {run.train_loss:.4f}{metrics}"
        f" lr {lr:.2e} {speed:,.0f} 词元/秒"
        + (f" 利用率 {record['mfu']:.0%}" if "mfu" in record else "")
        + f" 剩余 {format_duration(left)}"
    )


def interval_metrics(sums: dict[str, float]) -> dict[str, float]:
    """``name/sum`` 与 ``name/count`` 合成平均值。"""
    names = [key.removesuffix("/sum") for key in sums if key.endswith("/sum")]
    return {name: sums[f"{name}/sum"] / (sums[f"{name}/count"] or math.nan) for name in names}


def evaluate(run: Run, compute_loss: Callable, on_eval: Callable | None, stop: StopSignal) -> bool:
    """验证并记录；此前已存盘，验证出了错也不丢训练成果。

    Returns:
        是否做完；收到退出信号就半途放弃，续训时会补上。
    """
    state, result = run.state, {}
    with run.meter.pause("eval"):
        if run.val_ds is not None:
            result = validate(
                run.model,
                run.val_ds,
                compute_loss,
                run.collate,
                batch_size=run.args.batch_size,
                device=run.device,
                dtype=run.dtype,
                byte_lengths=run.byte_lengths,
                max_rows=run.args.val_max_rows,
                should_stop=lambda: stop.requested,
            )
            if result is None:
                return False
        if on_eval is not None:
            if is_main_process():
                with preserved_rng(run.device):
                    run.model.eval()
                    result = {**result, **on_eval(run.model, state.step)}
                    run.model.train()
            barrier()
    run.metrics = result
    run.write_log({"step": state.step, "epoch": run.epoch_for_people, **result, "time": state.seconds})
    if is_main_process() and run.saved_step == state.step:
        write_sidecar(run.weights, run.sidecar())
    words = {"val_loss": "损失", "val_bpb": "每字节比特数"}
    say(f"验证（第 {state.step} 步）：" + "，".join(f"{words.get(k, k)} {v:.4f}" for k, v in result.items()))
    return True


def finish(run: Run) -> TrainResult:
    """收尾：说一句总结，返回结果。"""
    state = run.state
    say(
        f"训练完成：{state.step} 步，{state.tokens:,.0f} 词元，本次用时 {format_duration(run.meter.elapsed())}，"
        f"内存最高 {peak_memory_bytes(run.device) / 2**30:.2f} GB；权重 {run.weights}"
    )
    run.close()
    return TrainResult(run.weights, run.log_path, state.step, run.train_loss, state.seconds, run.metrics)
