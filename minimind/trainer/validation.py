"""验证：目标词元的平均损失，以及与分词器无关的每字节比特数（bits per byte）。"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minimind.dataset.collate import to_device
from minimind.runtime.device import autocast_context, preserved_rng, stat_dtype
from minimind.runtime.distributed import all_reduce_sum, gather_objects, rank, world_size
from minimind.trainer.loader import epoch_order
from minimind.trainer.recipe import Batch, LossResult, count_targets


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
        result[f"val_{name}"] = total / max(number, 1.0)
    return result


def per_token(batch: dict[str, Any], count: float) -> bool:
    """损失是不是目标词元上不带权重的和。"""
    return "labels" in batch and "loss_weights" not in batch and count == count_targets(batch)
