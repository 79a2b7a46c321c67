"""LoRA（Hu et al. 2021，arXiv 2106.09685）：底座不动，只学一个低秩的增量。

    y = W·x + (alpha / r) · B·(A·x)，   A [r, in]，B [out, r]，r 远小于 in、out

A 随机（Kaiming 均匀分布，与作者的实现相同），B 从零开始，所以加上 LoRA 的那一刻模型的输出一位不变。
增量 (alpha / r)·B·A 与 W 形状相同，训练完可以加进 W（合并），推理不多花一次乘法；几个 LoRA 的增量可以相加。

参数名接在底座的名字后面：``model.layers.0.self_attn.q_proj.lora.A.weight``，与公共项目的文件相同；
底座自己的名字不变。公共项目只在方阵（q_proj、o_proj）上加，且没有 alpha（相当于 alpha = r）。
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minimind.model.kernels import linear
from minimind.model.model_minimind import Linear

# 注意力与前馈里的全部线性层；混合专家的每个专家（含共享专家）也用这些名字
LINEAR_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# 路由器直接读 weight、输出头与词嵌入共用 weight，都不经过自己的 forward，加上去也不会生效
EXCLUDED = ("gate", "lm_head")
MARK = ".lora."


class LoRA(nn.Module):
    """增量里的两个小矩阵：``A`` [in → r]，``B`` [r → out]。"""

    def __init__(self, in_features: int, out_features: int, rank: int, **factory):
        super().__init__()
        self.A = Linear(in_features, rank, bias=False, **factory)
        self.B = Linear(rank, out_features, bias=False, **factory)
        nn.init.kaiming_uniform_(self.A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out]，还没有乘 alpha / r。"""
        return self.B(self.A(x))


class LoRALinear(nn.Linear):
    """带增量的线性层；``weight``、``bias`` 就是原来那一层的参数，不复制。

    Attributes:
        scale: alpha / r。
        merged: 增量是否已经加进 ``weight``；加进去之后前向与普通线性层相同。
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.lora = LoRA(
            base.in_features, base.out_features, rank, device=base.weight.device, dtype=base.weight.dtype
        )
        self.scale, self.merged = alpha / rank, False
        self.plain_type = type(base)
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out]。"""
        y = linear(x, self.weight, self.bias)
        return y if self.merged else torch.add(y, self.lora(x), alpha=self.scale)

    def delta(self) -> Tensor:
        """增量 (alpha / r)·B·A，fp32 ``[out, in]``。"""
        return self.scale * (self.lora.B.weight.float() @ self.lora.A.weight.float())


@dataclass(frozen=True)
class Adapter:
    """一份 LoRA 权重。

    Args:
        state: ``{模块名.lora.A.weight: [r, in], 模块名.lora.B.weight: [out, r]}``。
        rank, alpha: 秩与缩放；增量乘 alpha / rank。
        modules: 加在哪些模块上。
    """

    state: dict[str, Tensor]
    rank: int
    alpha: float
    modules: tuple[str, ...]


# ---------------------------------------------------------------- 加上、取出、去掉


def target_modules(model: nn.Module, targets: str = "all") -> list[str]:
    """要加 LoRA 的模块名。

    Args:
        targets: ``all`` 注意力与前馈的全部线性层（含各专家）；``square`` 只要输入输出等宽的（公共项目的选法，
            即 q_proj 与 o_proj）；或逗号分隔的层名，如 ``q_proj,v_proj``。

    Raises:
        ValueError: 没有这样的层，或点了不能加的层。
    """
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and MARK not in f".{name}." and _last(name) not in EXCLUDED
    }
    if targets == "all":
        return [name for name in linears if _last(name) in LINEAR_NAMES]
    if targets == "square":
        return [name for name, module in linears.items() if module.in_features == module.out_features]
    wanted = [name.strip() for name in targets.split(",") if name.strip()]
    known = dict.fromkeys(map(_last, linears))
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        what = f"模型里没有可以加 LoRA 的层 {'、'.join(unknown)}" if unknown else "没有写要加在哪些层上"
        raise ValueError(f"{what}；可选 all、square，或这些层名的组合：{'、'.join(known)}")
    return [name for name in linears if _last(name) in wanted]


def apply_lora(model: nn.Module, rank: int = 8, alpha: float = 16.0, targets: str = "all") -> list[str]:
    """给选中的线性层加上 LoRA，冻结其余参数；返回加在哪些模块上。

    Raises:
        ValueError: 秩不是正整数，层名不对，或已经加过。
    """
    if rank < 1 or not alpha > 0:
        raise ValueError(f"rank={rank}、alpha={alpha} 都应当大于 0")
    if lora_layers(model):
        raise ValueError("模型已经加过 LoRA，先 remove_lora")
    names = target_modules(model, targets)
    check_rank(model, names, rank)
    _wrap(model, names, rank, alpha)
    model.requires_grad_(False)
    for layer in lora_layers(model).values():
        layer.lora.requires_grad_(True)
    return names


def check_rank(model: nn.Module, names: Iterable[str], rank: int) -> None:
    """增量 B·A 的秩至多是矩阵的短边，再大的 r 只是多占地方。

    Raises:
        ValueError: 秩超过了所选各层里最大的短边。
    """
    shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in names}
    widest = max(shapes, key=lambda name: min(shapes[name]))
    if rank > min(shapes[widest]):
        raise ValueError(
            f"秩 {rank} 超过各层的短边：最大的是 {widest} {shapes[widest]}，秩至多 {min(shapes[widest])}"
        )


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """``{模块名: 带增量的线性层}``。"""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """只含 A 与 B 的状态字典，键名与公共项目的文件相同。"""
    return {key: value for key, value in model.state_dict().items() if MARK in key}


