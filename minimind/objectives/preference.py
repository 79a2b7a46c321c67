"""偏好目标：由一对回答的对数概率算损失，纯函数，不认识模型与数据。

记 π 为正在训练的策略、μ 为参考模型、y_w 与 y_l 为好坏两个回答，序列的对数概率是目标词元上的和::

    Δ_w = log π(y_w|x) − log μ(y_w|x)，  Δ_l 同理，   h = Δ_w − Δ_l

=============  =============================================  ==========================================
sigmoid        −(1−ε)·log σ(β·h) − ε·log σ(−β·h)               Rafailov 2023，式 7；ε > 0 是保守 DPO（Mitchell 2023）
sigmoid_norm   同上，h 换成 Δ_w/|y_w| − Δ_l/|y_l|               长度归一；β 要大得多（约 2 起）
ipo            (Δ_w/|y_w| − Δ_l/|y_l| − 1/(2β))²               Azar 2023，式 17，按词元平均；没有 σ，h 不会越推越远
=============  =============================================  ==========================================
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind.dataset.collate import target_places
from minimind.objectives.logprobs import sequence_sums, target_logits

LOSS_TYPES = ("sigmoid", "sigmoid_norm", "ipo")


class SequenceScores(NamedTuple):
    """每条回答的对数概率之和与目标数，都是 ``[S]`` fp32；aux_loss 是混合专家的负载均衡损失（0 维）。"""

    logps: Tensor
    lengths: Tensor
    aux_loss: Tensor


def sequence_logprobs(model: nn.Module, batch: dict[str, Any]) -> SequenceScores:
    """一次前向，``batch`` 的每一行是一条回答（见 :func:`minimind.dataset.collate.collate_dpo`）。

    Args:
        model: 模型或它的 DDP 包装。
        batch: ``input_ids``、``labels`` 为 ``[S, L]``，labels 未移位，-100 不是目标。
    """
    predicted = target_logits(model, batch)
    rows = target_places(batch) // batch["labels"].shape[1]  # 第几行；batch 里的段还包括填充
    logps = predicted.logprobs()
    size = len(batch["labels"])
    lengths = sequence_sums(torch.ones_like(logps), rows, size)
    return SequenceScores(sequence_sums(logps, rows, size), lengths, predicted.aux_loss)


class PreferenceLoss(NamedTuple):
    """逐对的结果，都是 ``[B]``：losses 有梯度；rewards 是 β·Δ，不带梯度，只用来看。"""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor

    def metrics(self) -> dict[str, Tensor]:
        """记录用的四个数，都是对偏好对求的和：accuracy（好的隐含回报更高；打平算一半）、margin（两者之差）、
        reward_chosen、reward_rejected。"""
        margin = self.chosen_rewards - self.rejected_rewards
        return {
            "accuracy": ((margin.sign() + 1) / 2).sum(),
            "margin": margin.sum(),
            "reward_chosen": self.chosen_rewards.sum(),
            "reward_rejected": self.rejected_rewards.sum(),
        }


def preference_loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    lengths: Tensor,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """偏好损失。

    Args:
        policy_logps, reference_logps: ``[2B]``，前 B 条是好的，后 B 条是同样次序的坏的；对目标词元求过和。
        lengths: ``[2B]`` 目标词元数；只有按长度归一的两种用到。
        beta: 离参考模型多近：大则近。
        loss_type: :data:`LOSS_TYPES` 之一。
        label_smoothing: ε，假定有这么大比例的标注写反了；只对两种 sigmoid 有意义。

    Raises:
        ValueError: 不认识的 ``loss_type``。
    """
    ratios = policy_logps - reference_logps
    rewards = beta * ratios.detach()
    scores = ratios if loss_type == "sigmoid" else ratios / lengths.clamp_min(1)
    chosen, rejected = scores.chunk(2)
    h = chosen - rejected
    if loss_type == "ipo":
        losses = (h - 1 / (2 * beta)).square()
    elif loss_type in LOSS_TYPES:
        losses = -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)
    else:
        raise ValueError(f"不认识的 loss_type {loss_type!r}，可选：{'、'.join(LOSS_TYPES)}")
    return PreferenceLoss(losses, *rewards.chunk(2))
