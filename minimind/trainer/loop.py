"""训练循环：九个配方共用的这一个，从上往下读就是训练的过程。

攒一窗微批次 → 数全局目标词元 → 逐个前向反向 → 裁剪 → 走一步 → 记录 → 存盘 → 验证。

损失的归一化：每个微批次的损失和乘 ``进程数 / N``，``N`` 是这一个优化步在所有微批次、所有进程上的目标词元
总数；DDP 对进程取平均之后，梯度恰好是“全局损失和 / N”的梯度。微批次怎么切、进程怎么分、末尾的窗口满不满，
都不影响结果。
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from minimind.console import format_duration, say
from minimind.console import progress as progress_bar
from minimind.runtime.checkpoint import write_sidecar
from minimind.runtime.device import peak_memory_bytes, preserved_rng
from minimind.runtime.distributed import any_process, barrier, is_main_process
from minimind.runtime.fair_share import fair_share
from minimind.runtime.interrupt import StopSignal
from minimind.trainer.compiling import compile_and_check
from minimind.trainer.history import keep_best
from minimind.trainer.loader import Batch, training_batches
from minimind.trainer.meter import events_left
from minimind.trainer.optim import set_learning_rate
from minimind.trainer.run import Run
from minimind.trainer.step import Window, forward_backward, report_nonfinite, update_weights
from minimind.trainer.validation import count_targets, validate

# 走过这么多步就估全程用时（头一步含预热，不作数）；一步就要几十秒的，等不到那么久
FIRST_STEPS, SLOW_SECONDS = 3, 20.0

# 批里交给模型的键；其余（如 num_tokens）是给训练循环看的，传进去会让 torch.compile 反复重编
MODEL_INPUTS = (
    "input_ids", "attention_mask", "position_ids", "labels", "loss_weights", "cu_seqlens", "max_seqlen",
)  # fmt: skip

LossResult = tuple[Tensor, Any, dict[str, Any]]


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
    prepare: Callable[[Run, Window], Iterable[Window]] | None = None,
    health: Callable[[dict[str, float]], list[str]] | None = None,
    weights: Path | None = None,
    weights_of: Callable[[nn.Module], Mapping[str, Tensor]] | None = None,
    lr_scales: Mapping[str, float] | None = None,
    identity: Mapping[str, str] | None = None,
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
        collate: 把若干样本拼成一个微批次；默认用 ``train_ds.collate``。
        val_ds: 验证集；``None`` 不验证。
        recipe: 配方的名字，写进旁注与存档。
        count: 在 CPU 上数一个微批次的目标数，损失的归一化由它决定。
        extra_state: 配方自己要存进续训存档的对象，有 ``state_dict`` 与 ``load_state_dict``。
        on_eval: 每次验证后在主进程调用 ``on_eval(model, step)``，返回的指标一并记录。
        prepare: ``prepare(run, window)`` 把取到的一窗微批次变成若干窗，每窗更新一次权重；强化学习在这里采样、打分，
            一步之内可以更新几次。可以是生成器：下一窗开始时上一窗已经更新完。各进程给出的窗数必须相同；
            过程中的指标用 :meth:`minimind.trainer.run.Run.record` 记下。默认就用取到的那一窗。
        health: 每行日志之后调用 ``health(record)``，返回的每一句是发现的毛病，照样打印。
        weights: 权重写到哪里，默认 ``{save_dir}/{save_weight}_{hidden_size}[_moe].pth``。
        weights_of: ``weights_of(model)`` 给出要存为权重的张量（只存适配器、只存策略……），默认全部。
        lr_scales: 参数名的前缀 → 学习率的倍数，例如 ``{"critic.": 2.0}``。
        identity: 数据与分词器之外，结果还依赖哪些文件：``{"教师": 内容的指纹}``；写进存档，续训时核对。

    Raises:
        UserError: 存档与设置不符、磁盘满、连续三步不是有限数……
        SystemExit: 收到 SIGTERM（143）、SIGHUP（129）或 Ctrl-C（130），已存盘。
    """
    run = Run(
        args,
        model,
        tokenizer,
        train_ds,
        compute_loss,
        val_ds=val_ds,
        recipe=recipe,
        collate=collate or train_ds.collate,
        extra_state=extra_state or {},
        evaluates=val_ds is not None or on_eval is not None,
        probes=prepare is None,
        weights=weights,
        weights_of=weights_of,
        lr_scales=lr_scales,
        identity=identity,
    )
    state, progress = run.state, run.progress
    batches = training_batches(
        train_ds,
        run.collate,
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
    with (
        run,
        StopSignal(run) as stop,
        progress_bar(recipe, progress.total_steps - state.step, "步", lines=False) as bar,
    ):
        stop.whole(run.snapshot())
        stopping = run.owes_evaluation() and not evaluate(run, compute_loss, on_eval, stop)
        while state.step < progress.total_steps and not stopping:
            stop.whole(run.snapshot())
            micro_batches, samples = progress.window_size()
            window = list(islice(batches, micro_batches))
            lr = progress.learning_rate(samples)
            set_learning_rate(run.optimizer, lr)

            updates = 0
            for update in prepare(run, window) if prepare else (window,):
                updates += 1
                compile_and_check(run, update, compute_loss)
                sums, micro_losses = forward_backward(run, update, compute_loss, count, stop)
                stopping = sums.pop("stop") > 0 or stopping
                if update_weights(run, sums):
                    state.nonfinite_in_row = 0
                elif sums["count"]:
                    report_nonfinite(run, update, micro_losses, sums)
                accumulate_interval(run, sums)

            epoch, state.lr = state.epoch, lr
            progress.advance(samples)
            bar.advance()
            seconds = run.meter.lap()
            if run.device.type == "cpu":
                fair_share().lap()
            state.seconds += seconds
            state.interval["seconds"] = state.interval.get("seconds", 0.0) + seconds
            if not updates:  # 平时停不停随更新一起归约，一窗也没有时才单独问
                stop.committed()
                stopping = any_process(stop.requested, run.device)
            elif run.world_size == 1:  # 归约之后才来的信号：多进程要等下一次归约才能一致，单进程不必再走一步
                stopping = stopping or stop.requested
            announce_total(run)
            last = state.step == progress.total_steps
            if due(state.step, args.log_interval) or last:
                record = log_interval(run, epoch, lr)
                for sentence in health(record) if health else ():
                    say(f"留意：{sentence}")
            evaluating = run.evaluates and (due(state.step, args.eval_interval) or last)
            if due(state.step, args.save_interval) or last or evaluating or stopping:
                with run.meter.pause("save"):
                    run.save()
            if evaluating and not stopping:
                stop.whole(run.snapshot())
                stopping = not evaluate(run, compute_loss, on_eval, stop)
    if stopping:
        say(f"已在第 {state.step} 步存盘，加 --from_resume 1 继续。")
        run.close()
        raise SystemExit(128 + (stop.signum or signal.SIGTERM))
    return finish(run)


def due(step: int, interval: int) -> bool:
    """每 ``interval`` 步一次的事这一步该不该做；0 表示从不。"""
    return interval > 0 and step % interval == 0


def accumulate_interval(run: Run, sums: dict[str, float]) -> None:
    """一次更新并入本记录区间；不是有限数的更新不计入平均。"""
    interval, state = run.state.interval, run.state
    good = math.isfinite(sums["loss"]) and math.isfinite(sums["grad_norm"])
    for key, value in sums.items():
        if good:
            interval[key] = interval.get(key, 0.0) + value
    interval["steps"] = interval.get("steps", 0.0) + good
    interval["skipped"] = interval.get("skipped", 0.0) + (not good)
    state.tokens += sums["tokens"]


def log_interval(run: Run, epoch: int, lr: float) -> dict[str, Any]:
    """打印一行，写一行 JSON；返回写下的记录。"""
    args, state, progress, sums = run.args, run.state, run.progress, run.state.interval
    run.train_loss = sums["loss"] / sums["count"] if sums.get("count") else math.nan
    speed = sums.get("tokens", 0.0) / max(sums["seconds"], 1e-9)
    extras = interval_metrics(sums)
    record: dict[str, Any] = {
        "step": state.step,
        "epoch": epoch + 1,
        "loss": run.train_loss,
        "lr": lr,
        "grad_norm": sums.get("grad_norm", math.nan) / max(sums.get("steps", 0.0), 1.0),
        "tokens": int(state.tokens),
        "tokens_per_s": speed,
        "time": state.seconds,
        **extras,
    }
    if sums.get("skipped"):
        record["skipped_steps"] = int(sums["skipped"])
    flops = run.flops_per_second(speed, sums.get("context", 0.0) / max(sums.get("tokens", 0.0), 1.0))
    peak = run.numerics["peak_flops"]
    if flops and peak:
        record["mfu"] = flops / (peak * run.world_size)
    if sums.get("zero_grad"):
        record["zero_grad_steps"] = int(sums["zero_grad"])
    notes = run.vitals.examine(
        record,
        recipe=run.recipe,
        vocab_size=run.config.vocab_size,
        warm=state.step - max(args.log_interval, 1) >= args.warmup_ratio * progress.total_steps,
        updates=sums.get("steps", 0.0),
        group_lrs=[group["lr"] for group in run.optimizer.param_groups],
    )
    if notes:
        record["notes"] = notes
    run.write_log(record)
    state.interval.clear()

    metrics = "".join(f" {k} {v:.4f}" for k, v in extras.items())
    loss = "无（这一段没有可学的目标）" if math.isnan(run.train_loss) else f"{run.train_loss:.4f}"
    say(
        f"第 {epoch + 1}/{args.epochs} 轮 {state.step}/{progress.total_steps} 步 loss {loss}{metrics}"
        f" lr {lr:.2e} {speed:,.0f} 词元/秒"
        + (f" 利用率 {record['mfu']:.0%}" if "mfu" in record else "")
        + f" 剩余 {format_duration(seconds_left(run))}"
    )
    for sentence in notes:
        say(f"留意：{sentence}")
    return record


def seconds_left(run: Run) -> float:
    """按现在的速度还要多久，含验证与存盘。"""
    args, step, total = run.args, run.state.step, run.progress.total_steps
    evals = events_left(step, total, args.eval_interval) if run.evaluates else 0
    return run.meter.seconds_left(total - step, evals, events_left(step, total, args.save_interval))


def announce_total(run: Run) -> None:
    """尽早说一声全程要多久，只说一次。"""
    meter = run.meter
    training = meter.elapsed() - sum(meter.pauses["compile"])
    if run.announced_total or (meter.seen < FIRST_STEPS and training < SLOW_SECONDS):
        return
    run.announced_total = True
    say(f"按现在的速度，本次全程约 {format_duration(meter.elapsed() + seconds_left(run))}（含验证与存盘）。")


def interval_metrics(sums: dict[str, float]) -> dict[str, float]:
    """``name/sum`` 与 ``name/count`` 合成平均值；一个也没有的项不出现。"""
    names = [key.removesuffix("/sum") for key in sums if key.endswith("/sum")]
    return {name: sums[f"{name}/sum"] / sums[f"{name}/count"] for name in names if sums[f"{name}/count"]}


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
    if is_main_process() and run.saved_step == state.step:
        write_sidecar(run.weights, run.sidecar())
        keep_best(run, result)
    run.write_log(
        {"step": state.step, "epoch": run.progress.epoch_for_people, **result, "time": state.seconds}
    )
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
