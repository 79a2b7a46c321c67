"""强化学习的目标函数：优势怎么算、损失是什么，全是张量的纯函数，三个配方共用。

记号：一步里共 R 条回答、N 个回答词元（含结束符）。逐词元的量排成一列 ``[N]``，一条接一条，不填充；
``lengths [R]`` 是各条的词元数，和为 N。对数概率都在采样温度下取。
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

LOSS_TYPES = ("dapo", "grpo", "dr_grpo", "bnpo", "cispo", "gspo")
# 截断的上下限 1 − ε、1 + ε_high，没有写明时的；gspo 的比值是几何平均，离 1 近得多（Zheng 2025，5.1 节）
CLIPS = {"cispo": (0.2, 5.0), "gspo": (3e-4, 4e-4)}
DEFAULT_CLIP = (0.2, 0.28)
SCALES = ("group", "batch", "none")
# 除以标准差时垫上的数：Shao 2024 与 TRL 的取值
SCALE_EPSILON = 1e-4


# ---------------------------------------------------------------- 统计


def moments(values: Tensor) -> Tensor:
    """``[个数, 和, 平方和]``，fp64；各进程的相加就是全局的。"""
    values = values.double()
    return torch.stack([values.new_tensor(values.numel()), values.sum(), values.square().sum()])


def mean_and_std(totals: Tensor) -> tuple[float, float]:
    """由 :func:`moments` 得平均与标准差（除以 n − 1）；不足两个数时标准差记 0。"""
    n, total, squares = totals.tolist()
    mean = total / n if n else 0.0
    variance = (squares - n * mean * mean) / (n - 1) if n > 1 else 0.0
    return mean, max(variance, 0.0) ** 0.5


def whiten(values: Tensor, totals: Tensor, epsilon: float = 1e-8) -> Tensor:
    """``(x − 平均) / (标准差 + ε)``，平均不加回去；``totals`` 是所有进程合起来的 :func:`moments`。"""
    mean, std = mean_and_std(totals)
    return (values - mean) / (std + epsilon)


def explained_variance(residuals: Tensor, targets: Tensor) -> float:
    """预测解释了方差的几成：``1 − Var(R − V) / Var(R)``；``R`` 没有差别时记 0。

    1 是完全预测对，0 是和报平均数一样，负数是还不如报平均数。

    Args:
        residuals, targets: ``R − V`` 与 ``R`` 的 :func:`moments`，可以是各进程合起来的。
    """
    (_, left), (_, whole) = mean_and_std(residuals), mean_and_std(targets)
    return 1 - (left / whole) ** 2 if whole > 1e-6 else 0.0


# ---------------------------------------------------------------- 优势


def group_advantages(
    rewards: Tensor, num_generations: int, scale: str = "group", totals: Tensor | None = None
) -> Tensor:
    """组内相对优势（Shao 2024，arXiv 2402.03300，4.1.2 节）：A = (r − 组平均) / (标准差 + 1e-4)。

    Args:
        rewards: ``[R]``，同一提示的 ``num_generations`` 条相邻。
        scale: 除以谁的标准差：``group`` 本组的，``batch`` 整批的（Hu 2025，REINFORCE++），``none`` 不除（Liu 2025，
            Dr. GRPO：除以组标准差会偏爱几乎全对或全错的题）。
        totals: ``batch`` 时给所有进程合起来的 :func:`moments`；不给就用 ``rewards`` 自己的。

    Returns:
        ``[R]``；全组同分的是 0。
    """
    groups = rewards.view(len(rewards) // num_generations, num_generations)  # 可以一条也没有
    centered = groups - groups.mean(dim=1, keepdim=True)
    if scale == "group" and num_generations > 1 and len(groups):
        centered = centered / (groups.std(dim=1, keepdim=True) + SCALE_EPSILON)
    elif scale == "batch":
        centered = centered / (
            mean_and_std(moments(rewards) if totals is None else totals)[1] + SCALE_EPSILON
        )
    return centered.flatten()


def zero_spread(rewards: Tensor, num_generations: int) -> Tensor:
    """``[R / num_generations]`` bool：哪些组全组同分，没有可学的。"""
    groups = rewards.view(len(rewards) // num_generations, num_generations)
    return (groups.amax(dim=1) - groups.amin(dim=1)) <= 1e-8


def token_rewards(
    scores: Tensor, logp: Tensor, ref_logp: Tensor, lengths: list[int], kl_coef: float
) -> Tensor:
    """逐词元奖励（Ouyang 2022，式 2）：每个词元 −kl_coef·(logp − logp_ref)，整条的得分加在最后一个词元上。

    Args:
        scores: ``[R]``。
        logp, ref_logp: ``[N]``。

    Returns:
        ``[N]``。
    """
    rewards = -kl_coef * (logp - ref_logp)
    last = torch.tensor(lengths, dtype=torch.int64).cumsum(0) - 1
    return rewards.index_add(0, last.to(rewards.device), scores.to(rewards))


def gae(
    rewards: Tensor, values: Tensor, lengths: list[int], gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """广义优势估计（Schulman 2016，arXiv 1506.02438，式 16）::

        δ_t = r_t + γ·V_{t+1} − V_t，   A_t = δ_t + γλ·A_{t+1}，   R_t = A_t + V_t

    最后一个词元之后是终点：V 与 A 都是 0（写到上限被截断的也是，它的得分已经给了）。

    Args:
        rewards, values: ``[N]``；``values[t]`` 是写出第 t 个词元之前的状态的价值。

    Returns:
        优势 ``[N]`` 与回报 ``[N]``。
    """
    if not lengths:  # 没有分到样本的进程
        return rewards, values
    padded_rewards, padded_values = (  # [R, T]，右侧补零：补的地方 δ = 0，正好充当终点
        pad_sequence(x.split(lengths), batch_first=True) for x in (rewards, values)
    )
    advantages, future = torch.zeros_like(padded_rewards), padded_rewards.new_zeros(len(lengths))
    next_value = future
    for t in range(padded_rewards.shape[1] - 1, -1, -1):
        delta = padded_rewards[:, t] + gamma * next_value - padded_values[:, t]
        future = delta + gamma * lam * future
        advantages[:, t], next_value = future, padded_values[:, t]
    flat = torch.cat([row[:n] for row, n in zip(advantages, lengths)])
    return flat, flat + values


# ---------------------------------------------------------------- 逐词元损失


def clipped_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, epsilon: float = 0.2, epsilon_high: float = 0.28
) -> tuple[Tensor, Tensor]:
    """截断的策略损失（Schulman 2017，arXiv 1707.06347，式 7；上限另设见 Yu 2025，DAPO，式 10）::

        L = − min(ρ·A, clip(ρ, 1 − ε, 1 + ε_high)·A)，   ρ = exp(logp − old_logp)

    Args:
        logp: ``[N]``，现在的策略，带梯度；``old_logp`` 采样时的。
        advantages: ``[N]``。

    Returns:
        损失 ``[N]``，以及 ``[N]`` bool：哪些词元因截断而没有梯度。
    """
    ratio = (logp - old_logp).exp()
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon_high) * advantages)
    clipped = ((ratio < 1 - epsilon) & (advantages < 0)) | ((ratio > 1 + epsilon_high) & (advantages > 0))
    return loss, clipped


def cispo_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, epsilon_high: float = 5.0
) -> tuple[Tensor, Tensor]:
    """CISPO（MiniMax-M1，arXiv 2506.13585，式 4）：L = −sg(min(ρ, ε_high))·A·logp。

    截断的只是权重，每个词元都有梯度；形状与返回同 :func:`clipped_loss`。
    """
    ratio = (logp.detach() - old_logp).exp()
    return -ratio.clamp(max=epsilon_high) * advantages * logp, (ratio > epsilon_high) & (advantages > 0)


def gspo_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    lengths: list[int],
    epsilon: float = 3e-4,
    epsilon_high: float = 4e-4,
) -> tuple[Tensor, Tensor]:
    """GSPO（Zheng 2025，arXiv 2507.18071，式 5 与 7）：比值是整条回答的，截断也是整条的::

        s = exp( (1/|y|)·Σ_t (logp − old_logp) )，   L = − min(s·A, clip(s, 1 − ε, 1 + ε_high)·A)

    奖励给的是整条回答，重要性权重也就该是整条的；开 |y| 次方，长短回答的比值才在同一个尺度上。

    Args:
        logp, old_logp, advantages: ``[N]``；一条之内的优势相同。
        lengths: 各条的词元数，和为 N。

    Returns:
        ``[N]`` 的损失与是否截断，同一条里处处相等：按 1 / 本条长度加权求和，就是逐条的损失与梯度。
    """
    per_row = torch.tensor(lengths, device=logp.device)
    rows = torch.repeat_interleave(torch.arange(len(lengths), device=logp.device), per_row)
    log_ratio = logp - old_logp
    mean = log_ratio.new_zeros(len(lengths)).index_add(0, rows, log_ratio) / per_row.clamp_min(1)
    # 式 5 的比值就是 clipped_loss 的比值，只是 logp − old_logp 换成了本条的平均
    return clipped_loss(mean[rows], torch.zeros_like(logp), advantages, epsilon, epsilon_high)


def k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """KL(π‖π_ref) 的逐词元估计（Schulman 2020，http://joschu.net/blog/kl-approx.html）：无偏且不为负。

    ``e^d − d − 1``，``d = ref_logp − logp``；``[N]``。
    """
    d = ref_logp - logp
    return d.exp() - d - 1


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float = 0.2) -> Tensor:
    """价值损失 ``[N]``：0.5·max((V − R)², (clip(V, V_old ± clip) − R)²)（Schulman 2017 的公开实现）。"""
    clipped = values.clamp(old_values - clip, old_values + clip)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())


# ---------------------------------------------------------------- 归约


def token_weights(lengths: list[int], loss_type: str, max_length: int) -> tuple[Tensor, float]:
    """各词元的权重与这一微批次的“个数”：整步的损失 = Σ 权重·损失 / Σ 个数。

    ============  ==================  ============  ========================================================
    loss_type     权重                个数          意思
    ============  ==================  ============  ========================================================
    dapo、cispo   1                   词元数        全步的词元平均，长短回答的每个词元一样重（Yu 2025，式 8）
    grpo、gspo    1 / 本条长度        条数          先逐条平均再对条平均，长回答的词元轻（Shao 2024，式 3）
    dr_grpo       1 / max_length      条数          除以常数，没有长度偏向（Liu 2025，arXiv 2503.20783）
    bnpo          1 / 微批次词元数    1             微批次内词元平均，再对微批次平均（TRL）
    ============  ==================  ============  ========================================================

    Args:
        lengths: 微批次里各条回答的词元数。
        max_length: 生成长度的上限，只有 dr_grpo 用。

    Returns:
        ``[N]`` fp32 与个数。
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"没有 loss_type {loss_type!r}，有 {'、'.join(LOSS_TYPES)}")
    n, total = len(lengths), sum(lengths)
    if loss_type in ("dapo", "cispo"):
        return torch.ones(total), float(total)
    if loss_type == "bnpo":
        return torch.full((total,), 1 / max(total, 1)), float(total > 0)
    if loss_type == "dr_grpo":
        return torch.full((total,), 1 / max_length), float(n)
    per_row = torch.tensor(lengths, dtype=torch.float32)
    return torch.repeat_interleave(1 / per_row, per_row.long()), float(n)


