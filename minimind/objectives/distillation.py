"""蒸馏目标：让学生的分布靠近教师的分布，纯函数加一个不存整块 ``[N, V]`` 的驱动。

记 p、q 为教师、学生在温度 T 下的分布（logits / T 之后 softmax）::

    L = α·CE(q₁, 真词) + (1 − α)·T²·D(p, q)        Hinton 2015：乘 T²，梯度的大小才不随温度变

===========  ====================================  ==================================================
forward      KL(p‖q)                               教师会说的都要覆盖到（默认）
reverse      KL(q‖p)                               学生只挑自己说得好的那部分说（MiniLLM，Gu 2023）
jsd          β·KL(p‖m) + (1−β)·KL(q‖m)             广义 Jensen–Shannon，m = β·p + (1−β)·q（GKD，Agarwal 2024，
                                                   式 1）；β→0、1 时方向趋于前两种
===========  ====================================  ==================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.model.kernels import autocast_off, compute_dtype, matmul_nt

DIVERGENCES = ("forward", "reverse", "jsd")

# 一块多少行：CPU 上三块 [c, V] 的 fp32 要留在缓存附近；卡上则要大矩阵
CPU_CHUNK, DEVICE_CHUNK = 256, 2048
# 末尾不满的一块补零到它的倍数：oneDNN 给每种形状各存一份内核，目标数每步不同，bf16 下四十步就多占 0.8 GB
ROW_MULTIPLE = 64

# (学生 logits [c, V] 带梯度, 教师 logits [c, V], 目标 [c]) -> 0 维损失和与要记录的各项（0 维）
ChunkLoss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]


def divergence(
    student_logits: Tensor, teacher_logits: Tensor, kind: str = "forward", *, jsd_beta: float = 0.5
) -> Tensor:
    """逐位置的 D(p, q)，``[N]`` fp32；两边的 logits 都是 ``[N, V]``，温度由调用者先除好。

    Raises:
        ValueError: 不认识的 ``kind``，或 ``jsd_beta`` 不在 0 与 1 之间。
    """
    student = F.log_softmax(student_logits.float(), dim=-1)
    teacher = F.log_softmax(teacher_logits.float(), dim=-1)
    if kind == "forward":
        return kl(teacher, student)
    if kind == "reverse":
        return kl(student, teacher)
    if kind != "jsd":
        raise ValueError(f"不认识的散度 {kind!r}，可选：{'、'.join(DIVERGENCES)}")
    if not 0 < jsd_beta < 1:
        raise ValueError(f"jsd_beta 是 {jsd_beta}，应在 0 与 1 之间（不含）")
    mixture = torch.logaddexp(teacher + math.log(jsd_beta), student + math.log1p(-jsd_beta))
    return jsd_beta * kl(teacher, mixture) + (1 - jsd_beta) * kl(student, mixture)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p‖q)，输入是对数概率 ``[N, V]``，输出 ``[N]``。"""
    return (p.exp() * (p - q)).sum(-1)


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    *,
    alpha: float = 0.2,
    temperature: float = 1.0,
    kind: str = "forward",
    jsd_beta: float = 0.5,
    with_ce: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """目标词元上的损失和，与其中的交叉熵、散度各自的和（不带系数与 T²）。

    Args:
        student_logits, teacher_logits: ``[N, V]``。
        targets: ``[N]``，真正的下一个词元。
        alpha: 交叉熵的份量。
        temperature: T。
        with_ce: 假表示没有“真正的下一个词”（学生自己写的回答）：损失只剩散度一项，系数不变。
    """
    ce = F.cross_entropy(student_logits.float(), targets, reduction="sum")
    parts = (logits / temperature for logits in (student_logits, teacher_logits))
    distance = divergence(*parts, kind, jsd_beta=jsd_beta).sum()
    loss = (1 - alpha) * temperature**2 * distance
    if with_ce:
        loss = loss + alpha * ce
    return loss, {"ce": ce.detach(), "divergence": distance.detach()}


class _Chunked(torch.autograd.Function):
    """一块一块地算两边的 logits、损失与学生两个输入的梯度；反向只乘一个标量。"""

    @staticmethod
    def forward(ctx, hidden, weight, teacher_hidden, teacher_weight, targets, loss_of, chunk, need_grad):
        dtype, teacher_dtype = (compute_dtype(t) for t in (hidden, teacher_hidden))
        w, teacher_w = weight.detach().to(dtype), teacher_weight.detach().to(teacher_dtype)
        grad_hidden = torch.empty_like(hidden) if need_grad else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_grad else None
        totals: list[Tensor] = []
        with autocast_off(hidden):
            for start in range(0, len(hidden), chunk):
                rows = slice(start, start + chunk)
                y = targets[rows]
                n, h = len(y), pad_rows(hidden[rows].detach().to(dtype))
                teacher_logits = matmul_nt(pad_rows(teacher_hidden[rows].to(teacher_dtype)), teacher_w)[:n]
                with torch.enable_grad():
                    logits = matmul_nt(h, w)[:n].float().requires_grad_(need_grad)
                    loss, parts = loss_of(logits, teacher_logits.float(), y)
                if need_grad:
                    (grad,) = torch.autograd.grad(loss, logits)
                    grad = pad_rows(grad.to(dtype))
                    grad_hidden[rows] = matmul_nt(grad, w.t())[:n]
                    grad_weight += matmul_nt(grad.t(), h.t())
                values = [loss.detach(), *parts.values()]
                totals = [a + b for a, b in zip(totals, values)] if totals else values
        if need_grad:
            ctx.save_for_backward(grad_hidden, grad_weight)
            ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(*totals[1:])
        ctx.set_materialize_grads(False)
        return tuple(totals)

    @staticmethod
    def backward(ctx, grad_out, *_):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_out, (grad_weight * grad_out).to(ctx.weight_dtype), *([None] * 6)


def pad_rows(x: Tensor) -> Tensor:
    """``[n, D]`` 补零到 :data:`ROW_MULTIPLE` 的整数倍行。"""
    return F.pad(x, (0, 0, 0, -len(x) % ROW_MULTIPLE))


def chunked_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    targets: Tensor,
    loss_of: ChunkLoss,
    *,
    names: tuple[str, ...] = ("ce", "divergence"),
    chunk: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """在隐藏状态上算 ``loss_of(hidden @ weightᵀ, teacher_hidden @ teacher_weightᵀ, targets)``，值与梯度都和整块算相同。

    整块 ``[N, V]`` 从不存在：N = 4096、V = 6400 时两边 logits、两个对数概率与梯度在 fp32 下各要 105 MB。

    Args:
        hidden: ``[N, H_s]``，学生目标位置上的末层隐藏状态；weight: ``[V, H_s]`` 学生的输出头。
        teacher_hidden: ``[N, H_t]``；teacher_weight: ``[V, H_t]``；教师不求梯度。
        targets: ``[N]``。
        loss_of: 返回的各项必须依次叫 ``names``。
        chunk: 一块多少行。

    Returns:
        ``(损失和, {名字: 和})``，都是 0 维。
    """
    if chunk is None:
        chunk = CPU_CHUNK if hidden.device.type == "cpu" else DEVICE_CHUNK
    if not len(targets):  # 一个目标也没有：损失为 0，图还连着
        return (hidden.sum() + weight.sum()) * 0.0, {name: hidden.new_zeros(()) for name in names}
    need_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss, *parts = _Chunked.apply(
        hidden, weight, teacher_hidden, teacher_weight, targets, loss_of, chunk, need_grad
    )
    return loss, dict(zip(names, parts))
