"""CPU 上的注意力：打包的一行里有许多段，逐段、逐块地算，前向与反向都手写；看不到的键根本不算。

CPU 的 SDPA 内核不跳过被因果遮住的部分，段间不可见又要一张 T×T 的遮罩；这里一块的分数留在高速缓存里，反向重算概率，不存 T×T。
单线程，[N, 8, 64]、2 个键值头，前向加反向毫秒数：

    行长 × 行数，文档平均长度       这里       逐段 SDPA   布尔 T×T      补齐成一批
    fp32   340 × 8，250             49        72         83          158
           512 × 8，300             97       149        189          396
           512 × 8，100             56        99        189          261
          1024 × 4，200             75       118        373          566
    bf16   512 × 8，300             58       153        167          363
          1024 × 4，200             54       156        296          577
    fp32   512 × 8，整行           126       192   整批一次 SDPA 181
    bf16   512 × 8，整行            72       180   整批一次 SDPA 170

从上往下：怎样接进自动微分与编译；半精度怎么算（转成 fp32，或把段补齐）；一块一块地算。什么时候用它由 kernels.py 的
``plan_attention`` 定。随导出的目录走，所以只用 torch。

形状：q [N, heads, D]，k、v [N, kv_heads, D] → [N, heads, D]，N 是展平的 B·T；一段是行的起止 ``(start, stop)``，段内因果，
段间不可见。不在任何一段里的行，结果是什么不管。
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

Segments = Sequence[tuple[int, int]]
HALF = (torch.bfloat16, torch.float16)
# 一块多少个查询：64、128、256 在 fp32 下依次为 97、108、137 ms，bf16 下 58、55、62
BLOCK = 64
# 共用一个键值头的查询并起来不到这么宽，一块的乘加太少，半精度省下的抵不过调用它的开销
NARROW = 128

# ---------------------------------------------------------------- 接进自动微分与编译


class SegmentAttention(torch.autograd.Function):
    """平常用的；起止位置已经在主机上。"""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.segments = segments
        return attend(q, k, v, segments)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return *gradients(grad, *ctx.saved_tensors, ctx.segments), None


def segments_of(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    """各段的起止位置，空段不要；cu_seqlens 在卡上就要读回来一次。"""
    return [(start, stop) for start, stop in pairwise(cu_seqlens.tolist()) if stop > start]


# 编译时的同一件事：作为一个算子整个进图，段的长短只是它的输入，不断图，也不因段数不同而重编译
@torch.library.custom_op("minimind::segment_attention", mutates_args=(), device_types="cpu")
def segment_op(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    return attend(q, k, v, segments_of(cu_seqlens))


@torch.library.custom_op("minimind::segment_attention_backward", mutates_args=(), device_types="cpu")
def _segment_op_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return gradients(grad, q, k, v, segments_of(cu_seqlens))


@segment_op.register_fake
def _(q, k, v, cu_seqlens):
    return torch.empty_like(q)


@_segment_op_backward.register_fake
def _(grad, q, k, v, cu_seqlens):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


segment_op.register_autograd(
    lambda ctx, grad: (*_segment_op_backward(grad, *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)

# ---------------------------------------------------------------- 半精度怎么算


def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """前向，[N, heads, D]。"""
    with torch.autocast("cpu", enabled=False):
        if computes_in_fp32(q, k):
            return _attend(q.float(), k.float(), v.float(), segments).to(q.dtype)
        if (whole := Aligned.needed(q, segments)) is None:
            return _attend(q, k, v, segments)
        return whole.put_rows(_attend(*whole.take_rows(q, k, v), whole.segments), q)


def gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, segments: Segments
) -> tuple[Tensor, Tensor, Tensor]:
    """对 q、k、v 的梯度，形状与它们相同；``grad`` [N, heads, D]。"""
    if computes_in_fp32(q, k):
        grads = _gradients(*(t.float() for t in (grad, q, k, v)), segments)
        return tuple(one.to(q.dtype) for one in grads)
    if (whole := Aligned.needed(q, segments)) is None:
        return _gradients(grad, q, k, v, segments)
    # 补的位置没有人看，传进去的梯度是 0，传出来的也就恰为 0
    inner = torch.zeros(len(whole.take), *grad.shape[1:], dtype=grad.dtype)
    inner[whole.place] = grad.index_select(0, whole.rows)
    grads = _gradients(inner, *whole.take_rows(q, k, v), whole.segments)
    return tuple(whole.put_rows(one, t) for one, t in zip(grads, (q, k, v)))


def computes_in_fp32(q: Tensor, k: Tensor) -> bool:
    """半精度而每头太窄的，转成 fp32 算更快，见 :class:`Aligned`。"""
    return q.dtype in HALF and q.shape[1] // k.shape[1] * q.shape[2] < NARROW


@dataclass
class Aligned:
    """各段在末尾补到 ``UNIT`` 的整倍数，半精度用：oneDNN 给每种没见过的形状现编一个内核，段的长短批批不同，编译就停不下来。

    AMD Zen 4 单线程，bf16，前向加反向毫秒，四十批各不相同（括号里是同一批反复算）：

        [N, heads, D]、键值头        不补          补到 32       转成 fp32 算
        6 × 32、2，平均 60         94 (31)        35 (31)       19 (20)
        8 × 64、2，平均 250        86 (56)        58 (65)       65 (63)
        8 × 64、2，平均 300       146 (102)      103 (110)     125 (111)

    segments: 补过的起止位置；take: 依次取哪些行，补的位置重复段的最后一行；rows: 各段里的行；place: 它们在 take 里的位置。
    """

    UNIT = 32

    segments: list[tuple[int, int]]
    take: Tensor
    rows: Tensor
    place: Tensor

    @classmethod
    def needed(cls, q: Tensor, segments: Segments) -> Aligned | None:
        """半精度而有的段不是整倍数时怎么补；不必补是 None。"""
        if q.dtype not in HALF or all((stop - start) % cls.UNIT == 0 for start, stop in segments):
            return None
        return cls.of(tuple(segments))

    @staticmethod
    @functools.lru_cache(maxsize=4)  # 各层、前向与反向用的是同一份
    def of(segments: tuple[tuple[int, int], ...]) -> Aligned:
        padded, take, rows, place, at = [], [], [], [], 0
        for start, stop in segments:
            length = -(-(stop - start) // Aligned.UNIT) * Aligned.UNIT
            take.append(torch.arange(start, start + length).clamp_(max=stop - 1))
            rows.append(torch.arange(start, stop))
            place.append(torch.arange(at, at + stop - start))
            padded.append((at, at + length))
            at += length
        return Aligned(padded, torch.cat(take), torch.cat(rows), torch.cat(place))

    def take_rows(self, *tensors: Tensor) -> list[Tensor]:
        """补过的 [补过的行数, 头, D]。"""
        return [tensor.index_select(0, self.take) for tensor in tensors]

    def put_rows(self, inner: Tensor, like: Tensor) -> Tensor:
        """补过的结果 → 与 ``like`` 一样的行；各段之外的行（如交给别的算法的提示）不管。"""
        found = inner.index_select(0, self.place)
        if len(found) == len(like):
            return found
        out = torch.empty_like(like)
        out[self.rows] = found
        return out


# ---------------------------------------------------------------- 一块一块地算


def _attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    out, future = torch.empty_like(q), _future()
    for start, stop in segments:
        k_seg, v_seg = k[start:stop].transpose(0, 1), v[start:stop].transpose(0, 1)  # [kv_heads, L, D]
        for rows, keys in _blocks(start, stop):
            prob = _probability(_group(q[rows], k.shape[1]), k_seg[:, :keys], future)
            out[rows] = _ungroup(prob.to(v.dtype) @ v_seg[:, :keys], rows)
    return out


def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, segments: Segments
) -> tuple[Tensor, Tensor, Tensor]:
    kv_heads, scale, future = k.shape[1], q.shape[2] ** -0.5, _future()
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for start, stop in segments:
        k_seg, v_seg = k[start:stop].transpose(0, 1), v[start:stop].transpose(0, 1)
        dk, dv = (torch.zeros(t.shape, dtype=t.dtype) for t in (k_seg, v_seg))
        for rows, keys in _blocks(start, stop):
            q_blk, g_blk = _group(q[rows], kv_heads), _group(grad[rows], kv_heads)
            prob = _probability(q_blk, k_seg[:, :keys], future)
            dv[:, :keys].baddbmm_(prob.to(v.dtype).transpose(1, 2), g_blk)
            d_prob = (g_blk @ v_seg[:, :keys].transpose(1, 2)).float()
            d_score = torch._softmax_backward_data(d_prob, prob, -1, torch.float32).mul_(scale).to(q.dtype)
            grad_q[rows] = _ungroup(d_score @ k_seg[:, :keys], rows)
            dk[:, :keys].baddbmm_(d_score.transpose(1, 2), q_blk)
        grad_k[start:stop], grad_v[start:stop] = dk.transpose(0, 1), dv.transpose(0, 1)
    return grad_q, grad_k, grad_v


def _blocks(start: int, stop: int) -> Iterator[tuple[slice, int]]:
    """依次给出（查询所在的行，它们能看到的键数）。"""
    for a in range(start, stop, BLOCK):
        b = min(a + BLOCK, stop)
        yield slice(a, b), b - start


def _future() -> Tensor:
    """块对角上要加的 [BLOCK, BLOCK]：右上为 -inf，其余为 0。相加比 masked_fill_ 快三倍。"""
    return torch.full((BLOCK, BLOCK), float("-inf")).triu_(1)


def _probability(q: Tensor, k: Tensor, future: Tensor) -> Tensor:
    """q [kv_heads, 组·n, D]（段内最后 n 个位置），k [kv_heads, keys, D] → fp32 概率 [kv_heads, 组·n, keys]。"""
    keys = k.shape[1]
    n = (keys - 1) % BLOCK + 1
    score = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=q.shape[2] ** -0.5).float()
    score.view(len(k), -1, n, keys)[..., keys - n :].add_(future[:n, :n])
    return score.softmax(-1)


def _group(x: Tensor, kv_heads: int) -> Tensor:
    """[n, heads, D] → [kv_heads, 组·n, D]：共用一个键值头的查询头并到行里，矩阵乘更大。"""
    n, heads, dim = x.shape
    return x.view(n, kv_heads, heads // kv_heads, dim).permute(1, 2, 0, 3).reshape(kv_heads, -1, dim)


def _ungroup(x: Tensor, rows: slice) -> Tensor:
    """`_group` 的逆：[kv_heads, 组·n, D] → [n, heads, D]。"""
    kv_heads, _, dim = x.shape
    return x.view(kv_heads, -1, rows.stop - rows.start, dim).permute(2, 0, 1, 3).flatten(1, 2)
