"""目标词元的对数概率：偏好、蒸馏与强化学习都从这里取，算法各自只管怎么用。

只在目标位置上算输出头：回答常常只占一行的小半，词表又有 6400 个词，整块 ``[B, T, V]`` 不必存在。
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind.dataset.collate import IGNORE, model_inputs


class TargetLogits(NamedTuple):
    """目标位置上的预测，按行优先的次序，共 N 个。

    logits: ``[N, V]``，预测 ``targets`` 的那些位置的输出，模型的计算精度。
    targets: ``[N]`` int64。
    rows: ``[N]`` int64，属于第几条：打包的批是第几段（``cu_seqlens``，末尾的填充也占一段），否则是第几行。
    aux_loss: 0 维，混合专家的负载均衡损失（已乘系数），稠密模型为 0。
    """

    logits: Tensor
    targets: Tensor
    rows: Tensor
    aux_loss: Tensor


def target_mask(labels: Tensor) -> Tensor:
    """``[B, T]`` bool：位置 t 为真当且仅当它要预测的 ``labels[:, t + 1]`` 是目标。"""
    return F.pad(labels[:, 1:] != IGNORE, (0, 1), value=False)


def target_rows(batch: dict[str, Any], mask: Tensor) -> Tensor:
    """``[N]`` int64：每个目标属于第几段（打包）或第几行。"""
    flat = mask.flatten().nonzero().squeeze(1)
    if "cu_seqlens" in batch:
        return torch.bucketize(flat, batch["cu_seqlens"][1:].long(), right=True)
    return flat // mask.shape[1]


def target_logits(model: nn.Module, batch: dict[str, Any]) -> TargetLogits:
    """一次前向，只取目标位置上的输出。

    Args:
        model: 模型或它的 DDP 包装（梯度要同步就必须传包装）。
        batch: 有 ``input_ids``、``labels``（``[B, T]``，未移位，-100 不是目标），打包的批还有 ``position_ids``、
            ``cu_seqlens``、``max_seqlen``，左填充的批还有 ``attention_mask``。
    """
    mask = target_mask(batch["labels"])
    out = model(**model_inputs(batch), logits_to_keep=mask)
    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)[mask]
    return TargetLogits(out.logits, targets, target_rows(batch, mask), out.aux_loss)


def selected_logprobs(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """``log softmax(logits / temperature)`` 在目标词元上的值，``[N]`` fp32。

    Args:
        logits: ``[N, V]``；softmax 一律在 fp32 里做。
        targets: ``[N]``。
        temperature: 采样时的温度；强化学习里两边必须相同，比值才有意义。
    """
    return -F.cross_entropy(_tempered(logits, temperature), targets, reduction="none")


def sequence_sums(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """按条求和：``[N]`` → ``[count]``；没有目标的条是 0。"""
    return values.new_zeros(count).index_add(0, rows, values)


@torch.no_grad()
def entropy_of(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """每个位置上分布的熵（自然对数），``[N]`` fp32；只用来看，不求梯度。"""
    scaled = _tempered(logits, temperature)
    probs = scaled.softmax(-1)
    # H = ln Σ eˣ − Σ p·x；归一化常数由最大的那个词反推，比先取对数再乘少走三遍 [N, V]（4096×6400：240 → 110 毫秒）
    normalizer = scaled.amax(-1) - probs.amax(-1).log()
    return normalizer - torch.linalg.vecdot(probs, scaled)


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    """``logits / temperature``，fp32；温度 1（默认）时不白走一遍。"""
    logits = logits.float()
    return logits if temperature == 1.0 else logits / temperature
