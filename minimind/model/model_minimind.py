"""MiniMind 的模型：结构都在这个文件里，从上读到下；算得快的写法在旁边的 kernels.py，读结构时不必看。

顺序：配置 → 线性层与归一化 → 旋转位置编码（含 YaRN）→ 注意力 → 前馈 → 混合专家 → 主干 → 语言模型。
只用 torch；transformers 的配置基类与配置的登记除外，其余与它打交道的在 hf.py。导出权重时它们一起放进目录，
所以不引用项目里的其他部分。

形状记号：B 批、T 本次输入的长度、S 键的长度（缓存里的加上本次的）、H 隐藏维、D 每个头的维数、
V 词表、N = B·T、E 专家数、K 每个词元选中的专家数。
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, PretrainedConfig

from .kernels import (  # isort: skip
    AttentionPlan, ExpertOrder, attention, autocast_off, expand_heads, grouped_mm_available, grouped_swiglu,
    linear, linear_cross_entropy, packed_attention, plan_attention, refuse_wrapped, rms_norm,
)  # fmt: skip

IGNORE_INDEX = -100
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # 共享的两个权重

# ---------------------------------------------------------------- 配置

_LAYOUT_DEFAULTS = {  # 两种布局只差这几个默认值：v2 是 26M/104M/145M 那一代，v3 与 Qwen3 / Qwen3-MoE 同构
    "v2": dict(num_key_value_heads=2, rms_norm_eps=1e-5, num_experts_per_tok=2, n_shared_experts=1,
               aux_loss_alpha=0.01, seq_aux=True, widen=8 / 3),
    "v3": dict(num_key_value_heads=4, rms_norm_eps=1e-6, num_experts_per_tok=1, n_shared_experts=0,
               aux_loss_alpha=5e-4, seq_aux=False, widen=math.pi),
}  # fmt: skip

_YARN_DEFAULTS = dict(
    factor=16.0, original_max_position_embeddings=2048, beta_fast=32.0, beta_slow=1.0, attention_factor=1.0
)


class MiniMindConfig(PretrainedConfig):
    """模型的全部尺寸与开关。

    Args:
        arch: "v2" 或 "v3"；v3 多 QK-norm，混合专家没有共享专家。决定下面为 None 的默认值。
        hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads: 主干尺寸；键值头少于查询头即 GQA。
        head_dim: 每个头的维数，默认 hidden_size / num_attention_heads；intermediate_size: 前馈宽度，默认 64·ceil(r·hidden/64)，r 在 v2 是 8/3，在 v3 是 π。
        max_position_embeddings: 允许的最长上下文；位置编码现算，没有表，改大它不用重训权重形状。
        trained_length: 训练时一篇最长多少个词元，训练命令记下；不知道为 None。YaRN 的原窗口默认就是它，不知道则 2048。
        inference_rope_scaling: 推理时用 YaRN 外推；它的参数在 `rope_scaling`，可给的见 `_YARN_DEFAULTS`。
        flash_attn: True 走 SDPA；False 走写明白的 softmax。initializer_range: 线性层与词嵌入的初始标准差。
        zero_init_residual: 从头训练用的初始化：每层写回残差的两个投影（o_proj、down_proj）从零开始，词嵌入标准差减到 1/4
            （残差为零时，词嵌入若大，初始预测就是“重复自己”，损失高于 ln V）。只影响初始化，不影响计算。
        use_moe 及以下: 专家数（别名 num_experts）、每词元专家数、共享专家数、负载均衡系数
            （别名 router_aux_loss_coef）、按序列还是按全批统计、top-k 权重是否归一、专家宽度。

    Raises:
        ValueError: 尺寸互相矛盾，或 arch 不认识。
    """

    model_type = "minimind"
    # Trainer 评估时只收 logits
    keys_to_ignore_at_inference = [
        "past_key_values", "cache", "loss_sum", "target_count", "aux_loss", "hidden_states"
    ]  # fmt: skip
    attribute_map = {"num_experts": "n_routed_experts", "router_aux_loss_coef": "aux_loss_alpha"}

    # fmt: off
    def __init__(
        self, arch: str = "v2", hidden_size: int = 512, num_hidden_layers: int = 8, vocab_size: int = 6400,
        num_attention_heads: int = 8, num_key_value_heads: int | None = None, head_dim: int | None = None,
        intermediate_size: int | None = None, hidden_act: str = "silu", max_position_embeddings: int = 32768,
        rope_theta: float = 1e6, inference_rope_scaling: bool = False, rope_scaling: dict | None = None,
        rms_norm_eps: float | None = None, dropout: float = 0.0, flash_attn: bool = True,
        initializer_range: float = 0.02, zero_init_residual: bool = False, use_moe: bool = False,
        n_routed_experts: int | None = None, num_experts_per_tok: int | None = None, n_shared_experts: int | None = None,
        moe_intermediate_size: int | None = None, scoring_func: str = "softmax", norm_topk_prob: bool = True,
        aux_loss_alpha: float | None = None, seq_aux: bool | None = None, bos_token_id: int | None = 1,
        eos_token_id: int | list[int] = 2, pad_token_id: int = 0, tie_word_embeddings: bool = True,
        trained_length: int | None = None, **kwargs: Any,
    ):
        # fmt: on
        if arch not in _LAYOUT_DEFAULTS:
            raise ValueError(f"arch 只能是 {sorted(_LAYOUT_DEFAULTS)} 之一，得到 {arch!r}")
        layout = _LAYOUT_DEFAULTS[arch]

        def pick(value, name):
            return layout[name] if value is None else value

        self.arch, self.vocab_size = arch, vocab_size
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = pick(num_key_value_heads, "num_key_value_heads")
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.intermediate_size = intermediate_size or 64 * math.ceil(hidden_size * layout["widen"] / 64)
        self.hidden_act, self.scoring_func = hidden_act, scoring_func
        self.max_position_embeddings, self.rope_theta = max_position_embeddings, float(rope_theta)
        self.inference_rope_scaling = inference_rope_scaling
        window = {"original_max_position_embeddings": trained_length} if trained_length else {}
        self.yarn = {**_YARN_DEFAULTS, **window, **(rope_scaling or kwargs.pop("yarn", None) or {})}
        self.trained_length = trained_length
        self.rms_norm_eps = pick(rms_norm_eps, "rms_norm_eps")
        self.dropout, self.flash_attn = dropout, flash_attn
        self.initializer_range, self.zero_init_residual = initializer_range, zero_init_residual
        self.use_moe, self.norm_topk_prob = bool(use_moe), norm_topk_prob
        alias = kwargs.pop("num_experts", None)
        self.n_routed_experts = n_routed_experts or alias or 4
        self.num_experts_per_tok = pick(num_experts_per_tok, "num_experts_per_tok")
        self.n_shared_experts = pick(n_shared_experts, "n_shared_experts")
        self.moe_intermediate_size = moe_intermediate_size or self.intermediate_size
        alias = kwargs.pop("router_aux_loss_coef", None)
        self.aux_loss_alpha = pick(alias if aux_loss_alpha is None else aux_loss_alpha, "aux_loss_alpha")
        self.seq_aux = pick(seq_aux, "seq_aux")
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos_token_id, eos_token_id, pad_token_id
        self.tie_word_embeddings = tie_word_embeddings
        self._check()
        _register_model()
        super().__init__(**kwargs)
        # 有的版本的基类会把这几项放回它的默认值
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos_token_id, eos_token_id, pad_token_id
        self.tie_word_embeddings = tie_word_embeddings

    def record_trained_length(self, length: int) -> None:
        """训练用到的长度是 ``length``：YaRN 由它外推。按更长的窗口外推，没训练过的角度会被当成训练过的。"""
        self.trained_length = length
        self.yarn = {**self.yarn, "original_max_position_embeddings": length}

    def _check(self) -> None:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            raise ValueError(
                f"num_attention_heads={heads} 必须是 num_key_value_heads={kv_heads} 的整数倍，请调整其中一个"
            )
        if self.head_dim % 2:
            raise ValueError(f"每个头的维数必须是偶数才能旋转，得到 {self.head_dim}；请改 hidden_size 或头数")
        if self.hidden_act != "silu" or self.scoring_func != "softmax":
            raise ValueError("只支持 hidden_act='silu' 与 scoring_func='softmax'")
        chosen, experts = self.num_experts_per_tok, self.n_routed_experts
        if self.use_moe and not 1 <= chosen <= experts:
            raise ValueError(f"num_experts_per_tok={chosen} 应在 1 与 n_routed_experts={experts} 之间")


# 导出目录里的那一份由 auto_map 找到，不顶掉装着的
_INSTALLED = not __name__.startswith("transformers_modules.")
if _INSTALLED:
    AutoConfig.register("minimind", MiniMindConfig, exist_ok=True)


def _register_model() -> None:
    """``AutoModelForCausalLM`` 在内存里就登记到它那里；不在，就不为登记读入它（2 s 处理器时间）：它总是先建配置再找模型。"""
    if _INSTALLED and "transformers.models.auto.modeling_auto" in sys.modules:
        from .hf import MiniMindForCausalLM  # noqa: F401  登记在那个文件的末尾


# ---------------------------------------------------------------- 线性层与归一化


class Linear(nn.Linear):
    """没有偏置的线性层，名字、权重、初始化都与 nn.Linear 相同。"""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out]。"""
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """均方根归一化（Zhang & Sennrich 2019）：x / sqrt(mean(x²) + eps) · weight，内部用 fp32。

    输入输出 [..., H]。自动混合精度时直接给出半精度：后面几个线性层不必各自再转一遍。
    """

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


