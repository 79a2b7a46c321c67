"""读提示时的注意力：首尾相连的几条各看各的，接着读的还要看缓存里自己前面的部分。"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from minimind.model.kernels import (
    AttentionPlan,
    Buckets,
    attention,
    matmul_nt,
    packed_attention,
    segment_attention,
    varlen_available,
)

NEG_INF = float("-inf")


class BlockedAttention:
    """CPU 上的：一条一条、64 个查询一块、一个键值头一个键值头地算，分数留在高速缓存里，块右上方的键不算。

    键数凑成整倍数（多出的被遮住）：oneDNN 每种形状要现编一份内核，种类少才留得住。26M 一层，单线程 fp32 的毫秒数
    （n 个查询接在 m 个之后；SDPA 要带掩码）：

        n，m           本函数   批矩阵乘（MKL）   SDPA
        4096，0          133         246        484
        1024，0           10          16         28
        256，3840         16          29         28

    从头读的短提示交给 :func:`segment_attention`，它两个键值头一起乘，算子少：8 条 64 个 1.2 对 1.3 毫秒，
    32 条 16 个 1.2 对 2.5，4 条 128 个起持平。
    """

    BLOCK = 64
    SHORT = 128

    def __init__(
        self,
        lengths: Sequence[int],
        starts: Sequence[int],
        slots: Sequence[int],
        capacity: int | Sequence[int],
    ):
        rooms = [capacity] * len(lengths) if isinstance(capacity, int) else capacity
        self.blocks = []  # （查询在串里的行，槽位，看多少个键，其中前几个不用遮，遮罩）
        begin, short = 0, []
        for length, start, slot, room in zip(lengths, starts, slots, rooms):
            if start == 0 and length <= self.SHORT:
                short.append((begin, begin + length))
                edges = range(0)
            else:
                edges = range(start // self.BLOCK * self.BLOCK, start + length, self.BLOCK)
            for edge in edges:
                first, stop = max(edge, start), min(edge + self.BLOCK, start + length)
                unit = self.BLOCK if stop <= 256 else 256
                keys = min(-(-stop // unit) * unit, room)
                future = torch.full((stop - first, keys - first), NEG_INF).triu_(1)
                rows = slice(begin + first - start, begin + stop - start)
                self.blocks.append((rows, slot, keys, first, future))
            begin += length
        self.short = AttentionPlan("segments", short) if short else None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """见 :func:`prompt_attention`。"""
        out = segment_attention(q, k, v, self.short) if self.short else torch.empty_like(q)
        if not self.blocks:
            return out
        kv_heads, scale = k.shape[1], q.shape[2] ** -0.5
        grouped_in = (q * scale).unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)  # [kv_heads, 组, N, D]
        grouped_out = out.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)
        for rows, slot, count, first, future in self.blocks:
            n = rows.stop - rows.start
            for head in range(kv_heads):
                query = grouped_in[head, :, rows].reshape(-1, q.shape[2])
                score = matmul_nt(query, keys[slot][head, :count]).float().unflatten(0, (-1, n))
                score[..., first:].add_(future)
                prob = score.softmax(-1).flatten(0, 1).to(v.dtype)
                one = matmul_nt(prob, values[slot][head, :count].t())
                grouped_out[head, :, rows] = one.unflatten(0, (-1, n))
        return out


class DeviceAttention:
    """卡上的：都从头读用变长内核（没有就长度相近的成批），有接着读的就逐条算。"""

    def __init__(
        self,
        lengths: Sequence[int],
        starts: Sequence[int],
        slots: Sequence[int],
        device: torch.device,
        dtype: torch.dtype,
    ):
        ends = list(accumulate(lengths))
        segments = list(pairwise([0, *ends]))
        self.plan, self.pieces = None, []
        if any(starts):
            for (begin, end), start, slot in zip(segments, starts, slots):
                mask = continued_mask(start, start + end - begin, device, dtype) if start else None
                self.pieces.append((slice(begin, end), slot, mask))
        elif varlen_available(torch.empty(0, device=device, dtype=dtype)):
            edges = torch.tensor([0, *ends], dtype=torch.int32, device=device)
            self.plan = AttentionPlan("varlen", cu_seqlens=edges, max_seqlen=max(lengths))
        else:
            self.plan = AttentionPlan("buckets", buckets=Buckets.of(segments, device))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """见 :func:`prompt_attention`。"""
        if self.plan is not None:
            return packed_attention(q, k, v, self.plan)
        out = torch.empty_like(q)
        for rows, slot, mask in self.pieces:
            stop = rows.stop - rows.start if mask is None else mask.shape[1]
            past = keys[slot, None, :, :stop], values[slot, None, :, :stop]
            one = attention(q[rows].transpose(0, 1)[None], *past, mask, mask is None)
            out[rows] = one[0].transpose(0, 1)
        return out


def continued_mask(start: int, stop: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """位置 ``start…stop-1`` 的查询看位置 ``0…stop-1`` 的键：加性的 ``[stop - start, stop]``。"""
    keys = torch.arange(stop, device=device)
    mask = torch.zeros(stop - start, stop, dtype=dtype, device=device)
    return mask.masked_fill_(keys > keys[start:, None], NEG_INF)


def prompt_attention(
    lengths: Sequence[int],
    starts: Sequence[int],
    slots: Sequence[int],
    capacity: int | Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
) -> BlockedAttention | DeviceAttention:
    """一次读提示里各层共用的安排。

    Args:
        lengths: 各条这次读几个。
        starts: 各从第几个位置读起。
        slots: 各在哪个槽位。
        capacity: 缓存里各条放得下多少个位置；一个数表示都一样。
        device, dtype: 缓存的。

    Returns:
        ``f(q, k, v, keys, values)``：q ``[N, heads, D]``，k、v ``[N, kv_heads, D]`` 是首尾相连的各条，
        keys、values 是这一层的缓存（下标是槽位，卡上必须是一个张量），k、v 已写进去 → ``[N, heads, D]``。
    """
    if device.type == "cpu":
        return BlockedAttention(lengths, starts, slots, capacity)
    return DeviceAttention(lengths, starts, slots, device, dtype)