def remove_lora(model: nn.Module) -> None:
    """换回普通线性层。没合并的增量就此丢掉；合并过的留在 ``weight`` 里。"""
    for name, layer in lora_layers(model).items():
        plain = layer.plain_type(
            layer.in_features, layer.out_features, layer.bias is not None, device="meta"
        )  # 不分配内存，参数马上换成原来的
        plain.weight, plain.bias = layer.weight, layer.bias
        _replace(model, name, plain.train(layer.training))


# ---------------------------------------------------------------- 合并


def effective_weight(linear: nn.Linear) -> Tensor:
    """线性层实际起作用的权重 ``[out, in]``：有没合并的增量就加上。给不经过 ``forward`` 直接取权重的代码用。"""
    if not isinstance(linear, LoRALinear) or linear.merged:
        return linear.weight
    return (linear.weight.float() + linear.delta()).to(linear.weight.dtype)


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """把增量加进 ``weight``（用 fp32 算）；A、B 还在，可以 :func:`unmerge_lora`。"""
    _shift_weights(model, merged=True)


@torch.no_grad()
def unmerge_lora(model: nn.Module) -> None:
    """从 ``weight`` 里减去增量，回到底座（精确到舍入）。"""
    _shift_weights(model, merged=False)


def _shift_weights(model: nn.Module, merged: bool) -> None:
    for layer in lora_layers(model).values():
        if layer.merged != merged:
            sign = 1.0 if merged else -1.0
            layer.weight.copy_(layer.weight.float().add_(layer.delta(), alpha=sign))
            layer.merged = merged


# ---------------------------------------------------------------- 读入一份权重


def parse_adapter(state: Mapping[str, Tensor], alpha: float | None = None) -> Adapter:
    """认出一份 LoRA 权重的秩与位置。

    Args:
        state: 键形如 ``….q_proj.lora.A.weight``。
        alpha: 缩放；``None`` 表示文件里没有（公共项目的文件），按 alpha = r，即增量不缩放。

    Raises:
        ValueError: 键不认识、A 与 B 不成对、或秩不一致，指出键与形状。
    """
    ranks: dict[int, str] = {}
    modules: dict[str, None] = {}
    for key, value in state.items():
        module, mark, part = key.rpartition(MARK)
        if not mark or part not in ("A.weight", "B.weight") or value.ndim != 2:
            shape = tuple(value.shape)
            raise ValueError(f"键 {key}（形状 {shape}）不是 LoRA 的 ….lora.A.weight 或 ….lora.B.weight")
        other = f"{module}{MARK}{'B' if part[0] == 'A' else 'A'}.weight"
        if other not in state:
            raise ValueError(f"有 {key} 而没有 {other}")
        ranks.setdefault(value.shape[0 if part[0] == "A" else 1], f"{key} {tuple(value.shape)}")
        modules[module] = None
    if not modules:
        raise ValueError("里面一个 LoRA 权重也没有")
    if len(ranks) > 1:
        raise ValueError(f"秩不一致：{'，'.join(f'{where} 的秩是 {rank}' for rank, where in ranks.items())}")
    rank = next(iter(ranks))
    return Adapter(dict(state), rank, float(rank if alpha is None else alpha), tuple(modules))


def check_adapter(model: nn.Module, adapter: Adapter) -> None:
    """这份权重能不能加在这个模型上。

    Raises:
        ValueError: 模型里没有对应的层，或形状不符，指出键与两边的形状。
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name in adapter.modules:
        if name not in linears:
            raise ValueError(f"模型里没有线性层 {name}（LoRA 权重里有它的增量）")
        out_features, in_features = linears[name].weight.shape
        for part, wanted in (("A", (adapter.rank, in_features)), ("B", (out_features, adapter.rank))):
            key = f"{name}{MARK}{part}.weight"
            if tuple(adapter.state[key].shape) != wanted:
                raise ValueError(f"{key} 的形状是 {tuple(adapter.state[key].shape)}，当前模型要 {wanted}")
    check_rank(model, adapter.modules, adapter.rank)


def load_adapter(model: nn.Module, adapter: Adapter) -> None:
    """把一份权重装到模型上（没加过 LoRA 就先加上）。

    Raises:
        ValueError: 见 :func:`check_adapter`；或与模型上已有的 LoRA 不同。
    """
    check_adapter(model, adapter)
    present = lora_layers(model)
    if not present:
        _wrap(model, adapter.modules, adapter.rank, adapter.alpha)
        present = lora_layers(model)
    elif set(present) != set(adapter.modules):
        raise ValueError(f"模型上的 LoRA 加在 {len(present)} 层，文件里是 {len(adapter.modules)} 层")
    for layer in present.values():
        if layer.lora.A.out_features != adapter.rank:
            raise ValueError(f"模型上的 LoRA 秩是 {layer.lora.A.out_features}，文件里是 {adapter.rank}")
        layer.scale = adapter.alpha / adapter.rank
    model.load_state_dict(adapter.state, strict=False)


def merge_adapter(model: nn.Module, adapter: Adapter) -> None:
    """把一份权重的增量直接加进底座，不留 LoRA 层；逐份调用即为几份增量之和。"""
    load_adapter(model, adapter)
    merge_lora(model)
    remove_lora(model)


def _wrap(model: nn.Module, names, rank: int, alpha: float) -> None:
    for name in names:
        _replace(model, name, LoRALinear(model.get_submodule(name), rank, alpha))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _last(name: str) -> str:
    return name.rpartition(".")[2]