# ---------------------------------------------------------------- 旋转位置编码


def rope_frequencies(config: MiniMindConfig, device: torch.device | str = "cpu") -> Tensor:
    """每对维度的角频率 [D/2]，fp32；`inference_rope_scaling` 时按 YaRN 调整。

    YaRN（Peng 2023，式 17–23）：转得快的维度（原窗口内转过 beta_fast 圈以上）不动，转得慢的（不足 beta_slow 圈）
    按 factor 插值，中间线性过渡。
    """
    dim, base = config.head_dim, config.rope_theta
    freq = base ** (-torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
    if not config.inference_rope_scaling:
        return freq
    yarn = config.yarn
    window = yarn["original_max_position_embeddings"]

    def dim_of(turns: float) -> float:  # 在原窗口内恰好转 turns 圈的维度下标
        return dim * math.log(window / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(dim_of(yarn["beta_fast"])), 0)
    high = min(math.ceil(dim_of(yarn["beta_slow"])), dim // 2 - 1)
    index = torch.arange(dim // 2, dtype=torch.float32, device=device)
    ramp = ((index - low) / max(high - low, 1e-3)).clamp(0, 1)
    return freq * (1 - ramp + ramp / yarn["factor"])


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """旋转 x [B, T, heads, D]：前半与后半维当作实部与虚部；cos、sin [B 或 1, T, 1, D]，sin 的前半已取负。

    全用实数写，NPU 没有复数算子。roll 比拼接两半快一倍（CPU，[8, 512, 8, 64] 前向加反向 5.0 对 10.6 ms）。
    """
    return (x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)


# ---------------------------------------------------------------- 注意力


def plain_attention(q, k, v, mask: Tensor | None, causal: bool, dropout: float = 0.0) -> Tensor:
    """同 `attention`，公式写明白：softmax(q·kᵀ/√D + mask)·v。`flash_attn=False` 时用，供对照与教学。"""
    k, v = expand_heads(k, q), expand_heads(v, q)
    score = (q @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1])
    if mask is None and causal:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        score = score.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else score + mask
    return F.dropout(score.softmax(-1), dropout).to(q.dtype) @ v


class Attention(nn.Module):
    """分组查询注意力。v3 在旋转之前对 q、k 逐头做 RMSNorm。"""

    def __init__(self, config: MiniMindConfig, layer_idx: int):
        super().__init__()
        self.layer_idx, self.head_dim = layer_idx, config.head_dim
        self.attend = attention if config.flash_attn else plain_attention
        self.dropout = config.dropout
        width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, width, bias=False)
        self.k_proj = Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = Linear(width, config.hidden_size, bias=False)
        self.o_proj.writes_residual = True
        self.q_norm = self.k_norm = None
        if config.arch == "v3":
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], plan: AttentionPlan, cache: Any = None):
        """x [B, T, H] → [B, T, H]。"""
        B, T, _ = x.shape
        q, k, v = (proj(x).view(B, T, -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        dropout = self.dropout if self.training else 0.0
        if plan.mode != "sdpa":  # 几篇首尾相连，各看各的
            q, k, v = (t.flatten(0, 1) for t in (q, k, v))
            out = packed_attention(q, k, v, plan, dropout, self.attend)
        else:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            if cache is not None:
                k, v = cache.update(k, v, self.layer_idx)
            out = self.attend(q, k, v, plan.mask, plan.causal, dropout).transpose(1, 2)
        return self.o_proj(out.reshape(B, T, -1))


# ---------------------------------------------------------------- 前馈


class MLP(nn.Module):
    """SwiGLU（Shazeer 2020）：down(silu(gate(x)) · up(x))。输入输出 [..., H]。"""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)
        self.down_proj.writes_residual = True

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


# ---------------------------------------------------------------- 混合专家


class MoE(nn.Module):
    """混合专家前馈：softmax 门控，取前 K 个专家，外加总是参与的共享专家。

    负载均衡损失（Switch Transformer 式 4；DeepSeek-V2 的按序列版本）：alpha · E · Σ_e f_e·P_e，
    f_e 是专家 e 分到的份额（除以 K，不随 top-k 变大），P_e 是平均门控概率。
    """

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        width = config.moe_intermediate_size
        self.num_experts, self.top_k = config.n_routed_experts, config.num_experts_per_tok
        self.alpha, self.seq_aux = config.aux_loss_alpha, config.seq_aux
        self.norm_topk, self.norm_single = config.norm_topk_prob, config.arch == "v3"
        self.gate = Linear(config.hidden_size, self.num_experts, bias=False)
        self.experts = nn.ModuleList(MLP(config.hidden_size, width) for _ in range(self.num_experts))
        shared = [MLP(config.hidden_size, width) for _ in range(config.n_shared_experts)]
        self.shared_experts = nn.ModuleList(shared) if shared else None
        self.last_load: Tensor | None = None

    def forward(self, x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [B, T, H]，valid [B, T]（True 为真词元，None 表示全是）→ 输出 [B, T, H] 与辅助损失标量。"""
        (B, T, H), flat = x.shape, x.flatten(0, 1)
        score, weight, expert = self.route(flat)
        order = ExpertOrder(expert)
        chosen = torch.zeros_like(score).scatter_(1, expert, 1.0)  # [N, E]，选中为 1
        count = chosen.sum(0).long()  # [E]
        y = order.restore(self._experts(order.dispatch(flat), count))  # [N, K, H]
        y = (y * weight.unsqueeze(-1).to(y.dtype)).sum(1)
        for expert_mlp in self.shared_experts or ():
            y = y + expert_mlp(flat)
        return y.view(B, T, H), self._balance_loss(score, chosen, valid, B, T)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [N, H] → 各专家的概率 [N, E]，选中的 K 个的权重与编号 [N, K]。"""
        refuse_wrapped("路由器 gate", self.gate)
        with autocast_off(x):  # 路由差一点就换专家，用 fp32
            score = linear(x.float(), self.gate.weight.float()).softmax(-1)
        weight, expert = score.topk(self.top_k, dim=-1, sorted=False)
        if self.norm_topk and (self.top_k > 1 or self.norm_single):
            weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
        return score, weight, expert

    def _experts(self, x: Tensor, count: Tensor) -> Tensor:
        """x [N·K, H] 已按专家排序，count [E] → [N·K, H]。没有词元的专家得到零梯度而不是 None，DDP 才不会等它。"""
        # 分组乘法直接取 weight；专家的层被换过（加了 LoRA）时要走它们自己的 forward
        plain = all(type(layer) is Linear for layer in self.experts[0].children())
        if plain and grouped_mm_available(x, self.experts[0].gate_proj.out_features):
            return grouped_swiglu(self.experts, x, count)
        return torch.cat([expert(part) for expert, part in zip(self.experts, x.split(count.tolist()))])

    def _balance_loss(self, score: Tensor, chosen: Tensor, valid: Tensor | None, B: int, T: int) -> Tensor:
        E, K = self.num_experts, self.top_k
        if valid is not None:
            keep = valid.reshape(-1, 1).to(score.dtype)
            chosen, score, n = chosen * keep, score * keep, valid.sum(-1).to(score.dtype)  # n [B]
        else:
            n = torch.full((B,), float(T), device=score.device)
        self.last_load = (chosen.sum(0) / (n.sum() * K).clamp_min(1)).detach()
        if not self.training or self.alpha <= 0:
            return score.new_zeros(())
        if self.seq_aux:
            n = n.clamp_min(1).unsqueeze(-1)
            share = chosen.view(B, T, E).sum(1) / (n * K)
            prob = score.view(B, T, E).sum(1) / n
            return self.alpha * E * (share * prob).sum(-1).mean()
        total = n.sum().clamp_min(1)
        return self.alpha * E * ((chosen.sum(0) / (total * K)) * (score.sum(0) / total)).sum()


# ---------------------------------------------------------------- 主干


class Block(nn.Module):
    """一层：x + attn(norm(x))，再 x + mlp(norm(x))。"""

    def __init__(self, config: MiniMindConfig, layer_idx: int):
        super().__init__()
        self.self_attn = Attention(config, layer_idx)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config) if config.use_moe else MLP(config.hidden_size, config.intermediate_size)
        self.dropout = config.dropout

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def forward(self, x, rope, plan, valid=None, cache=None) -> tuple[Tensor, Tensor | None]:
        x = x + self._drop(self.self_attn(self.input_layernorm(x), rope, plan, cache))
        y = self.post_attention_layernorm(x)
        y, aux = self.mlp(y, valid) if isinstance(self.mlp, MoE) else (self.mlp(y), None)
        return x + self._drop(y), aux


class MiniMindModel(nn.Module):
    """词嵌入、若干层、末尾归一化。"""

    recompute = staticmethod(partial(checkpoint, use_reentrant=False))

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._frequencies: Tensor | None = None
        self.gradient_checkpointing = 0  # 前几层不存中间结果，反向时重算

    def forward(
        self, input_ids, attention_mask=None, position_ids=None, cache=None, cu_seqlens=None, max_seqlen=None,
        inputs_embeds=None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """input_ids [B, T] → 末层隐藏状态 [B, T, H] 与辅助损失标量（各层之和）。"""
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        T = x.shape[1]
        past = cache.get_seq_length() if cache is not None else 0
        if past + T > self.config.max_position_embeddings:
            self._check_length(past, T, position_ids, cu_seqlens, max_seqlen)
        if position_ids is None:
            position_ids = torch.arange(past, past + T, device=x.device).unsqueeze(0)
        rope = self._rope(position_ids)
        dropout = bool(self.config.dropout) and self.training
        cached, flash = cache is not None, self.config.flash_attn
        plan = plan_attention(x, past, attention_mask, cu_seqlens, max_seqlen, cached, flash, dropout)
        # 哪些是真词元：补齐的位置不计入专家的负载均衡；打包行的尾巴没有 mask，靠补齐用的词元认出来
        valid = None
        if self.config.use_moe and attention_mask is not None and attention_mask.dim() == 2:
            valid = attention_mask[:, -T:].bool()
        elif self.config.use_moe and cu_seqlens is not None and input_ids is not None:
            valid = input_ids != self.config.pad_token_id
        if dropout:
            x = F.dropout(x, self.config.dropout)
        aux_total = torch.zeros((), device=x.device)
        for i, layer in enumerate(self.layers):
            again = self.training and i < self.gradient_checkpointing
            x, aux = (partial(self.recompute, layer) if again else layer)(x, rope, plan, valid, cache)
            if aux is not None:
                aux_total = aux_total + aux
        return self.norm(x), aux_total

    def _check_length(self, past, T, position_ids, cu_seqlens, max_seqlen) -> None:
        """一行比位置上限还长：几篇拼成的看最长的一篇，每篇的位置从 0 起；不与显卡同步。

        Raises:
            ValueError: 有一篇超过 max_position_embeddings。
        """
        limit, longest, lengths = self.config.max_position_embeddings, past + T, None
        if cu_seqlens is not None:
            longest, lengths = max_seqlen, cu_seqlens.diff() if max_seqlen is None else None
        elif position_ids is not None and not past:
            lengths = position_ids + 1
        if lengths is not None:
            if lengths.device.type != "cpu" or torch.compiler.is_compiling():
                return  # 不问显卡就不知道；打包的数据装进来之前查过每篇的长度
            longest = int(lengths.max())
        if longest > limit:
            what = f"已有 {past} 个词元，又来 {T} 个" if past else f"{longest} 个词元"
            hint = "请截短输入，或调大这个配置（配合 inference_rope_scaling）"
            raise ValueError(f"上下文太长：{what}，超过 max_position_embeddings={limit}。{hint}")

    def _rope(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """position_ids [B 或 1, T] → cos、sin [B 或 1, T, 1, D]，fp32，sin 的前半已取负。

        频率不是 buffer：模型整体转半精度、或在 meta 设备上建起来，它都仍是正确的 fp32。
        """
        frequencies = self._frequencies
        if frequencies is None or frequencies.device != position_ids.device:
            frequencies = rope_frequencies(self.config, position_ids.device)
            if not torch.compiler.is_compiling():  # 编译出的图（尤其 CUDA graph）的输出不能留到下一次用
                self._frequencies = frequencies
        angle = (position_ids.unsqueeze(-1).float() * frequencies).unsqueeze(2)
        factor = self.config.yarn["attention_factor"] if self.config.inference_rope_scaling else 1.0
        cos, sin = angle.cos() * factor, angle.sin() * factor
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


# ---------------------------------------------------------------- 语言模型


@dataclass
class MiniMindOutput:
    """前向的结果。

    loss: 目标词元上的平均交叉熵（不含辅助损失）；loss_sum: 加权和；target_count: 权重和（0 维张量）。
    aux_loss: 已乘 alpha 的负载均衡损失，稠密模型为 0。
    logits [B, T', V]；hidden_states [B, T, H] 是末尾归一化之后的隐藏状态。
    """

    loss: Tensor | None = None
    loss_sum: Tensor | None = None
    target_count: Tensor | None = None
    aux_loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    hidden_states: Tensor | None = None

    @property
    def cache(self) -> Any:
        """``past_key_values`` 的另一个名字。"""
        return self.past_key_values


class MiniMindLM(nn.Module):
    """带语言模型头的 MiniMind，只用 torch；权重名与公开版相同，词嵌入与输出头共享。

    用的时候建 :class:`MiniMindForCausalLM`：它是这个类加上 transformers 的接口，在 hf.py。
    """

    cross_entropy = staticmethod(linear_cross_entropy)

    def __init__(self, config: MiniMindConfig | None = None):
        super().__init__()
        self.config = config or MiniMindConfig()
        self.build()
        self.check_tied()

    def build(self) -> None:
        """建起各层，初始化，绑定。在 meta 设备上建时初始化不做事，等读入权重。"""
        self.model = MiniMindModel(self.config)
        self.lm_head = Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
        self.apply(self.init_module)
        if self.config.tie_word_embeddings:
            self.tie()
        self.register_load_state_dict_post_hook(_tie_again)

    @torch.no_grad()
    def init_module(self, module: nn.Module) -> None:
        """给一层自己的参数赋初值：线性层与词嵌入正态，归一化全 1。"""
        zero_residual, std = self.config.zero_init_residual, self.config.initializer_range
        if zero_residual and getattr(module, "writes_residual", False):
            nn.init.zeros_(module.weight)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std / 4 if zero_residual else std)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)

    @property
    def tied_keys(self) -> dict[str, str]:
        """``{权重文件里可以没有的键: 它共享的那个}``。"""
        return {HEAD: EMBEDDING} if self.config.tie_word_embeddings else {}

    @property
    def device(self) -> torch.device:
        """参数所在的设备。"""
        return self.lm_head.weight.device

    # ------------------------------------------------------------ 绑定：自己做，自己查

    def tie(self) -> None:
        """让输出头用词嵌入的那个参数。"""
        self.lm_head.weight = self.model.embed_tokens.weight
        self.lm_head.out_features = self.lm_head.weight.shape[0]

    def check_tied(self) -> None:
        """该共享的没共享（或反过来），训练出来的是另一个模型，参数也不是这么多。

        Raises:
            RuntimeError: 与 ``config.tie_word_embeddings`` 不符。
        """
        tied = self.lm_head.weight is self.model.embed_tokens.weight
        if tied != self.config.tie_word_embeddings:
            found = "是同一个参数" if tied else "不是同一个参数"
            wanted = f"tie_word_embeddings={self.config.tie_word_embeddings}"
            raise RuntimeError(f"词嵌入与输出头{found}，而 {wanted}；请检查 transformers 的版本与改过的代码")

    def check_same(self, embedding: Tensor, head: Tensor) -> None:
        """
        Raises:
            ValueError: 要绑定的两份权重不相等：绑上就丢掉一份，不绑就是另一个模型。
        """
        if embedding is head or embedding.is_meta or head.is_meta:
            return
        if embedding.shape != head.shape or not torch.equal(embedding, head.to(embedding)):
            raise ValueError(
                f"权重里 {EMBEDDING} {tuple(embedding.shape)} 与 {HEAD} {tuple(head.shape)} 不相等，"
                "而 tie_word_embeddings=True；这份权重没有共享词嵌入，请用 tie_word_embeddings=False 的配置读它"
            )

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        embedding, head = state_dict.get(prefix + EMBEDDING), state_dict.get(prefix + HEAD)
        both = self.config.tie_word_embeddings and embedding is not None and head is not None
        if both and embedding.shape == head.shape:  # 形状不对的由 load_state_dict 报
            self.check_same(embedding, head)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn, recurse: bool = True):
        """换设备、换精度：参数若被换成新的（如 meta → to_empty），共享的仍共享。"""
        tied = self.lm_head.weight is self.model.embed_tokens.weight
        super()._apply(fn, recurse)
        if tied:
            self.tie()
        return self

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, past_key_values: Any = None, labels: Tensor | None = None,
        loss_weights: Tensor | None = None, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None,
        logits_to_keep: int | Tensor = 0, return_logits: bool | None = None, inputs_embeds: Tensor | None = None,
    ) -> MiniMindOutput:  # fmt: skip
        """一次前向。

        Args:
            input_ids: [B, T]。
            attention_mask: [B, 缓存+T]，1 为真词元；或 4 维的现成 mask。
            position_ids: [B, T]；打包行每篇从 0 起。
            past_key_values: 任何有 `update(k, v, layer_idx)` 与 `get_seq_length()` 的缓存；k、v 为 [B, kv_heads, T, D]。
            labels: [B, T]，与 input_ids 对齐（移位在里面做），-100 不是目标。
            loss_weights: [B, T]，与 labels 对齐的每词元权重。
            cu_seqlens: int32 [n+1]，把 B·T 个位置切成文档的累计边界，首 0 末 B·T。
            max_seqlen: 最长的一篇（CUDA 变长内核要用）。
            logits_to_keep: 只算最后几个位置的 logits；0 为全部，也可给位置下标，
                或 [B, T] 的 bool 掩码，此时 logits 是 [N, V]，按行优先的次序。
            return_logits: None 表示“训练且有 labels 时不返回”，此时损失分块算，不产生整块 logits。

        Raises:
            ValueError: 超过最大位置，或参数互相矛盾。
            TypeError: 输出头被换成了别的模块，而损失直接用它的权重。
        """
        args = input_ids, attention_mask, position_ids, past_key_values, cu_seqlens, max_seqlen, inputs_embeds
        hidden, aux_loss = self.model(*args)
        return_logits = return_logits if return_logits is not None else labels is None or not self.training
        logits = loss = loss_sum = target_count = None
        if return_logits:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            masked = isinstance(keep, Tensor) and keep.dtype == torch.bool
            logits = self.lm_head(hidden[keep] if masked else hidden[:, keep])
        if labels is not None:
            target = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
            weight = (target != IGNORE_INDEX).float()
            if loss_weights is not None:
                weight = weight * F.pad(loss_weights[:, 1:], (0, 1)).flatten()
            refuse_wrapped("输出头 lm_head", self.lm_head)
            loss_sum = self.cross_entropy(hidden.flatten(0, 1), self.lm_head.weight, target, weight)
            target_count = weight.sum()
            loss = loss_sum / target_count.where(target_count > 0, 1.0)
        return MiniMindOutput(loss, loss_sum, target_count, aux_loss, logits, past_key_values, hidden)

    def moe_load(self) -> list[Tensor] | None:
        """上一次前向里每层各专家分到的词元份额 [E]（和为 1）；稠密模型返回 None。"""
        return [layer.mlp.last_load for layer in self.model.layers] if self.config.use_moe else None


def _tie_again(model: MiniMindLM, incompatible_keys: Any) -> None:
    """``load_state_dict(assign=True)`` 把两个键各换成一个新参数，换完再绑上。"""
    plain = isinstance(model.model.embed_tokens, nn.Embedding) and isinstance(model.lm_head, nn.Linear)
    if plain and model.config.tie_word_embeddings:
        model.tie()


def __getattr__(name: str) -> Any:
    """hf.py 用到才读：它连带一千多个模块，只看帮助、只做推理的不必等。kernels.py 里的名字也能从这里引用。"""
    home = import_module(".hf" if name == "MiniMindForCausalLM" else ".kernels", __package__)
    if hasattr(home, name):
        return getattr(home, name)
    raise AttributeError(f"{__name__} 里没有 {name}")