def grpo_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    loss_type: str = "dapo",
    epsilon: float | None = None,
    epsilon_high: float | None = None,
    beta: float = 0.0,
    ref_logp: Tensor | None = None,
    lengths: list[int] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """GRPO 一族的损失：Σ w·(策略损失 + beta·k3)，除以个数就是损失；见 :func:`token_weights`。

    Args:
        logp, old_logp, advantages, weights, ref_logp: ``[N]``；``beta`` 为 0 时不需要 ``ref_logp``。
        epsilon, epsilon_high: 不给则看 :data:`CLIPS`，其余是 :data:`DEFAULT_CLIP`。
        lengths: 各条的词元数，和为 N；只有 gspo 用。

    Returns:
        0 维的损失和，与各指标的和：``clip_share``、``kl``（有参考模型时）。
    """
    low, high = CLIPS.get(loss_type, DEFAULT_CLIP)
    low, high = low if epsilon is None else epsilon, high if epsilon_high is None else epsilon_high
    if loss_type == "cispo":
        loss, clipped = cispo_loss(logp, old_logp, advantages, high)
    elif loss_type == "gspo":
        if lengths is None:
            raise ValueError("gspo 的比值是整条的，要给出 lengths")
        loss, clipped = gspo_loss(logp, old_logp, advantages, lengths, low, high)
    else:
        loss, clipped = clipped_loss(logp, old_logp, advantages, low, high)
    sums = {"clip_share": clipped.sum()}
    if beta:
        kl = k3(logp, ref_logp)
        loss, sums["kl"] = loss + beta * kl, kl.detach().sum()
    return (loss * weights).sum(), sums
