"""一步解码的编译版：矩阵乘照旧，夹在其间的小算子由 ``torch.compile`` 融成几个核；录进图里用。

录成图之后主机不再是瓶颈，剩下的是核的个数：26M 的一步照常录有 191 个，一个两三微秒，大多只搬几千个数。旋转、写缓存是一段，
注意力（行少时）是一段，门控是一段；各层共用，行数与长度是符号，头一次编译十秒上下，此后换行数、换长度不重编译（只有一行的另编一次）。
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.inference.linear import JoinedLinear

# 不超过这么多行时注意力也编译：一行一个核读完键值，省下的是核的个数；行多了融合内核读得快
FEW_ROWS = 8


def rotate_and_store(
    qkv: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    rope: tuple[Tensor, Tensor],
    target: Tensor,
    positions: Tensor,
    heads: int,
) -> Tensor:
    """归一（v3）并旋转 q、k，K、V 写进缓存，返回 q。

    Args:
        qkv: ``[B, heads + 2·kv_heads, D]``。
        norms: q、k 的归一化权重 ``[D]``；v2 没有。
        rope: cos、sin ``[B, 1, D]``，fp32，sin 的前半已取负。
        target: 这一层的缓存 ``[B, 2·kv_heads, 容量, D]``，就地写。
        positions: ``[B]`` 各写在哪里。
        heads: 查询头数。

    Returns:
        ``[B, heads, D]``。
    """
    half, kv = qkv.shape[-1] // 2, (qkv.shape[1] - heads) // 2
    q, k, v = qkv[:, :heads], qkv[:, heads : heads + kv], qkv[:, heads + kv :]
    if norms is not None:
        q, k = (
            F.rms_norm(t.float(), t.shape[-1:], w.float(), eps).to(t.dtype) for t, w in zip((q, k), norms)
        )
    q, k = ((t * rope[0] + t.roll(half, -1) * rope[1]).to(qkv.dtype) for t in (q, k))
    target[torch.arange(len(qkv), device=qkv.device), :, positions] = torch.cat((k, v), dim=1)
    return q


def attend_few(q: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> Tensor:
    """几行的注意力，fp32：q ``[B, kv_heads, 组, D]``，key、value ``[B, kv_heads, 长, D]`` → 同 q；各行看到自己的位置为止。"""
    scores = (q.float()[:, :, :, None] * key.float()[:, :, None]).sum(-1) * q.shape[-1] ** -0.5
    hidden = torch.arange(key.shape[2], device=q.device) > positions[:, None]
    weight = scores.masked_fill(hidden[:, None, None], float("-inf")).softmax(-1)
    return (weight[..., None] * value.float()[:, :, None]).sum(-2).to(q.dtype)


def gated(gate_up: Tensor) -> Tensor:
    """``[B, 2F]`` → ``[B, F]``：silu(前一半) · 后一半。"""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def fits(decoder: Any) -> bool:
    """能不能编译：稠密，没有叠 LoRA，也不是 int8。"""

    def plain(linear: Any) -> bool:
        return type(linear) is JoinedLinear and not linear.int8

    return all(
        layer.experts is None and all(map(plain, (layer.qkv, layer.out, layer.gate_up, layer.down)))
        for layer in decoder.layers
    )


class CompiledStep:
    """:meth:`FusedDecoder.walk` 的编译版，各行长短不一的那种。

    Args:
        decoder: :class:`minimind.inference.decoder.FusedDecoder`，:func:`fits` 为真、用着等长槽位的。
        backend: 交给 ``torch.compile``。
    """

    def __init__(self, decoder: Any, backend: str | Callable = "inductor"):
        self.decoder = decoder
        self.rotate_and_store, self.attend_few, self.gated = (
            torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
            for function in (rotate_and_store, attend_few, gated)
        )

    def __call__(self, tokens: Tensor, positions: Tensor, used: int) -> Tensor:
        """``[B]``、``[B]`` → ``[B, V]``。"""
        with self.decoder.precision():
            return self._walk(tokens, positions, used)

    def _walk(self, tokens: Tensor, positions: Tensor, used: int) -> Tensor:
        decoder, rows = self.decoder, len(tokens)
        store, kv, dtype = decoder.cache.store[:, :rows], decoder.kv_heads, decoder.dtype
        few = rows <= FEW_ROWS
        bias = None if few else decoder.bias(positions, used)
        rope, x = decoder.rope(positions), F.embedding(tokens, decoder.embedding)
        for layer, held in zip(decoder.layers, store):
            qkv = layer.qkv(layer.input_norm(x, dtype)).view(rows, -1, decoder.head_dim)
            norms, eps = None, layer.input_norm.eps
            if layer.q_norm is not None:
                norms, eps = (layer.q_norm.module.weight, layer.k_norm.module.weight), layer.q_norm.eps
            q = self.rotate_and_store(qkv, norms, eps, rope, held, positions, decoder.heads)
            q, key, value = q.view(rows, kv, -1, decoder.head_dim), held[:, :kv, :used], held[:, kv:, :used]
            if few:
                out = self.attend_few(q, key, value, positions)
            else:
                out = F.scaled_dot_product_attention(q, key, value, attn_mask=bias)
            x = layer.out.add_to(x, out.reshape(rows, -1))
            x = layer.down.add_to(x, self.gated(layer.gate_up(layer.post_norm(x, dtype))))
        return decoder.head(decoder.norm(x, dtype))
