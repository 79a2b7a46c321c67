"""CPU 上的 int8 权重：占的内存是 fp32 的四分之一，一行一行地解码更快。

每个输出通道一个缩放（对称，−127…127）；激活每行当场量化，所以一行的结果与同批还有谁无关。
整数乘法用 ``torch._int_mm``（oneDNN）。26M 模型全部矩阵乘一遍，单线程 AMD EPYC（AVX512-VNNI）的毫秒数：

    行数           1      8     32     64    256
    fp32         3.2    5.4   11.3   17.9   60.0
    bf16         2.1    3.0    6.1    9.9   31.1
    int8         1.7    4.6    8.1   13.0   48.2

行多时量化激活的几步占了大头，bf16 更快。torch 别的 int8 算子都不合用：``_weight_int8pack_mm`` 一行 1.6 ms，但 32 行
13 ms、256 行 146 ms；``onednn::qlinear_pointwise`` 与 ``quantized::linear_dynamic`` 的激活整批共用一个缩放，
一行的结果会随同批的别人变。
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from minimind.errors import UserError


@functools.cache
def int8_available() -> bool:
    """这台机器的 int8 矩阵乘是否精确：没有 VNNI 的处理器可能在中途饱和，取最大的数核对。"""
    x = torch.full((2, 64), 127, dtype=torch.int8)
    weight = torch.full((8, 64), -127, dtype=torch.int8)
    try:
        out = torch._int_mm(x, weight.t())
    except (RuntimeError, NotImplementedError):
        return False
    return bool((out == -127 * 127 * 64).all())


def int8_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x [N, 入]``、``codes [出, 入]`` int8、``scale [出]`` → ``[N, 出]``，精度同 ``x``。"""
    rows = x.float()
    step = torch.linalg.vector_norm(rows, float("inf"), -1, True).mul_(1 / 127).clamp_min_(1e-30)
    out = torch._int_mm((rows / step).round_().to(torch.int8), codes.t()).mul(scale).mul_(step)
    return (out if bias is None else out.add_(bias)).to(x.dtype)


class Int8Linear(nn.Module):
    """一个 ``nn.Linear`` 的 int8 版本，只能前向。

    Args:
        linear: 原来的层，``[出, 入]``。
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1).div_(127).clamp_min_(1e-30)
        self.register_buffer("codes", (weight / scale[:, None]).round_().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float())

    @property
    def weight(self) -> Tensor:
        """还原的 fp32 权重：给直接取权重的代码（分块的交叉熵）用。"""
        return self.codes * self.scale[:, None]

    def forward(self, x: Tensor) -> Tensor:
        flat = int8_linear(x.reshape(-1, x.shape[-1]), self.codes, self.scale, self.bias)
        return flat.view(*x.shape[:-1], -1)


def quantize_int8(model: nn.Module) -> nn.Module:
    """把模型里的线性层就地换成 :class:`Int8Linear`；词嵌入与归一化不动，共享的输出头另存一份 int8 的。

    Raises:
        UserError: 模型不在 CPU 上，是混合专家，或这台机器的 int8 乘法不精确。
    """
    where = "--quantize int8"
    device = next(model.parameters()).device
    if device.type != "cpu":
        raise UserError(
            f"int8 权重只在 CPU 上有，模型在 {device}", where=where, fix="去掉 --quantize，或加 --device cpu"
        )
    if getattr(model.config, "use_moe", False) or "moe" in model.config.model_type:
        raise UserError("混合专家还不能用 int8 权重", where=where, expected="稠密模型", fix="去掉 --quantize")
    if not int8_available():
        raise UserError(
            "这台机器的 int8 矩阵乘会溢出或没有",
            where=where,
            expected="有 VNNI 的处理器",
            fix="去掉 --quantize",
        )
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8Linear(child))
    return model
