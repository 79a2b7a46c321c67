"""学习率日程：预热之后，``wsd`` 先平稳、末段线性降到零；``cosine`` 余弦降到一成（旧项目的做法）。"""

from __future__ import annotations

import math


def lr_at(
    step: float,
    total: float,
    *,
    peak: float,
    schedule: str = "wsd",
    warmup_ratio: float = 0.02,
    decay_ratio: float = 0.3,
) -> float:
    """进度 ``step / total`` 处的学习率；纯函数。

    ``step`` 与 ``total`` 只看比值，单位随意：训练循环用样本数，进程数变了日程也不跳。循环取每个优化步的
    *中点*（例如第 0 步取 0.5），于是第一步不为零、最后一步也不为零，预热与衰减的面积恰好是线性的。

    Args:
        peak: 最高学习率。
        warmup_ratio: 线性预热占总量的比例。
        decay_ratio: ``wsd`` 末段线性衰减占总量的比例；从头平稳到尾取 0。

    Raises:
        ValueError: 不认识的 ``schedule``。
    """
    progress = min(max(step / total, 0.0), 1.0) if total > 0 else 1.0
    warm = min(1.0, progress / warmup_ratio) if warmup_ratio > 0 else 1.0
    if schedule == "wsd":
        shape = min(1.0, (1.0 - progress) / decay_ratio) if decay_ratio > 0 else 1.0
    elif schedule == "cosine":
        after_warmup = max(progress - warmup_ratio, 0.0) / max(1.0 - warmup_ratio, 1e-9)
        shape = 0.1 + 0.45 * (1.0 + math.cos(math.pi * after_warmup))
    else:
        raise ValueError(f"不认识的学习率日程 {schedule!r}，可选 wsd、cosine")
    return peak * min(warm, shape)
