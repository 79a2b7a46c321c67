"""优化器：二维隐层矩阵用 Muon，词嵌入、归一化与其余参数用 AdamW，共用一个 ``--learning_rate``。

Muon（Jordan 2024，https://kellerjordan.github.io/posts/muon/）把动量矩阵换成最近的（半）正交矩阵再更新；
更新量乘 0.2·sqrt(max(m, n))（Liu 2025，arXiv 2502.16982），使其均方根与 AdamW 的相当，
于是同一个学习率对两者都合适，不必各调一个。
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# 五次多项式 a·s + b·s³ + c·s⁵ 的系数（Jordan 2024）：在 0 处斜率最大，五步后奇异值落在约 0.7 到 1.2
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
# 与 AdamW 更新量均方根（经验值 0.2 到 0.4）对齐的系数
RMS_MATCH = 0.2
# 梯度的范数低于它的矩阵，更新与衰减都乘 (范数 / 它)²：正交化只看方向，1e-10 的舍入残差也会走满一步。
# 正常训练里单个矩阵的梯度在 1e-5 以上，乘的恰好是 1，一位不变；恰好是 0 的权重一位不动，不衰减
VANISHING = 1e-6
# 名字 → 一句说明；``--optimizer`` 的取值与帮助都从这里来
OPTIMIZERS = {"muon": "矩阵用 Muon，其余用 AdamW", "adamw": "全部用 AdamW"}


def describe_optimizers() -> str:
    """``--help`` 里的一句：每个名字各是什么。"""
    return "，".join(f"{name}（{what}）" for name, what in OPTIMIZERS.items())


def orthogonalize(matrices: Tensor, steps: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """Newton–Schulz 迭代：把每个矩阵的奇异值推到 1 附近，奇异向量不变。

    Args:
        matrices: ``[N, m, n]``，同形状的一批矩阵，一次批量乘法算完。
        steps: 迭代次数，5 次足够。
        dtype: 迭代所用的精度；bfloat16 足够，因为只需要大致正交。

    Returns:
        ``[N, m, n]``，精度为 ``dtype``。
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.size(-2) > matrices.size(-1)
    norm = matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # 先归一再降精度，半精度下不溢出
    x = (matrices / norm).to(dtype)
    x = x.mT if tall else x  # 让 x·xᵀ 是较小的那个方阵
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov 动量 + 正交化更新 + 解耦权重衰减；同形状的矩阵堆在一起做一次批量迭代。

    数值上等同 ``torch.optim.Muon(adjust_lr_fn="match_rms_adamw")``，只是成批计算，
    且迭代精度可选（写在参数组里，随存档保存，续训时不会换精度）。

    Args:
        params: 二维参数。
        lr: 学习率，与 AdamW 同一量级。
        momentum: 动量系数。
        weight_decay: 解耦权重衰减。
        newton_schulz_dtype: 迭代精度，如 ``"float32"``、``"bfloat16"``。

    Attributes:
        found_inf: 与 torch 的融合 AdamW 同名同义：设备上的一个数，为 1 时 ``step`` 什么也不改，主机不必知道；``None`` 照常走。
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        newton_schulz_dtype: str = "float32",
        newton_schulz_steps: int = 5,
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "newton_schulz_dtype": newton_schulz_dtype,
            "newton_schulz_steps": newton_schulz_steps,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            if any(p.ndim != 2 for p in group["params"]):
                raise ValueError("Muon 只接受二维参数；其余参数请交给 AdamW（见 build_optimizer）")

    @torch.no_grad()
    def step(self, closure=None):
        """走一步；没有梯度（``None``）的参数原样不动，梯度是 0 或近乎 0 的不更新或几乎不更新。"""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_shape: dict[tuple, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[tuple(p.shape)].append(p)
            for shape, params in by_shape.items():
                self._step_same_shape(params, shape, group)
        return loss

    def _step_same_shape(self, params: list[Tensor], shape: tuple, group: dict[str, Any]) -> None:
        grads = [p.grad for p in params]
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        momentum, lr = group["momentum"], group["lr"]
        signal = (torch.stack(torch._foreach_norm(grads)) / VANISHING).square().clamp(max=1.0)
        skip = None if self.found_inf is None else self.found_inf == 1
        before = None if skip is None else torch.stack(buffers)
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        nesterov = torch._foreach_lerp(grads, buffers, momentum)  # g·(1-μ) + B·μ
        if skip is not None:  # 用挑选，不用乘 0：梯度可以是 NaN
            torch._foreach_copy_(buffers, torch.where(skip, before, torch.stack(buffers)).unbind())
            del before
        update = orthogonalize(
            torch.stack(nesterov), group["newton_schulz_steps"], getattr(torch, group["newton_schulz_dtype"])
        )
        update = update * signal.to(update.dtype).view(-1, 1, 1)
        if skip is not None:  # 更新是 0，衰减乘 1：加负零、乘一，一位不变
            update, signal = torch.where(skip, 0.0, update), torch.where(skip, 0.0, signal)
        decay = lr * group["weight_decay"]
        keep = torch.where(signal == 1, 1 - decay, 1 - decay * signal) if decay else None
        apply = apply_each if params[0].device.type == "cpu" else apply_stacked  # 逐位相同
        apply(params, update, keep, -lr * RMS_MATCH * max(shape) ** 0.5)


def apply_each(params: list[Tensor], update: Tensor, keep: Tensor | None, scale: float) -> None:
    """各参数 ``[m, n]`` 就地乘上 ``keep [N]`` 里它的那个数（``None`` 不乘），加 ``scale`` 倍的 ``update [N, m, n]``。"""
    if keep is not None:
        torch._foreach_mul_(params, list(keep.unbind()))
    torch._foreach_add_(params, [u.to(p.dtype) for u, p in zip(update, params)], alpha=scale)


def apply_stacked(params: list[Tensor], update: Tensor, keep: Tensor | None, scale: float) -> None:
    """:func:`apply_each`，摞起来算完再放回去。

    各乘各的数，成批的算子会退回逐个发射，卡上发射比算还久：H200 上 26M 的一步 5.9 毫秒，算只要 2.1。
    """
    whole = torch.stack(params)
    if keep is not None:
        whole.mul_(keep.view(-1, 1, 1))
    torch._foreach_copy_(params, list(whole.add_(update, alpha=scale).unbind()))


# 优化器 → 它给走过的每个参数留着的几样：``step`` 是一个数，其余与参数同形；续训时核对
MOMENTS = {Muon: ("momentum_buffer",), torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq")}


class OptimizerPair:
    """把 Muon 与 AdamW 当作一个优化器用：``param_groups``、``step``、``state_dict`` 都合在一起。

    与 ``GradScaler`` 相容（它只看 ``param_groups`` 和 ``step``）。
    """

    def __init__(self, **optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]

    @property
    def found_inf(self) -> Tensor | None:
        """见 :class:`Muon`；设它就是给每一个都设上。"""
        return getattr(next(iter(self.optimizers.values())), "found_inf", None)

    @found_inf.setter
    def found_inf(self, value: Tensor | None) -> None:
        for optimizer in self.optimizers.values():
            optimizer.found_inf = value

    def step(self) -> None:
        for optimizer in self.optimizers.values():
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[name])


def split_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """把可训练参数分成三类：``matrix``（隐层二维矩阵）、``embedding``（词嵌入与输出层）、``vector``（其余）。

    词嵌入逐行稀疏地更新，正交化对它没有意义；共享（tied）的输出层与词嵌入是同一个参数，只出现一次。
    """
    embedding_ids = {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) or name.split(".")[-1] == "lm_head"
    }
    groups: dict[str, list[nn.Parameter]] = {"matrix": [], "embedding": [], "vector": []}
    for p in model.parameters():  # parameters() 已对共享参数去重
        if p.requires_grad:
            kind = "embedding" if id(p) in embedding_ids else "matrix" if p.ndim == 2 else "vector"
            groups[kind].append(p)
    return groups


