"""核对提议时的一次前向：几行各读一小段（刚写下的词元与提议的几个），*每个* 位置的 logits 都要。

读提示的路（:mod:`minimind.inference.prompt_attention`）为几百个位置排的：64 个一块、一个键值头一次。这里一段至多十几个，
一行一次注意力，共用一个键值头的查询头与这一段的各个位置合成一列查询，算子只比一步解码多一次遮罩。
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.inference.kv_cache import SlotKVCache
from minimind.inference.prompt_attention import continued_mask


class _Span:
    """一行这一段要用的视图；各层一次取齐。"""

    def __init__(self, decoder: Any, slot: int, start: int, rows: slice):
        cache, kv_heads = decoder.cache, decoder.kv_heads
        store = cache.row(slot) if decoder.grouped else cache.store[:, slot]  # [层, 2·kv, 容量, D]
        length, self.rows, self.kv_heads = rows.stop - rows.start, rows, kv_heads
        stop = used = start + length
        if decoder.device.type != "cpu":  # 带掩码的注意力核要求对齐，同一步解码
            used = -(-stop // SlotKVCache.GRANULE) * SlotKVCache.GRANULE
        self.keys = store[:, None, :kv_heads, :used].unbind()
        self.values = store[:, None, kv_heads:, :used].unbind()
        self.written = store[:, :, start:stop].transpose(1, 2).unbind()
        self.bias = None
        if length > 1 or used > stop:
            mask = continued_mask(start, used, decoder.device, decoder.dtype)[:length]
            self.bias = mask.repeat_interleave(decoder.heads // kv_heads, 0)

    def attend(self, index: int, q: Tensor, kv: Tensor) -> Tensor:
        """第 ``index`` 层：写下这一段的 K、V，给出它的注意力 ``[T, heads, D]``。"""
        self.written[index].copy_(kv[self.rows])
        query = q[self.rows].unflatten(1, (self.kv_heads, -1)).transpose(0, 1)  # [kv, T, 组, D]
        flat = query.flatten(1, 2).unsqueeze(0)
        out = F.scaled_dot_product_attention(flat, self.keys[index], self.values[index], attn_mask=self.bias)
        return out.view(query.shape).transpose(0, 1).flatten(1, 2)


def verify_spans(
    decoder: Any, spans: Sequence[Sequence[int]], slots: Sequence[int], starts: Sequence[int]
) -> Tensor:
    """见 :meth:`minimind.inference.decoder.FusedDecoder.verify`。"""
    for slot, start, span in zip(slots, starts, spans):
        decoder.reserve(slot, start + len(span))
    parts, positions, begin = [], [], 0
    for slot, start, span in zip(slots, starts, spans):
        rows = slice(begin, begin + len(span))
        parts.append(_Span(decoder, slot, start, rows))
        positions += range(start, start + len(span))
        begin = rows.stop
    ids = torch.tensor([token for span in spans for token in span], device=decoder.device)
    x = F.embedding(ids, decoder.embedding)
    rope = decoder.rope(torch.tensor(positions, device=decoder.device))
    with decoder.precision():
        for index, layer in enumerate(decoder.layers):
            q, kv = decoder.project(layer, x, rope)
            outs = [part.attend(index, q, kv) for part in parts]
            x = decoder.finish(layer, x, outs[0] if len(outs) == 1 else torch.cat(outs))
        return decoder.head(decoder.norm(x, decoder.dtype))
