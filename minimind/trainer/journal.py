"""日志：每隔几步的一行（打印，也写成 JSON、交给记录工具），开始前与结束时的话，剩余时间。"""

from __future__ import annotations

import math
from typing import Any

import torch

from minimind.console import format_duration, say
from minimind.model import MiniMindConfig, count_parameters, flops_per_token
from minimind.runtime.device import device_name, peak_memory_bytes
from minimind.runtime.distributed import world_size
from minimind.trainer.footprint import GB, describe, expected
from minimind.trainer.memory import remedies
from minimind.trainer.meter import events_left
from minimind.trainer.run import Run
from minimind.trainer.tracking import write_card

# 走过这么多步就估全程用时（头一步含预热，不作数）；一步就要几十秒的，等不到那么久
FIRST_STEPS, SLOW_SECONDS = 3, 20.0


def announce(run: Run) -> None:
    """开始前的一段话：模型、数据、步数、精度、设备；日志旁边写下卡片。"""
    args, data, peak = run.args, run.data, run.numerics["peak_flops"]
    row_length, documents = (getattr(data.train, k, 0) for k in ("row_length", "num_documents"))
    trainable = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    say(
        f"模型：{count_parameters(run.model) / 1e6:.2f}M 参数（训练 {trainable / 1e6:.2f}M），"
        f"{run.recipe.weights.name}"
    )
    say(
        f"数据：{len(data.train):,} "
        + (f"行 × {row_length} 词元，{documents:,} 篇文档" if row_length else "条")
        + (f"；验证 {len(data.val):,} 行" if data.val is not None else "")
    )
    say(
        f"训练：{args.epochs} 轮，共 {run.state.total_steps:,} 步，"
        f"每步 {run.state.global_batch * args.accumulation_steps} 行"
        f"（{args.batch_size} × {args.accumulation_steps} 累积 × {world_size()} 进程），"
        f"{args.optimizer}，学习率 {args.learning_rate:g}，{args.schedule}"
    )
    say(
        f"设备：{device_name(run.device)}，精度 {run.numerics['dtype']}"
        + (f"，矩阵乘峰值 {peak / 1e12:.2f} TFLOPS" if peak else "")
    )
    announce_memory(run)
    if run.journal.log is not None:
        card = {
            "recipe": run.recipe.name,
            "total_steps": run.state.total_steps,
            "epochs": args.epochs,
            "processes": world_size(),
            "parameters": count_parameters(run.model),
            "device": run.device.type,
            "dtype": run.numerics["dtype"],
        }
        write_card(run.journal.path, card)


def announce_memory(run: Run) -> None:
    """预计的内存；卡上放不下就先说该动哪个参数，不等它走到一半。数不全的训练不说。"""
    if (found := expected(run)) is None:
        return
    say(f"预计{'内存' if run.device.type == 'cpu' else '显存'} {describe(found)}。")
    if run.device.type == "cuda":
        room = torch.cuda.mem_get_info(run.device)[0] + torch.cuda.memory_reserved(run.device)
        if found.peak > room:
            say(f"留意：卡上只剩 {room / GB:.1f} GB，多半放不下；可以 {remedies(run.args)}。")


def announce_total(run: Run) -> None:
    """尽早说一声全程要多久，只说一次。"""
    meter = run.meter
    training = meter.elapsed() - sum(meter.pauses["compile"])
    if run.journal.told_total or (meter.seen < FIRST_STEPS and training < SLOW_SECONDS):
        return
    run.journal.told_total = True
    say(f"按现在的速度，本次全程约 {format_duration(meter.elapsed() + seconds_left(run))}（含验证与存盘）。")


def seconds_left(run: Run) -> float:
    """按现在的速度还要多久，含验证与存盘。"""
    args, step, total = run.args, run.state.step, run.state.total_steps
    evals = events_left(step, total, args.eval_interval) if run.evaluates else 0
    return run.meter.seconds_left(total - step, evals, events_left(step, total, args.save_interval))


def log_interval(run: Run, epoch: int) -> None:
    """打印一行，写一行 JSON；看体征，有毛病就说。``epoch`` 是这一步所在的轮，从 0 数。"""
    args, state, sums = run.args, run.state, run.state.interval
    state.train_loss = sums["loss"] / sums["count"] if sums.get("count") else math.nan
    speed = sums.get("tokens", 0.0) / max(sums["seconds"], 1e-9)
    extras = interval_metrics(sums)
    record: dict[str, Any] = {
        "step": state.step,
        "epoch": epoch + 1,
        "loss": state.train_loss,
        "lr": state.lr,
        "grad_norm": sums.get("grad_norm", math.nan) / max(sums.get("steps", 0.0), 1.0),
        "tokens": int(state.tokens),
        "tokens_per_s": speed,
        "time": state.seconds,
        **extras,
    }
    if sums.get("skipped"):
        record["skipped_steps"] = int(sums["skipped"])
    peak = run.numerics["peak_flops"]
    if peak and isinstance(run.config, MiniMindConfig):
        # 词元平均所在的段长决定注意力的代价
        context = sums.get("context", 0.0) / max(sums.get("tokens", 0.0), 1.0)
        if flops := speed * flops_per_token(run.config, context):
            record["mfu"] = flops / (peak * world_size())
    if sums.get("zero_grad"):
        record["zero_grad_steps"] = int(sums["zero_grad"])
    notes = run.vitals.examine(
        record,
        cross_entropy=run.recipe.cross_entropy,
        vocab_size=run.config.vocab_size,
        warm=state.step - max(args.log_interval, 1) >= args.warmup_ratio * state.total_steps,
        updates=sums.get("steps", 0.0),
        group_lrs=[group["lr"] for group in run.optimizer.param_groups],
    )
    if notes:
        record["notes"] = notes
    run.journal.write(record, state.step)
    metrics = "".join(f" {k} {v:.4f}" for k, v in extras.items())
    loss = "无（这一段没有可学的目标）" if math.isnan(state.train_loss) else f"{state.train_loss:.4f}"
    say(
        f"第 {epoch + 1}/{args.epochs} 轮 {state.step}/{state.total_steps} 步 loss {loss}{metrics}"
        f" lr {state.lr:.2e} {speed:,.0f} 词元/秒"
        + (f" 利用率 {record['mfu']:.0%}" if "mfu" in record else "")
        + f" 剩余 {format_duration(seconds_left(run))}"
    )
    state.interval.clear()
    for sentence in [*notes, *(run.recipe.health(record) if run.recipe.health else ())]:
        say(f"留意：{sentence}")


def interval_metrics(sums: dict[str, float]) -> dict[str, float]:
    """``name/sum`` 与 ``name/count`` 合成平均值；一个也没有的项不出现。"""
    names = [key.removesuffix("/sum") for key in sums if key.endswith("/sum")]
    return {name: sums[f"{name}/sum"] / sums[f"{name}/count"] for name in names if sums[f"{name}/count"]}


def conclude(run: Run) -> None:
    """结束时的一句总结。"""
    state = run.state
    say(
        f"训练完成：{state.step} 步，{state.tokens:,.0f} 词元，本次用时 {format_duration(run.meter.elapsed())}，"
        f"内存最高 {peak_memory_bytes(run.device) / 2**30:.2f} GB；权重 {run.recipe.weights}"
    )
