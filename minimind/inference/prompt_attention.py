"""读提示时的注意力：首尾相连的几条各看各的，接着读的还要看缓存里自己前面的部分。"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from minimind.model.model_minimind import (
    AttentionPlan,
    attention,
    segment_attention,
    varlen_attention,
    varlen_available,
)


class PromptAttention:
    """一次读提示里各层共用的安排。

    Args:
        lengths: 各条这次读几个。
        starts: 各从第几个位置读起。
        slots: 各在哪个槽位。
        device, dtype: 与 q、k、v 一致。
    """

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
        if any(starts):  # 有接着读的就逐条算
            for (begin, end), start, slot in zip(segments, starts, slots):
                mask = _continued_mask(start, start + end - begin, device, dtype) if start else None
                self.pieces.append((slice(begin, end), slot, mask))
        elif varlen_available(torch.empty(0, device=device, dtype=dtype)):
            edges = torch.tensor([0, *ends], dtype=torch.int32, device=device)
            self.plan = AttentionPlan("varlen", cu_seqlens=edges, max_seqlen=max(lengths))
        else:
            self.plan = AttentionPlan("segments", segments)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """
        Args:
            q: ``[N, heads, D]``；k、v: ``[N, kv_heads, D]``。
            keys, values: 这一层的缓存 ``[槽位, kv_heads, 容量, D]``，k、v 已写进去。

        Returns:
            ``[N, heads, D]``。
        """
        if self.plan is not None:
            kernel = varlen_attention if self.plan.mode == "varlen" else segment_attention
            return kernel(q, k, v, self.plan)
        out = torch.empty_like(q)
        for rows, slot, mask in self.pieces:
            if mask is None:
                plan = AttentionPlan("segments", [(0, rows.stop - rows.start)])
                out[rows] = segment_attention(q[rows], k[rows], v[rows], plan)
            else:
                stop = mask.shape[1]
                past = keys[slot, None, :, :stop], values[slot, None, :, :stop]
                out[rows] = attention(q[rows].transpose(0, 1)[None], *past, mask, False)[0].transpose(0, 1)
        return out


def _continued_mask(start: int, stop: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """位置 ``start…stop-1`` 的查询看位置 ``0…stop-1`` 的键：加性的 ``[stop - start, stop]``。"""
    keys = torch.arange(stop, device=device)
    mask = torch.zeros(stop - start, stop, dtype=dtype, device=device)
    return mask.masked_fill_(keys > keys[start:, None], float("-inf"))
