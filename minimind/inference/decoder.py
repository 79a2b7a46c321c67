"""解码器：引擎与模型之间的一层。给出「读完这些提示」与「每行再走一步」两个动作，KV 缓存归它管。

:class:`FusedDecoder` 直接用权重算，不经过 ``model.forward``：q、k、v 合成一次矩阵乘，gate、up 合成一次，
GQA 不展开头，新的 K、V 就地写进各行自己的位置，注意力只看用到的长度。它认 MiniMind（稠密 v2、v3 与混合专家）
和与之同构的 Llama、Qwen3；别的结构用 :class:`~minimind.inference.forward_decoder.ForwardDecoder`，慢但什么都能跑。
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind.inference.forward_decoder import ForwardDecoder
from minimind.inference.group_decode import decode_groups
from minimind.inference.grouped_cache import GroupedKVCache
from minimind.inference.kv_cache import SlotKVCache
from minimind.inference.layers import Layer
from minimind.inference.prompt_attention import prompt_attention
from minimind.inference.shared import SharedModel
from minimind.inference.verify import verify_spans
from minimind.model import MiniMindLM

__all__ = ["ForwardDecoder", "FusedDecoder", "fuses", "make_decoder"]

# 与 MiniMind 稠密结构逐层相同的公开结构：权重名也相同
SAME_LAYOUT = ("LlamaForCausalLM", "Qwen3ForCausalLM")


def make_decoder(model: nn.Module | SharedModel, max_slots: int, dtype: torch.dtype | None = None) -> Any:
    """给这个模型挑解码器。

    Args:
        model: 模型，或几个引擎共用的那一份。
        max_slots: 同时最多多少行。
        dtype: 矩阵乘与缓存的精度，默认与权重相同；只有 :class:`FusedDecoder` 能换。
    """
    return FusedDecoder(model, max_slots, dtype) if fuses(model) else ForwardDecoder(model, max_slots)


def fuses(model: nn.Module | SharedModel) -> bool:
    """能不能用 :class:`FusedDecoder`。"""
    return isinstance(model, (SharedModel, MiniMindLM)) or _is_plain_llama(model)


def _is_plain_llama(model: nn.Module) -> bool:
    config = model.config
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return (
        type(model).__name__ in SAME_LAYOUT
        and rope.get("rope_type", "default") == "default"
        and config.hidden_act == "silu"
        and not getattr(config, "use_sliding_window", False)
    )


class FusedDecoder:
    """直接用权重解码。

    ``shareable``：一段 KV 能截取、拼接，给别的请求用。

    Args:
        model: MiniMind，或 ``SAME_LAYOUT`` 里的结构；或 :class:`~minimind.inference.shared.SharedModel`，排好的权重用它的。
        max_slots: 槽位数。
        dtype: 矩阵乘与缓存的精度；残差仍用权重的精度，与自动混合精度下的训练一致。
    """

    shareable = True

    def __init__(self, model: nn.Module | SharedModel, max_slots: int, dtype: torch.dtype | None = None):
        self.shared = model if isinstance(model, SharedModel) else SharedModel(model, dtype)
        self.model, self.config = self.shared.model, model.config
        self.device, self.dtype = self.embedding.device, self.shared.dtype
        config = self.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.layers, self.head, self.norm = self.shared.layers, self.shared.head, self.shared.norm
        self.max_slots = max_slots
        self.cache: GroupedKVCache | SlotKVCache
        if self.device.type == "cpu":
            shape = (config.num_hidden_layers, self.kv_heads, self.head_dim)
            self.cache = GroupedKVCache(*shape, dtype=self.dtype)
        else:
            self.use_slots()
        self.steady = False  # 见 use_static
        self.plan: tuple[Any, Any] = (None, None)  # 见 decode_groups
        self._cos = self._sin = torch.empty(0)

    def use_slots(self) -> None:
        """各槽位一样长的缓存，原有的内容不要了：卡上一次核算完所有的行，录制的形状也只由行数与长度定。"""
        self.cache = SlotKVCache(
            self.config.num_hidden_layers,
            self.max_slots,
            self.kv_heads,
            self.head_dim,
            dtype=self.dtype,
            device=self.device,
        )

    @property
    def grouped(self) -> bool:
        return isinstance(self.cache, GroupedKVCache)

    @property
    def static(self) -> bool:
        """:meth:`walk` 的形状能否只由参数定：混合专家要有定形的写法。"""
        mixtures = [layer for layer in self.layers if layer.experts is not None]
        return all(layer.stacked is not None and layer.stacked.possible for layer in mixtures)

    def use_static(self, on: bool = True) -> None:
        """:meth:`walk` 里混合专家用不用定形的写法；头一次用时另放一份并排的权重，几个引擎共用。"""
        self.steady = on
        for layer in self.layers if on else ():
            if layer.stacked is not None:
                layer.stacked.build()

    @property
    def embedding(self) -> Tensor:
        return self.model.model.embed_tokens.weight

    def refresh(self) -> None:
        """权重变了：重新合并。"""
        self.shared.refresh()

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        slots: list[int],
        starts: list[int] | None = None,
        watch: dict[int, Callable[[Tensor], None]] | None = None,
    ) -> Tensor:
        """读几条提示（或各自接下来的一段），K、V 写进各自的槽位；首尾相连成一串算，没有填充。

        Args:
            prompts: 各条的 token，都不空。
            slots: 各条住哪个槽位。
            starts: 各从第几个位置读起，之前的 K、V 已在槽位里；默认都从头读。
            watch: 第几条 → 收下它这一段 *每个* 位置的 logits ``[T, V]`` 的函数；给提示打分用。

        Returns:
            每条末尾的 logits ``[P, V]``。
        """
        starts, watch = starts or [0] * len(prompts), watch or {}
        lengths = [len(prompt) for prompt in prompts]
        for slot, start, length in zip(slots, starts, lengths):
            self.reserve(slot, start + length)
        ends = list(accumulate(lengths))
        ids = torch.tensor([token for prompt in prompts for token in prompt], device=self.device)
        spans = [torch.arange(start, start + length) for start, length in zip(starts, lengths)]
        positions = torch.cat(spans).to(self.device)
        # 末层之后只有这些行还用得着：各条的末尾，与要看全部位置的那几条
        kept = [
            (end - length if i in watch else end - 1, end)
            for i, (end, length) in enumerate(zip(ends, lengths))
        ]
        wanted = torch.cat([torch.arange(*span) for span in kept]).to(self.device)
        room = [self.cache.room(slot) for slot in slots] if self.grouped else self.cache.capacity
        attend = prompt_attention(lengths, starts, slots, room, self.device, self.dtype)
        write, past = self._prompt_store(slots, starts, lengths, positions)
        x = F.embedding(ids, self.embedding)
        rope = self.rope(positions)
        with self.precision():
            for index, layer in enumerate(self.layers):
                q, kv = self.project(layer, x, rope)
                write(index, kv)
                k, v = kv.chunk(2, dim=1)
                out = attend(q, k, v, *past(index))
                if index == len(self.layers) - 1:
                    x, out = x[wanted], out[wanted]
                x = self.finish(layer, x, out)
            logits = self.head(self.norm(x, self.dtype))
        parts = logits.split([stop - start for start, stop in kept])
        for i, note in watch.items():
            note(parts[i])
        return torch.stack([part[-1] for part in parts]) if watch else logits

    def _prompt_store(
        self, slots: list[int], starts: list[int], lengths: list[int], positions: Tensor
    ) -> Any:
        """→ （写一层的 K、V，取一层的 keys、values）：按槽位取下标就是那一行 ``[kv_heads, 容量, D]``。"""
        if not self.grouped:
            rows = torch.tensor(slots).repeat_interleave(torch.tensor(lengths)).to(self.device)

            def write(index: int, kv: Tensor) -> None:
                self.cache.store[index][rows, :, positions] = kv

            return write, lambda index: (self.cache.keys[index], self.cache.values[index])
        stores = [self.cache.row(slot) for slot in slots]

        def write_rows(index: int, kv: Tensor) -> None:
            for store, start, piece in zip(stores, starts, kv.split(lengths)):
                store[index, :, start : start + len(piece)] = piece.transpose(0, 1)

        def past(index: int) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
            layers = [(slot, store[index]) for slot, store in zip(slots, stores)]
            keys = {slot: layer[: self.kv_heads] for slot, layer in layers}
            return keys, {slot: layer[self.kv_heads :] for slot, layer in layers}

        return write_rows, past

    def decode(self, tokens: Tensor, positions: Tensor, lengths: Sequence[int]) -> Tensor:
        """前 B 个槽位各走一步。

        Args:
            tokens: ``[B]`` 各行刚写下的 token。
            positions: ``[B]`` 它们的位置（从 0 起），在设备上。
            lengths: 主机上的同一份数：用到多长由它定，不必问设备。

        Returns:
            ``[B, V]``。
        """
        if self.grouped:
            return decode_groups(self, tokens, positions, lengths)
        used = max(lengths) + 1
        self.reserve(0, used)
        ragged = min(lengths) + 1 < used
        if self.device.type != "cpu":  # 卡上凑成整块，带掩码的注意力核要求对齐
            used, ragged = -(-used // SlotKVCache.GRANULE) * SlotKVCache.GRANULE, True
        return self.walk(tokens, positions, used, ragged)

    def walk(self, tokens: Tensor, positions: Tensor, used: int, ragged: bool) -> Tensor:
        """:meth:`decode` 的设备一半：不看主机上的长度，形状只由行数与 ``used`` 定。

        Args:
            used: 注意力看前多少个位置；缓存要已经够长。
            ragged: 假表示各行都在 ``used - 1``，不必遮。
        """
        rows = len(tokens)
        slots = torch.arange(rows, device=self.device)
        bias = self.bias(positions, used) if ragged else None
        # 各层的视图一次取齐：逐层取下标每层多六次调用
        store = self.cache.store[:, :rows]
        keys = store[:, :, : self.kv_heads, :used].unbind()
        values = store[:, :, self.kv_heads :, :used].unbind()
        written = store.unbind() if ragged else store[:, :, :, used - 1].unbind()
        x = F.embedding(tokens, self.embedding)
        rope = self.rope(positions)
        with self.precision():
            for layer, key, value, target in zip(self.layers, keys, values, written):
                q, kv = self.project(layer, x, rope)
                if ragged:
                    target[slots, :, positions] = kv
                else:  # 各行写在同一个位置，一次普通的拷贝就行
                    target.copy_(kv)
                # 共用一个键值头的查询头当作几个查询：[B, kv, 组, D]，不展开 K、V
                q = q.view(rows, self.kv_heads, -1, self.head_dim)
                out = F.scaled_dot_product_attention(q, key, value, attn_mask=bias)
                x = self.finish(layer, x, out, stepping=True)
            return self.head(self.norm(x, self.dtype))

    def verify(self, spans: Sequence[Sequence[int]], slots: Sequence[int], starts: Sequence[int]) -> Tensor:
        """几行各读一小段，接在各自已有的 K、V 之后；推测解码核对提议用。

        Args:
            spans: 各行的词元，都不空。
            slots: 各行的槽位。
            starts: 各从第几个位置读起。

        Returns:
            每个位置的 logits，首尾相连 ``[N, V]``。
        """
        return verify_spans(self, spans, slots, starts)

    def open(self, slot: int, length: int, alone: bool = False) -> None:
        """新来的一行要 ``length`` 个位置；``alone`` 表示提示还读不完，先不与在写的放在一起。"""
        if self.grouped:
            self.cache.open(slot, length, alone)

    def free(self, slots: list[int]) -> None:
        """这些槽位离场，占的地方还掉。"""
        if self.grouped:
            self.cache.free(slots)

    def copy(self, source: list[int], target: list[int], length: int) -> None:
        """``source`` 各槽位的前 ``length`` 个位置抄一份到 ``target``。"""
        if not self.grouped:
            return self.cache.copy(source, target, length)
        for a, b in zip(source, target):
            self.cache.copy(a, b, length)

    def move(self, source: list[int], target: list[int], length: int) -> None:
        """``source`` 搬到 ``target``，原处作废。"""
        if not self.grouped:
            return self.cache.copy(source, target, length)
        for a, b in zip(source, target):
            self.cache.move(a, b)

    def keep(self, slot: int, stop: int, start: int = 0) -> Any:
        """把一个槽位的 ``[start, stop)`` 另存一份：``[层, 2·键值头, 位置, head_dim]``。"""
        row = self.cache.row(slot) if self.grouped else self.cache.store[:, slot]
        return row[:, :, start:stop].clone()

    def restore(self, kept: Any, slots: list[int]) -> None:
        """:meth:`keep` 的结果写进这些槽位的开头。"""
        length = kept.shape[2]
        for slot in slots:
            self.reserve(slot, length)
            row = self.cache.row(slot) if self.grouped else self.cache.store[:, slot]
            row[:, :, :length] = kept

    # ---------------------------------------------------------------- 一层的各步，x [N, H]

    def project(self, layer: Layer, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """→ q ``[N, heads, D]``、并排的 k 与 v ``[N, 2·kv_heads, D]``，q、k 已旋转。"""
        qkv = layer.qkv(layer.input_norm(x, self.dtype)).view(len(x), -1, self.head_dim)
        qk = rotated = qkv[:, : self.heads + self.kv_heads]
        if layer.q_norm is not None:
            q, k = qk[:, : self.heads], qk[:, self.heads :]
            qk = torch.cat((layer.q_norm(q, self.dtype), layer.k_norm(k, self.dtype)), dim=1)
        cos, sin = rope  # 与 apply_rope 同一个公式，写回原处，k 与 v 就仍然并排
        torch.addcmul(qk * cos, qk.roll(self.head_dim // 2, -1), sin, out=rotated)
        return qkv[:, : self.heads], qkv[:, self.heads :]

    def finish(self, layer: Layer, x: Tensor, out: Tensor, stepping: bool = False) -> Tensor:
        """注意力的输出 → 这一层的输出；``stepping`` 表示一行一个词元，混合专家可以用定形的写法。"""
        x = layer.out.add_to(x, out.reshape(len(x), -1))
        y = layer.post_norm(x, self.dtype)
        if stepping and self.steady and layer.stacked is not None:
            return x + layer.stacked(y)
        if layer.experts is not None:
            return x + layer.experts(y.unsqueeze(0), None)[0][0]
        gate, up = layer.gate_up(y).chunk(2, dim=-1)
        return layer.down.add_to(x, F.silu(gate).mul_(up))

    def bias(self, positions: Tensor, used: int) -> Tensor:
        """``[B, 1, 1, used]``：各行自己长度之后的键为 -inf。"""
        hidden = torch.arange(used, device=self.device) > positions[:, None]
        bias = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device)
        return bias.masked_fill_(hidden, float("-inf"))[:, None, None]

    def reserve(self, slot: int, length: int) -> None:
        """保证 ``slot`` 的缓存与位置编码够到 ``length``。"""
        if self.grouped:
            self.cache.reserve(slot, length)
        else:
            self.cache.reserve(length)
        if len(self._cos) <= self.cache.capacity and len(self._cos) <= length:
            self._cos, self._sin = self._rope_table(max(self.cache.capacity, length) + 1)

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self._cos[positions].unsqueeze(1), self._sin[positions].unsqueeze(1)

    def _rope_table(self, length: int) -> tuple[Tensor, Tensor]:
        """cos、sin ``[length, D]``，fp32，sin 的前半已取负。"""
        positions = torch.arange(length, device=self.device).unsqueeze(0)
        if self.config.model_type == "minimind":
            cos, sin = self.model.model._rope(positions)
            return cos[0, :, 0], sin[0, :, 0]
        cos, sin = self.model.model.rotary_emb(torch.empty(0, device=self.device), positions)
        half = self.head_dim // 2
        return cos[0], torch.cat((-sin[0, :, :half], sin[0, :, half:]), dim=-1)

    def precision(self):
        """混合专家的权重不在这里合并，精度不同时交给自动混合精度；其余情况关掉外面的。"""
        mixed = self.layers[0].experts is not None and self.dtype != self.embedding.dtype
        return torch.autocast(self.device.type, dtype=self.dtype if mixed else None, enabled=mixed)
