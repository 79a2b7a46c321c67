"""缓存分组时（CPU）的一步解码：各行按组排好，矩阵乘还是整批，注意力一组一次，只看这一组自己的长度。"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.inference.grouped_cache import Group


class _Part:
    """一组这一步要用的视图：各层一次取齐，逐层取下标每层多六次调用。"""

    def __init__(self, decoder: Any, group: Group, start: int, positions: Tensor, lengths: Sequence[int]):
        rows, kv_heads = len(group.owners), decoder.kv_heads
        mine = [lengths[slot] for slot in group.owners]
        used = max(mine) + 1
        ragged = min(mine) + 1 < used
        self.span, store = slice(start, start + rows), group.store[:, :rows]
        self.keys = store[:, :, :kv_heads, :used].unbind()
        self.values = store[:, :, kv_heads:, :used].unbind()
        self.written = store.unbind() if ragged else store[:, :, :, used - 1].unbind()
        self.places, self.positions = torch.arange(rows), positions[self.span]
        self.bias = decoder.bias(self.positions, used) if ragged else None

    def attend(self, index: int, q: Tensor, kv: Tensor) -> Tensor:
        """第 ``index`` 层：写下这一组的 K、V，给出它的注意力 ``[行, kv, 组, D]``。"""
        mine = kv[self.span]
        if self.bias is None:  # 各行写在同一个位置，一次普通的拷贝就行
            self.written[index].copy_(mine)
        else:
            self.written[index][self.places, :, self.positions] = mine
        key, value = self.keys[index], self.values[index]
        return F.scaled_dot_product_attention(q[self.span], key, value, attn_mask=self.bias)


def decode_groups(decoder: Any, tokens: Tensor, positions: Tensor, lengths: Sequence[int]) -> Tensor:
    """见 :meth:`minimind.inference.decoder.FusedDecoder.decode`。"""
    cache = decoder.cache
    for slot, length in enumerate(lengths):
        decoder.reserve(slot, length + 1)
    now = cache.version, len(lengths)
    if decoder.plan[0] != now:  # 排法只在谁搬了家时才变
        decoder.plan = now, arrange(cache.groups, len(lengths))
    groups, order, back = decoder.plan[1]
    if order is not None:
        tokens, positions = tokens[order], positions[order]
    parts, start = [], 0
    for group in groups:
        parts.append(_Part(decoder, group, start, positions, lengths))
        start += len(group.owners)
    x, rope = F.embedding(tokens, decoder.embedding), decoder.rope(positions)
    with decoder.precision():
        for index, layer in enumerate(decoder.layers):
            q, kv = decoder.project(layer, x, rope)
            # 共用一个键值头的查询头当作几个查询：[B, kv, 组, D]，不展开 K、V
            q = q.view(len(x), decoder.kv_heads, -1, decoder.head_dim)
            outs = [part.attend(index, q, kv) for part in parts]
            x = decoder.finish(layer, x, outs[0] if len(outs) == 1 else torch.cat(outs))
        if back is not None:
            x = x[back]
        return decoder.head(decoder.norm(x, decoder.dtype))


def arrange(groups: Sequence[Group], rows: int) -> tuple[list[Group], Tensor | None, Tensor | None]:
    """前 ``rows`` 个槽位所在的各组、按组排的次序与排回来的次序；次序不变时是 ``None``。"""
    mine = [group for group in groups if group.owners[0] < rows]
    order = [slot for group in mine for slot in group.owners]
    if sorted(order) != list(range(rows)):
        raise RuntimeError(f"在写的是前 {rows} 个槽位，缓存里有 {sorted(order)}")
    if order == list(range(rows)):
        return mine, None, None
    return mine, torch.tensor(order), torch.tensor(order).argsort()
