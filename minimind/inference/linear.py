"""推理用的线性层：权重事先排成矩阵乘内核要的样子。

CPU 上 ``F.linear`` 的 fp32 走 MKL，它在 AMD 处理器上不用 AVX-512；oneDNN 的同一个乘法快一倍多，精度同为 fp32。
单线程 AMD EPYC，[行, 512] × [512, 输出] 的微秒数（F.linear → 预排的 oneDNN）：

    输出      64 行          16 行         1 行
    768      561 → 233     160 → 70     25 → 34
    2816    2363 → 940     636 → 217    80 → 72
    6400    5654 → 2248   2211 → 675   644 → 173

bf16 也预排：F.linear 每次都要重排权重，26M 模型一行全部矩阵乘 3.9 ms，预排的 1.8 ms；32 行 7.8 对 5.6，384 行 48 对 45。

预排一次约等于两次 64 行的乘法，一轮采样要乘几十次。用不用它只看装的 torch 有没有，不看现场测速：
两种内核的末位舍入不同，靠测速来选，同一个种子就可能写出不同的回答。
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind.inference.int8 import Int8Linear, int8_linear
from minimind.model.model_lora import effective_weight

# 预排时告诉内核大约多少行；按 64 行排的版式在 1 到 384 行都不比专门排的慢
TYPICAL_ROWS = 64


@functools.cache
def packing_available(dtype: torch.dtype = torch.float32) -> bool:
    """这份 torch 能不能预排这种精度的权重（x86 的发行版都能；bf16 还要 AVX-512），小矩阵上算一次核对。"""
    ops = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(ops, "_reorder_linear_weight"):
        return False
    if dtype != torch.float32 and not (dtype == torch.bfloat16 and ops._is_mkldnn_bf16_supported()):
        return False
    x, weight = torch.arange(24.0).view(3, 8).to(dtype), torch.arange(32.0).view(4, 8).to(dtype)
    try:
        packed = ops._reorder_linear_weight(weight, TYPICAL_ROWS)
        return torch.equal(_packed_linear(x, packed, None), F.linear(x, weight))
    except (RuntimeError, NotImplementedError):  # 编译时没带 oneDNN 的平台
        return False


def _packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


class JoinedLinear:
    """几个输入相同的 ``nn.Linear`` 合成一次矩阵乘：输出在末维首尾相接。

    Args:
        linears: 要合并的层；只读它们的权重，没合并的 LoRA 增量也算在内。
        dtype: 计算精度。
    """

    def __init__(self, linears: Sequence[nn.Linear], dtype: torch.dtype):
        self.linears, self.dtype = list(linears), dtype
        first = self.linears[0]
        self.int8 = isinstance(first, Int8Linear)
        self.packed = not self.int8 and first.weight.device.type == "cpu" and packing_available(dtype)
        self.weight: Tensor | None = None
        self.scale: Tensor | None = None
        self.bias: Tensor | None = None
        self.refresh()

    def refresh(self) -> None:
        """权重变了：重新合并。放得进原来的地方就写在原地，录好的一步还能用。"""
        weight = self._join("codes" if self.int8 else "weight", self.weight)
        if self.packed:  # 排好了再换上：别的引擎的线程可能正用着
            weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), TYPICAL_ROWS)
        self.weight = weight
        self.scale = self._join("scale", self.scale) if self.int8 else None
        self.bias = self._join("bias", self.bias) if self.linears[0].bias is not None else None

    def places(self) -> list[int]:
        """各张量在哪里；预排的没有地址，以对象代替。"""
        tensors = [tensor for tensor in (self.weight, self.scale, self.bias) if tensor is not None]
        return [id(tensor) if self.packed else tensor.data_ptr() for tensor in tensors]

    def __call__(self, x: Tensor) -> Tensor:
        """``[N, 入]`` → ``[N, 各出之和]``。"""
        if self.int8:
            return int8_linear(x, self.weight, self.scale, self.bias)
        if self.packed:
            return _packed_linear(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)

    def add_to(self, total: Tensor, x: Tensor) -> Tensor:
        """``total [N, 出] + self(x)``；精度相同时加法并进矩阵乘里。CUDA 上写在 ``total`` 原处。"""
        plain = not self.int8 and self.bias is None and total.dtype == self.dtype
        if self.packed and plain:
            return torch.ops.mkldnn._linear_pointwise.binary(x, total, self.weight, None, "add")
        if plain and total.is_cuda:  # 另放一处的 addmm 要先把 total 抄过去
            return total.addmm_(x, self.weight.t())
        return total + self(x)

    def _join(self, name: str, old: Tensor | None) -> Tensor:
        """各层的 ``name`` 首尾相接；``old`` 是上一次的结果，能写进去就写进去。"""
        if self.int8:  # 各自的精度不能动
            parts = [getattr(linear, name) for linear in self.linears]
        else:
            read = effective_weight if name == "weight" else (lambda linear: linear.bias)
            parts = [read(linear).detach() for linear in self.linears]
        if len(parts) == 1 and (self.int8 or parts[0].dtype == self.dtype):
            return parts[0]  # 就是模型自己的那一份，不复制
        if old is None or self.packed:
            return torch.cat([part if self.int8 else part.to(self.dtype) for part in parts])
        start = 0
        for part in parts:
            old[start : start + len(part)] = part
            start += len(part)
        return old
