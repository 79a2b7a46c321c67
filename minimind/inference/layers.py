"""解码器里一层的权重：输入相同的投影合并，归一化直接给出矩阵乘的精度。"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind.inference.linear import JoinedLinear
from minimind.inference.stacked_experts import StackedExperts


class Norm:
    """均方根归一化，给出矩阵乘的精度。

    CPU 上 ``F.rms_norm`` 拆成八个小算子，逐词元时夹在矩阵乘之间（缓存是凉的）一次约 20 µs；借范数算子只要五个，约 12 µs。
    CUDA 上它是一个核，里面自己用 fp32：精度都相同时直接交给它，省下前后换精度的三个核，逐位相同。
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
        weight = module.weight
        self.eps_11 = torch.full((1, 1), self.eps) if weight.device.type == "cpu" else None
        self.one_kernel = weight.is_cuda

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if self.one_kernel and x.dtype == dtype == self.module.weight.dtype:
            return F.rms_norm(x, x.shape[-1:], self.module.weight, self.eps)
        x, weight = x.float(), self.module.weight.float()
        if self.eps_11 is None:
            return F.rms_norm(x, x.shape[-1:], weight, self.eps).to(dtype)
        norm = torch.linalg.vector_norm(x, 2, -1, True)
        scale = torch.addcmul(self.eps_11, norm, norm, value=1 / x.shape[-1]).rsqrt_()
        return (x * scale).mul_(weight).to(dtype)


class Layer:
    """一层的权重，输入相同的投影已合并。

    混合专家的前馈是 ``experts``，照路由分组；``stacked`` 是它的定形写法，录制时才建。
    """

    def __init__(self, block: nn.Module, dtype: torch.dtype):
        attention, mlp = block.self_attn, block.mlp
        self.input_norm, self.post_norm = Norm(block.input_layernorm), Norm(block.post_attention_layernorm)
        self.q_norm = self.k_norm = None
        if getattr(attention, "q_norm", None) is not None:
            self.q_norm, self.k_norm = Norm(attention.q_norm), Norm(attention.k_norm)
        self.qkv = JoinedLinear([attention.q_proj, attention.k_proj, attention.v_proj], dtype)
        self.out = JoinedLinear([attention.o_proj], dtype)
        self.joined = [self.qkv, self.out]
        self.experts = None if hasattr(mlp, "gate_proj") else mlp
        self.stacked = StackedExperts(mlp, dtype) if self.experts is not None else None
        if self.experts is None:
            self.gate_up = JoinedLinear([mlp.gate_proj, mlp.up_proj], dtype)
            self.down = JoinedLinear([mlp.down_proj], dtype)
            self.joined += [self.gate_up, self.down]
