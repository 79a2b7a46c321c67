"""验证：目标词元的平均损失，以及与分词器无关的每字节比特数（bits per byte）；训练途中的一次，连同样例与记录。"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minimind.console import say
from minimind.dataset.collate import to_device
from minimind.runtime.checkpoint import write_sidecar
from minimind.runtime.device import autocast_context, preserved_rng, stat_dtype
from minimind.runtime.distributed import (
    all_reduce_sum,
    barrier,
    broadcast_object,
    gather_objects,
    is_main_process,
    rank,
    world_size,
)
from minimind.runtime.interrupt import StopSignal
from minimind.tokenizer import token_byte_lengths
from minimind.trainer.archive import Archive
from minimind.trainer.loader import epoch_order
from minimind.trainer.progress import Progress
from minimind.trainer.recipe import Batch, Data, LossResult, Recipe, Run, count_targets


def count_bytes(batch: dict[str, Any], byte_lengths: Tensor) -> float:
    """目标词元代表的 UTF-8 字节数；结束符等控制词元算 0 字节。"""
    labels = batch["labels"][:, 1:]
    return float(byte_lengths[labels[labels != -100]].sum())


@torch.no_grad()
def validate(
    model: nn.Module,
    val_ds: Sequence[Any],
    loss: Callable[[nn.Module, Batch], LossResult],
    collate: Callable[[list[Any]], Batch],
    *,
    count: Callable[[Batch], float] = count_targets,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    byte_lengths: Tensor | None = None,
    max_rows: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """在验证集上求损失；多进程时各算一份再合起来。不改变随机数状态，结束后模型回到训练模式。

    每字节比特数 = Σ 负对数似然 / ln 2 / 目标文本的 UTF-8 字节数；文档结束符的代价计入分子，
    所以它是“把这些文本连同边界编码下来”每字节要多少比特。``loss`` 的 metrics 里有 ``ce`` 时用它
    （例如蒸馏的损失不是交叉熵），否则用损失本身；目标带权重、或损失不按词元计数（偏好对）时没有这个量。

    Args:
        loss, collate, count: 见 :class:`minimind.trainer.recipe.Recipe`。
        byte_lengths: ``[V]`` 每个词元的字节数；``None`` 时不算每字节比特数。
        max_rows: 至多用多少行（固定的随机子集）；0 表示全部。
        should_stop: 返回 True 时立刻放弃（收到了退出信号）。

    Returns:
        ``{"val_loss", "val_bpb"?}``，以及 metrics 各项的平均 ``val_<名字>``；被放弃时返回 None。
    """
    was_training = model.training
    model.eval()
    rows = epoch_order(len(val_ds), 0, 0)[: max_rows or None].sort().values[rank() :: world_size()].tolist()
    sums = torch.zeros(5, dtype=torch.float64)  # 损失、目标数、负对数似然、字节数、放弃
    extras: dict[str, list[float]] = {}  # 各项 metrics 的 [和, 个数]
    try:
        with preserved_rng(device), autocast_context(device, dtype):
            for start in range(0, len(rows), batch_size):
                if should_stop():
                    sums[4] = 1
                    break
                batch = collate([val_ds[i] for i in rows[start : start + batch_size]])
                loss_sum, metrics = loss(model, to_device(batch, device, dtype))
                number = count(batch)
                sums[0] += float(loss_sum)
                sums[1] += number
                for name, value in metrics.items():
                    pair = value if isinstance(value, tuple) else (value, number)
                    extras[name] = [a + float(b) for a, b in zip(extras.get(name, (0.0, 0.0)), pair)]
                if byte_lengths is not None and per_token(batch, number):
                    ce = metrics.get("ce", loss_sum)
                    sums[2] += float(ce[0] if isinstance(ce, tuple) else ce)
                    sums[3] += count_bytes(batch, byte_lengths)
    finally:
        model.train(was_training)
    on_device = sums.to(device, stat_dtype(device))
    total, number, nll, n_bytes, stopped = all_reduce_sum(on_device).tolist()
    if stopped:
        return None
    result = {"val_loss": total / max(number, 1.0)}
    if n_bytes:
        result["val_bpb"] = nll / math.log(2) / n_bytes
    parts = gather_objects(extras)  # 行数少时有的进程一行也没分到，没有这些项
    for name in dict.fromkeys(name for part in parts for name in part):
        total, number = map(sum, zip(*(part[name] for part in parts if name in part)))
        if number:  # 一条也没有的（KTO 的验证集只有好的）不是 0，是没有
            result[f"val_{name}"] = total / max(number, 1.0)
    return result


def per_token(batch: dict[str, Any], count: float) -> bool:
    """损失是不是目标词元上不带权重的和。"""
    return "labels" in batch and "loss_weights" not in batch and count == count_targets(batch)


# ---------------------------------------------------------------- 训练途中


def guess_evaluation(recipe: Recipe, data: Data, state: Progress, most: int) -> float:
    """还没验证过时，猜一次验证（至多 ``most`` 行，0 是全部）抵多少个训练步。"""
    if data.val is None:  # 只有 on_eval：强化学习作答留出的题，与一步的采样相当
        return 0.0 if recipe.on_eval is None else 1.0
    rows = min(len(data.val), most or len(data.val))
    # 验证只有前向，约为训练的三分之一
    return rows / (state.global_batch * state.accumulation) / 3


def owes_evaluation(run: Run) -> bool:
    """续训点该有一次验证而日志里没有：上次停在存盘与验证之间，要补上。"""
    state, log = run.state, run.journal.log
    wanted = state.step > 0 and state.owes_evaluation() and run.evaluates
    return broadcast_object(bool(wanted and log and state.step not in log.evaluated_steps))


def evaluate(run: Run, archive: Archive, stop: StopSignal) -> bool:
    """验证并记录；此前已存盘，验证出了错也不丢训练成果。

    Returns:
        是否做完；收到退出信号就半途放弃，续训时会补上。
    """
    state, recipe, result, shown = run.state, run.recipe, {}, dict(run.exhibits)
    with run.meter.pause("eval"):
        if run.data.val is not None:
            lengths = None if run.tokenizer is None else torch.from_numpy(token_byte_lengths(run.tokenizer))
            result = validate(
                run.model,
                run.data.val,
                recipe.loss,
                recipe.collate,
                count=recipe.count,
                batch_size=run.args.batch_size,
                device=run.device,
                dtype=run.dtype,
                byte_lengths=lengths,
                max_rows=run.args.val_max_rows,
                should_stop=lambda: stop.requested,
            )
            if result is None:
                return False
        if recipe.on_eval is not None:
            if is_main_process():
                with preserved_rng(run.device):
                    run.model.eval()
                    for key, value in recipe.on_eval(run.model, state.step).items():
                        (result if isinstance(value, int | float) else shown)[key] = value
                    run.model.train()
            barrier()
        shown = run.samples.take(run.model, run.device, shown) if run.samples else {}
    state.metrics = result
    if is_main_process() and state.saved_step == state.step:
        write_sidecar(recipe.weights, archive.sidecar())
        archive.keep_best(result)
    if shown:  # 先写：验证的那一行在，样例一定在
        run.journal.write({"step": state.step, **shown}, state.step)
    run.journal.write(
        {"step": state.step, "epoch": state.epoch_for_people, **result, "time": state.seconds}, state.step
    )
    words = {"val_loss": "损失", "val_bpb": "每字节比特数"}
    say(f"验证（第 {state.step} 步）：" + "，".join(f"{words.get(k, k)} {v:.4f}" for k, v in result.items()))
    if run.samples:
        run.samples.show(shown)
    return True