def split_by_prefix(
    model: nn.Module, params: list[nn.Parameter], lr_scales: Mapping[str, float]
) -> list[tuple[float, list[nn.Parameter]]]:
    """按参数名的前缀再分组，附上学习率的倍数；前缀都不中的是第一组，倍数是 1。

    怎么分只看前缀，不看倍数：续训时换了倍数，优化器的状态仍然逐组对得上。
    """
    names = {id(p): name for name, p in model.named_parameters()}
    groups: dict[str, list[nn.Parameter]] = {"": [], **{prefix: [] for prefix in lr_scales}}
    for p in params:
        groups[next((prefix for prefix in lr_scales if names[id(p)].startswith(prefix)), "")].append(p)
    return [(lr_scales.get(prefix, 1.0), chosen) for prefix, chosen in groups.items() if chosen]


def build_optimizer(
    model: nn.Module,
    args: Any,
    *,
    newton_schulz_dtype: str = "bfloat16",
    lr_scales: Mapping[str, float] | None = None,
) -> torch.optim.Optimizer | OptimizerPair:
    """按 ``args.optimizer`` 建优化器。每个参数组带 ``lr_scale``：实际学习率 = 日程给的学习率 × ``lr_scale``。

    权重衰减只加在隐层矩阵上，不加在归一化、偏置与词嵌入上。

    Args:
        model: 未包装（没有 DDP、compile）的模型。
        args: 需要 ``optimizer learning_rate weight_decay embed_lr_scale muon_momentum adam_beta2``。
        newton_schulz_dtype: Muon 迭代精度。训练用半精度时跟着用（有 AVX512-BF16 的单核上比 fp32 快 3.7 到 4.5 倍），
            训练用 fp32 时也用 fp32：换进程数、换累积方式的结果才能一致到 1e-5。
        lr_scales: 参数名的前缀 → 学习率的倍数（如评论家与策略的学习率不同）。
    """
    groups = split_parameters(model)
    device = next(model.parameters()).device
    lr = args.learning_rate
    # 倍数是配合 Muon 测出来的；全用 AdamW 时各类参数本来就同一个学习率
    embed_scale = args.embed_lr_scale if args.optimizer == "muon" else 1.0

    def make_groups(kind: str, scale: float, **options: float) -> list[dict[str, Any]]:
        return [
            {"params": params, "lr_scale": scale * extra, **options}
            for extra, params in split_by_prefix(model, groups[kind], lr_scales or {})
        ]

    adam_groups = make_groups("embedding", embed_scale, weight_decay=0.0)
    adam_groups += make_groups("vector", 1.0, weight_decay=0.0)
    if args.optimizer == "adamw":
        adam_groups = make_groups("matrix", 1.0, weight_decay=args.weight_decay) + adam_groups

    def adamw() -> torch.optim.AdamW:
        return torch.optim.AdamW(
            adam_groups, lr=lr, betas=(0.9, args.adam_beta2), fused=device.type in ("cpu", "cuda")
        )

    if args.optimizer == "adamw" or not groups["matrix"]:
        return adamw()
    muon = Muon(
        make_groups("matrix", 1.0),
        lr=lr,
        momentum=args.muon_momentum,
        weight_decay=args.weight_decay,
        newton_schulz_dtype=newton_schulz_dtype,
    )
    return OptimizerPair(muon=muon, adamw=adamw()) if adam_groups else muon


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """把日程给出的学习率写进各参数组（乘上各自的 ``lr_scale``）。"""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
