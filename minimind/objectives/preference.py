"""偏好目标：由回答的对数概率算损失，纯函数，不认识模型与数据。

记 π 为正在训练的策略、μ 为参考模型、y_w 与 y_l 为好坏两个回答，序列的对数概率是目标词元上的和::

    Δ_w = log π(y_w|x) − log μ(y_w|x)，  Δ_l 同理，   h = Δ_w − Δ_l
    p_w = log π(y_w|x) / |y_w|，         p_l 同理，   odds(p) = e^p / (1 − e^p)

=============  ==============================================  ==========================================
sigmoid        −(1−ε)·log σ(β·h) − ε·log σ(−β·h)                Rafailov 2023，式 7；ε > 0 是保守 DPO（Mitchell 2023）
sigmoid_norm   同上，h 换成 Δ_w/|y_w| − Δ_l/|y_l|                长度归一；β 要大得多（约 2 起）
ipo            (Δ_w/|y_w| − Δ_l/|y_l| − 1/(2β))²                Azar 2023，式 17，按词元平均；没有 σ，h 不会越推越远
orpo           −p_w − β·log σ(log odds(p_w) − log odds(p_l))    Hong 2024，arXiv 2403.07691，式 6、7；不要 μ
simpo          sigmoid 的式子，β·h 换成 β·(p_w − p_l) − γ         Meng 2024，arXiv 2405.14734，式 6；不要 μ
kto            λ_y·(1 − σ(±β·(Δ_y − z0)))，不成对                Ethayarajh 2024，arXiv 2402.01306，式 8；见 :func:`kto_loss`
=============  ==============================================  ==========================================

奖励模型的 :func:`reward_model_loss` 也在这里：把 β·Δ 换成打分头的数，就是同一个分类损失。
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind.dataset.collate import target_places
from minimind.objectives.logprobs import sequence_sums, target_logits

LOSS_TYPES = ("sigmoid", "sigmoid_norm", "ipo", "orpo", "simpo", "kto")
# 不要参考模型的，与标注不成对的
REFERENCE_FREE, UNPAIRED = ("orpo", "simpo"), ("kto",)
# 没有写明 β 时；按词元平均的差小得多，β 要大得多（Meng 2024，表 8：2.0 到 2.5）
BETAS = {"sigmoid_norm": 2.0, "simpo": 2.0}
DEFAULT_BETA = 0.1
# 不是每种损失都用得到的参数 → 用它的损失
USED_BY = {
    "label_smoothing": ("sigmoid", "sigmoid_norm", "simpo"),
    "simpo_gamma": ("simpo",),
    "desirable_weight": UNPAIRED,
    "undesirable_weight": UNPAIRED,
    "cache_reference": tuple(name for name in LOSS_TYPES if name not in REFERENCE_FREE),
}


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
    """逐对的结果，都是 ``[B]``：losses 有梯度；rewards 是 β·Δ（不要参考模型的是 β·p），不带梯度，只用来看。"""

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
    reference_logps: Tensor | None,
    lengths: Tensor,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    gamma: float = 0.0,
) -> PreferenceLoss:
    """成对的偏好损失。

    Args:
        policy_logps, reference_logps: ``[2B]``，前 B 条是好的，后 B 条是同样次序的坏的；对目标词元求过和。
            :data:`REFERENCE_FREE` 的不看 ``reference_logps``。
        lengths: ``[2B]`` 目标词元数；只有 sigmoid 用不到。
        beta: 离参考模型多近：大则近；orpo 的是赔率一项的权重（文中的 λ），simpo 的是打分的倍数。
        loss_type: :data:`LOSS_TYPES` 之一，kto 除外。
        label_smoothing: ε，假定有这么大比例的标注写反了；只对两种 sigmoid 与 simpo 有意义。
        gamma: simpo 的目标间隔 γ：好的要比坏的高出这么多才算够。

    Raises:
        ValueError: 不认识的 ``loss_type``。
    """
    means = policy_logps / lengths.clamp_min(1)
    if loss_type in REFERENCE_FREE:
        scores = ratios = means
    else:
        ratios = policy_logps - reference_logps
        scores = ratios if loss_type == "sigmoid" else ratios / lengths.clamp_min(1)
    rewards = beta * ratios.detach()
    chosen, rejected = scores.chunk(2)
    h = chosen - rejected
    if loss_type == "ipo":
        losses = (h - 1 / (2 * beta)).square()
    elif loss_type == "orpo":
        losses = -chosen - beta * F.logsigmoid(log_odds(chosen) - log_odds(rejected))
    elif loss_type in ("sigmoid", "sigmoid_norm", "simpo"):
        logits = beta * h - (gamma if loss_type == "simpo" else 0.0)
        losses = -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)
    else:
        paired = [name for name in LOSS_TYPES if name not in UNPAIRED]
        raise ValueError(f"不认识的 loss_type {loss_type!r}，可选：{'、'.join(paired)}")
    return PreferenceLoss(losses, *rewards.chunk(2))


def log_odds(logps: Tensor) -> Tensor:
    """对数赔率 ``p − log(1 − e^p)``，``p`` 是按词元平均的对数概率；``p`` 贴近 0（概率为 1）时也是有限的数。"""
    logps = logps.clamp_max(-1e-6)
    return logps - (-logps.expm1()).log()


class KTOLoss(NamedTuple):
    """逐条的结果，都是 ``[S]``：losses 有梯度；rewards 是 β·Δ，不带梯度。"""

    losses: Tensor
    rewards: Tensor

    def metrics(self, desirable: Tensor, threshold: float) -> dict[str, Any]:
        """记录用的三个数：accuracy（好的高于 z0、坏的低于 z0 的比例；相等算一半）、reward_chosen、reward_rejected（各自的平均）。

        Args:
            desirable: ``[S]`` bool。
            threshold: β·z0。
        """
        good = desirable.to(self.rewards)
        right = (self.rewards - threshold).sign() * torch.where(desirable, 1.0, -1.0)
        return {
            "accuracy": ((right + 1) / 2).sum(),
            "reward_chosen": ((self.rewards * good).sum(), int(desirable.sum())),
            "reward_rejected": ((self.rewards * (1 - good)).sum(), int((~desirable).sum())),
        }


def kto_loss(
    ratios: Tensor,
    desirable: Tensor,
    kl: float | Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> KTOLoss:
    """KTO（Ethayarajh 2024，arXiv 2402.01306，式 8）：每个回答只标了好不好，与参考点 z0 比，不与另一个回答比::

        好的 λ_D·(1 − σ(β·(Δ − z0)))，   坏的 λ_U·(1 − σ(β·(z0 − Δ)))

    前景理论的说法：人对得失的感觉是相对一个参考点的，并且越远越迟钝，所以两头都是饱和的 σ。

    Args:
        ratios: ``[S]``，Δ = log π(y|x) − log μ(y|x)，带梯度。
        desirable: ``[S]`` bool。
        kl: z0，KL(π‖μ) 的估计，不为负、不带梯度：不配对的回答（别的提问的）上 Δ 的平均，小于 0 记 0。
        desirable_weight, undesirable_weight: λ_D、λ_U；好坏的条数悬殊时，让 λ·条数 两边相近。
    """
    sign = torch.where(desirable, 1.0, -1.0)
    weight = torch.where(desirable, desirable_weight, undesirable_weight)
    losses = weight * (1 - torch.sigmoid(sign * beta * (ratios - kl)))
    return KTOLoss(losses, beta * ratios.detach())


def reward_model_loss(scores: Tensor, center: float = 0.01) -> PreferenceLoss:
    """奖励模型的损失（Bradley–Terry；Ouyang 2022，式 1）：−log σ(r_w − r_l) + center·(r_w + r_l)²。

    前一项只管两个分数的差，整体加一个常数也不变；后一项（Eisenstein 2023，arXiv 2312.09244，式 4）把零点定在好坏之间。

    Args:
        scores: ``[2B]``，前 B 个是好的，后 B 个是同样次序的坏的。
    """
    chosen, rejected = scores.chunk(2)
    losses = -F.logsigmoid(chosen - rejected) + center * (chosen + rejected).square()
    return PreferenceLoss(losses, chosen.detach(), rejected.detach())
