"""训练循环：十个配方共用的这一个，从上往下读就是训练的过程。

攒一窗微批次 → 数全局目标词元 → 逐个前向反向 → 裁剪 → 走一步 → 记录 → 存盘 → 验证。

损失的归一化：每个微批次的损失和乘 ``进程数 / N``，``N`` 是这一个优化步在所有微批次、所有进程上的目标词元
总数；DDP 对进程取平均之后，梯度恰好是“全局损失和 / N”的梯度。微批次怎么切、进程怎么分、末尾的窗口满不满，
都不影响结果。
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch import nn

from minimind.console import progress as progress_bar
from minimind.console import say
from minimind.runtime.distributed import any_process, world_size
from minimind.runtime.fair_share import fair_share
from minimind.runtime.interrupt import StopSignal
from minimind.trainer.archive import Archive
from minimind.trainer.footprint import explain_out_of_memory
from minimind.trainer.journal import announce, announce_total, conclude, log_interval
from minimind.trainer.loader import training_batches
from minimind.trainer.optim import set_learning_rate
from minimind.trainer.progress import due
from minimind.trainer.recipe import Data, Recipe, Run
from minimind.trainer.setup import set_up
from minimind.trainer.step import forward_backward, update_weights
from minimind.trainer.tally import Tally
from minimind.trainer.validation import evaluate, owes_evaluation


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
    metrics: dict[str, float]


@explain_out_of_memory
def train(args: Any, recipe: Recipe, model: nn.Module, tokenizer: Any, data: Data) -> TrainResult:
    """训练 ``model`` 到 ``args`` 规定的步数，期间记录、存盘、验证；可从任意一次存盘逐位续上。

    Args:
        args: :class:`minimind.trainer.train_args.TrainArguments` 或其子类。
        recipe: 配方：损失、分母、拼批，以及它的与众不同之处。
        model: 已放在设备上、未包装的模型，有 ``config``。
        tokenizer: 算每字节比特数与指纹用；``None`` 则都不算。
        data: 训练集与验证集。

    Raises:
        UserError: 存档与设置不符、磁盘满、连续三步不是有限数……
        SystemExit: 收到 SIGTERM（143）、SIGHUP（129）或 Ctrl-C（130），已存盘。
    """
    run = set_up(args, recipe, model, tokenizer, data)
    state, archive, tally = run.state, Archive(run), Tally(run)
    batches = training_batches(
        data.train,
        recipe.collate,
        seed=args.seed,
        epochs=args.epochs,
        batch_size=args.batch_size,
        device=run.device,
        start=(state.epoch, state.samples),
        num_workers=args.num_workers,
    )
    announce(run)
    with (
        run,
        StopSignal(archive) as stop,
        progress_bar(recipe.name, state.total_steps - state.step, "步", lines=False) as bar,
    ):
        stop.whole(archive.snapshot())
        stopping = owes_evaluation(run) and not evaluate(run, archive, stop)
        while state.step < state.total_steps and not stopping:
            stop.whole(archive.snapshot(tally.unread))
            micro_batches, samples = state.window_size()
            taken = list(islice(batches, micro_batches))
            epoch, state.lr = state.epoch, state.learning_rate(samples)
            set_learning_rate(run.optimizer, state.lr)

            updates = 0
            for window in recipe.prepare(run, taken) if recipe.prepare else (taken,):
                updates += 1
                if run.compiled is not None:  # 头一个更新之前核对
                    run.compiled.check(run, window)
                update = forward_backward(run, window, stop)
                update_weights(run, update, args.grad_clip)
                tally.add(update)  # 卡上晚一步读：这时入账的是上一次更新的数

            state.advance(samples)
            last = state.step == state.total_steps
            logging = due(state.step, args.log_interval) or last
            evaluating = run.evaluates and state.owes_evaluation()
            saving = due(state.step, args.save_interval) or last or evaluating
            if not updates:  # 平时停不停随更新一起归约，一窗也没有时才单独问
                stop.committed()
                stopping = any_process(stop.requested, run.device)
            elif world_size() == 1:  # 归约之后才来的信号：多进程要等下一次归约才能一致，单进程不必再走一步
                stopping = stop.requested
            if logging or saving or stopping or tally.stopping:
                tally.settle()  # 要准数
            stopping = stopping or tally.stopping
            bar.advance()
            lap(run)
            if logging:
                log_interval(run, epoch)
            if saving or stopping:
                with run.meter.pause("save"):
                    archive.save()
            if evaluating and not stopping:
                stop.whole(archive.snapshot())
                stopping = not evaluate(run, archive, stop)
    if stopping:
        say(f"已在第 {state.step} 步存盘，加 --from_resume 1 继续。")
        run.journal.close()
        raise SystemExit(128 + (stop.signum or signal.SIGTERM))
    return finish(run)


def lap(run: Run) -> None:
    """一步走完：记下用时，CPU 上看看该用几个线程。"""
    seconds = run.meter.lap()
    if run.device.type == "cpu":
        fair_share().lap()
    run.state.seconds += seconds
    run.state.interval["seconds"] = run.state.interval.get("seconds", 0.0) + seconds
    announce_total(run)


def finish(run: Run) -> TrainResult:
    """收尾：说一句总结，返回结果。"""
    conclude(run)
    run.journal.close()
    state = run.state
    return TrainResult(
        run.recipe.weights, run.journal.path, state.step, state.train_loss, state.seconds, state.metrics
    )
