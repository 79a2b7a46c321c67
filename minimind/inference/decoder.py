"""解码器：引擎与模型之间的一层。给出「读完这些提示」与「每行再走一步」两个动作，KV 缓存归它管。

:class:`FusedDecoder` 直接用权重算，不经过 ``model.forward``：q、k、v 合成一次矩阵乘，gate、up 合成一次，
GQA 不展开头，新的 K、V 就地写进各行自己的位置，注意力只看用到的长度。它认 MiniMind（稠密 v2、v3 与混合专家）
和与之同构的 Llama、Qwen3；别的结构用 :class:`ForwardDecoder`，只靠公开的 ``forward`` 接口，慢但什么都能跑。
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind.inference.kv_cache import SlotKVCache

# 与 MiniMind 稠密结构逐层相同的公开结构：权重名也相同
SAME_LAYOUT = ("LlamaForCausalLM", "Qwen3ForCausalLM")


def make_decoder(model: nn.Module, max_slots: int, dtype: torch.dtype | None = None) -> Any:
    """给这个模型挑解码器。

    Args:
        max_slots: 同时最多多少行。
        dtype: 矩阵乘与缓存的精度，默认与权重相同；只有 :class:`FusedDecoder` 能换。
    """
    config = model.config
    if config.model_type == "minimind" or _is_plain_llama(model):
        return FusedDecoder(model, max_slots, dtype)
    return ForwardDecoder(model, max_slots)


def _is_plain_llama(model: nn.Module) -> bool:
    config = model.config
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return (
        type(model).__name__ in SAME_LAYOUT
        and rope.get("rope_type", "default") == "default"
        and config.hidden_act == "silu"
        and not getattr(config, "use_sliding_window", False)
    )


class _Layer:
    """一层的权重，投影已合并；``refresh`` 就地更新，地址不变。"""

    def __init__(self, block: nn.Module, dtype: torch.dtype):
        self.block, self.dtype = block, dtype
        attention, mlp = block.self_attn, block.mlp
        self.input_norm, self.post_norm = block.input_layernorm, block.post_attention_layernorm
        self.q_norm, self.k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self._joined = {
            "qkv": [attention.q_proj, attention.k_proj, attention.v_proj],
            "out": [attention.o_proj],
        }
        self.experts = mlp if not hasattr(mlp, "gate_proj") else None
        if self.experts is None:
            self._joined |= {"gate_up": [mlp.gate_proj, mlp.up_proj], "down": [mlp.down_proj]}
        self.weights: dict[str, Tensor] = {}
        self.biases: dict[str, Tensor | None] = {}
        self.refresh()

    def refresh(self) -> None:
        for name, linears in self._joined.items():
            weight = torch.cat([linear.weight for linear in linears]).to(self.dtype)
            bias = None
            if linears[0].bias is not None:
                bias = torch.cat([linear.bias for linear in linears]).to(self.dtype)
            if name in self.weights:
                self.weights[name].copy_(weight)
                if bias is not None:
                    self.biases[name].copy_(bias)
            else:
                self.weights[name], self.biases[name] = weight, bias

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[name], self.biases[name])


class FusedDecoder:
    """直接用权重解码。

    Args:
        model: MiniMind，或 ``SAME_LAYOUT`` 里的结构。
        max_slots: 槽位数。
        dtype: 矩阵乘与缓存的精度；残差仍用权重的精度，与自动混合精度下的训练一致。
    """

    def __init__(self, model: nn.Module, max_slots: int, dtype: torch.dtype | None = None):
        self.model, self.config = model, model.config
        weight = model.model.embed_tokens.weight
        self.device, self.dtype = weight.device, dtype or weight.dtype
        config = self.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        with torch.inference_mode(), self._precision():
            self.layers = [_Layer(block, self.dtype) for block in model.model.layers]
            self.head = model.lm_head.weight.to(self.dtype, copy=self.dtype != weight.dtype)
        self.cache = SlotKVCache(
            config.num_hidden_layers,
            max_slots,
            self.kv_heads,
            self.head_dim,
            dtype=self.dtype,
            device=self.device,
        )
        self._cos = self._sin = torch.empty(0)

    def refresh(self) -> None:
        """权重变了：重新合并。"""
        with torch.inference_mode(), self._precision():
            for layer in self.layers:
                layer.refresh()
            if self.head.data_ptr() != self.model.lm_head.weight.data_ptr():
                self.head.copy_(self.model.lm_head.weight)

    def reserve(self, length: int) -> None:
        """保证缓存与位置编码够到 ``length``。"""
        self.cache.reserve(length)
        if len(self._cos) < self.cache.capacity:
            self._cos, self._sin = self._rope_table(self.cache.capacity)

    def prefill(self, prompts: Sequence[Sequence[int]], slots: list[int]) -> Tensor:
        """读一批提示，K、V 写进各自的槽位。

        提示右侧补齐：因果注意力里补在后面的位置谁也看不到，不需要掩码；写进缓存的那几个位置以后会被盖掉。

        Returns:
            每条提示末尾的 logits ``[P, V]``。
        """
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        width = int(lengths.max())
        self.reserve(width)
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, prompt in zip(ids, prompts):
            row[: len(prompt)] = torch.tensor(prompt)
        x = self.model.model.embed_tokens(ids.to(self.device))
        rope = self._cos[None, :width], self._sin[None, :width]
        with self._precision():
            for index, layer in enumerate(self.layers):
                q, k, v = self._project(layer, x, rope)
                q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
                self.cache.keys[index][slots, :, :width] = k
                self.cache.values[index][slots, :, :width] = v
                x = self._finish(layer, x, self._attend_prompt(q, k, v).transpose(1, 2))
            last = x[torch.arange(len(prompts), device=self.device), lengths.to(self.device) - 1]
            return self._logits(last)

    def decode(self, tokens: Tensor, positions: Tensor, lengths: Sequence[int]) -> Tensor:
        """前 B 个槽位各走一步。

        Args:
            tokens: ``[B]`` 各行刚写下的 token。
            positions: ``[B]`` 它们的位置（从 0 起），在设备上。
            lengths: 主机上的同一份数：用到多长由它定，不必问设备。

        Returns:
            ``[B, V]``。
        """
        rows, used = len(tokens), max(lengths) + 1
        self.reserve(used)
        slots = torch.arange(rows, device=self.device)
        bias = None
        if min(lengths) + 1 < used:
            hidden = torch.arange(used, device=self.device) > positions[:, None]
            bias = torch.zeros(rows, 1, 1, used, dtype=self.dtype, device=self.device)
            bias.masked_fill_(hidden[:, None, None], float("-inf"))
        x = self.model.model.embed_tokens(tokens).unsqueeze(1)
        rope = self._cos[positions].unsqueeze(1), self._sin[positions].unsqueeze(1)
        with self._precision():
            for index, layer in enumerate(self.layers):
                q, k, v = self._project(layer, x, rope)
                keys, values = self.cache.keys[index], self.cache.values[index]
                keys[slots, :, positions] = k[:, 0]
                values[slots, :, positions] = v[:, 0]
                # 共用一个键值头的查询头当作几个查询：[B, kv, 组, D]，不展开 K、V
                q = q.view(rows, self.kv_heads, -1, self.head_dim)
                out = F.scaled_dot_product_attention(
                    q, keys[:rows, :, :used], values[:rows, :, :used], attn_mask=bias
                )
                x = self._finish(layer, x, out)
            return self._logits(x[:, 0])

    def copy(self, source: list[int], target: list[int], length: int) -> None:
        """``source`` 各槽位的前 ``length`` 个位置抄一份到 ``target``。"""
        self.cache.copy(source, target, length)

    def move(self, source: list[int], target: list[int], length: int) -> None:
        """``source`` 搬到 ``target``，原处作废。"""
        self.cache.copy(source, target, length)

    def keep(self, slot: int, length: int) -> Any:
        """把一个槽位的前 ``length`` 个位置另存一份。"""
        return tuple(s[:, slot, :, :length].clone() for s in (self.cache.keys, self.cache.values))

    def restore(self, kept: Any, slots: list[int]) -> None:
        """:meth:`keep` 的结果写进这些槽位。"""
        length = kept[0].shape[2]
        for store, saved in zip((self.cache.keys, self.cache.values), kept):
            store[:, slots, :, :length] = saved.unsqueeze(1)

    # ---------------------------------------------------------------- 一层的各步

    def _project(self, layer: _Layer, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """x [B, T, H] → q [B, T, heads, D]、k、v [B, T, kv_heads, D]，已旋转。"""
        qkv = layer.linear("qkv", layer.input_norm(x).to(self.dtype))
        qkv = qkv.view(*x.shape[:2], -1, self.head_dim)
        qk, v = qkv[:, :, : self.heads + self.kv_heads], qkv[:, :, self.heads + self.kv_heads :]
        if layer.q_norm is not None:
            qk = torch.cat((layer.q_norm(qk[:, :, : self.heads]), layer.k_norm(qk[:, :, self.heads :])), 2)
        cos, sin = (t.unsqueeze(2) for t in rope)
        qk = (qk * cos + qk.roll(self.head_dim // 2, dims=-1) * sin).to(self.dtype)
        return qk[:, :, : self.heads], qk[:, :, self.heads :], v

    def _attend_prompt(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.heads != self.kv_heads:
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def _finish(self, layer: _Layer, x: Tensor, out: Tensor) -> Tensor:
        """注意力的输出 → 这一层的输出。"""
        x = x + layer.linear("out", out.reshape(*x.shape[:2], -1))
        y = layer.post_norm(x).to(self.dtype)
        if layer.experts is not None:
            return x + layer.experts(y, None)[0]
        gate, up = layer.linear("gate_up", y).chunk(2, dim=-1)
        return x + layer.linear("down", F.silu(gate) * up)

    def _logits(self, x: Tensor) -> Tensor:
        return F.linear(self.model.model.norm(x).to(self.dtype), self.head)

    def _precision(self):
        """混合专家的权重不在这里合并，精度不同时交给自动混合精度；其余情况关掉外面的。"""
        mixed = self.config.model_type == "minimind" and self.config.use_moe
        mixed = mixed and self.dtype != self.model.model.embed_tokens.weight.dtype
        return torch.autocast(self.device.type, dtype=self.dtype if mixed else None, enabled=mixed)

    def _rope_table(self, length: int) -> tuple[Tensor, Tensor]:
        """cos、sin ``[length, D]``，fp32，sin 的前半已取负。"""
        positions = torch.arange(length, device=self.device).unsqueeze(0)
        if self.config.model_type == "minimind":
            cos, sin = self.model.model._rope(positions)
            return cos[0, :, 0], sin[0, :, 0]
        cos, sin = self.model.model.rotary_emb(torch.empty(0, device=self.device), positions)
        half = self.head_dim // 2
        return cos[0], torch.cat((-sin[0, :, :half], sin[0, :, half:]), dim=-1)


class ForwardDecoder:
    """只靠 ``forward(input_ids, past_key_values, use_cache)`` 的解码器：每行一个 transformers 自己的缓存，逐行算。"""

    def __init__(self, model: nn.Module, max_slots: int):
        self.model = model
        self.device = next(model.parameters()).device
        self.caches: list[Any] = [None] * max_slots

    def refresh(self) -> None:
        """每步都直接用模型的权重，没有要更新的。"""

    def prefill(self, prompts: Sequence[Sequence[int]], slots: list[int]) -> Tensor:
        """见 :meth:`FusedDecoder.prefill`。"""
        rows = [self._forward(list(prompt), None, slot) for prompt, slot in zip(prompts, slots)]
        return torch.cat(rows)

    def decode(self, tokens: Tensor, positions: Tensor, lengths: Sequence[int]) -> Tensor:
        """见 :meth:`FusedDecoder.decode`。"""
        ids = tokens.tolist()
        return torch.cat([self._forward([token], self.caches[slot], slot) for slot, token in enumerate(ids)])

    def copy(self, source: list[int], target: list[int], length: int) -> None:
        for a, b in zip(source, target):
            self.caches[b] = copy.deepcopy(self.caches[a])

    def move(self, source: list[int], target: list[int], length: int) -> None:
        for a, b in zip(source, target):
            self.caches[b], self.caches[a] = self.caches[a], None

    def keep(self, slot: int, length: int) -> Any:
        return copy.deepcopy(self.caches[slot])

    def restore(self, kept: Any, slots: list[int]) -> None:
        for slot in slots:
            self.caches[slot] = copy.deepcopy(kept)

    def _forward(self, ids: list[int], cache: Any, slot: int) -> Tensor:
        input_ids = torch.tensor([ids], device=self.device)
        out = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True)
        self.caches[slot] = out.past_key_values
        return out.logits[:, -1]
