"""MiniMind 的模型：一个文件，从上读到下。

顺序：配置 → 归一化 → 旋转位置编码（含 YaRN）→ 注意力 → 前馈 → 混合专家 → 主干 → 语言模型 → 分块交叉熵。
只用 torch；transformers 的配置基类与配置的登记除外，其余与它打交道的在旁边的 hf.py。导出权重时这两个文件一起放进目录，
所以不引用项目里的其他部分。

形状记号：B 批、T 本次输入的长度、S 键的长度（缓存里的加上本次的）、H 隐藏维、D 每个头的维数、
V 词表、N = B·T、E 专家数、K 每个词元选中的专家数。
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import platform
import sys
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, PretrainedConfig

varlen_attn, _VARLEN_OPTIONS = None, {}
if torch.cuda.is_available():  # 没有显卡用不上，而它连带编译器，读入要 1 s 处理器时间
    with contextlib.suppress(ImportError):  # torch>=2.10 才有公开的变长注意力；它的参数在 2.12 前后换过名字
        from torch.nn.attention.varlen import varlen_attn

        _VARLEN_OPTIONS = inspect.signature(varlen_attn).parameters

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
        head_dim: 每个头的维数，默认 hidden_size / num_attention_heads。
        intermediate_size: 前馈宽度，默认 64·ceil(r·hidden/64)，r 在 v2 是 8/3，在 v3 是 π。
        max_position_embeddings: 允许的最长上下文；位置编码现算，没有表，改大它不用重训权重形状。
        trained_length: 训练时一篇最长多少个词元，训练命令记下；不知道为 None。YaRN 的原窗口默认就是它，不知道则 2048。
        inference_rope_scaling: 推理时用 YaRN 外推；参数在 `rope_scaling`（factor、original_max_position_embeddings、
            beta_fast、beta_slow、attention_factor）。
        flash_attn: True 走 SDPA；False 走写明白的 softmax，供对照与教学。
        initializer_range: 线性层与词嵌入的初始标准差。
        zero_init_residual: 从头训练用的初始化：每层写回残差的两个投影（o_proj、down_proj）从零开始，词嵌入标准差
            减到 1/4（残差为零时，词嵌入若大，初始预测就是“重复自己”，损失高于 ln V）。只影响初始化，不影响计算。
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
        aux_loss_alpha: float | None = None, seq_aux: bool | None = None, bos_token_id: int = 1,
        eos_token_id: int = 2, pad_token_id: int = 0, tie_word_embeddings: bool = True,
        trained_length: int | None = None, **kwargs: Any,
    ):
        # fmt: on
        if arch not in _LAYOUT_DEFAULTS:
            raise ValueError(f"arch 只能是 {sorted(_LAYOUT_DEFAULTS)} 之一，得到 {arch!r}")
        layout = _LAYOUT_DEFAULTS[arch]

        def pick(value, name):
            return layout[name] if value is None else value

        self.arch = arch
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.vocab_size = vocab_size
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = pick(num_key_value_heads, "num_key_value_heads")
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.intermediate_size = intermediate_size or 64 * math.ceil(hidden_size * layout["widen"] / 64)
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.rope_theta = float(rope_theta)
        self.inference_rope_scaling = inference_rope_scaling
        window = {"original_max_position_embeddings": trained_length} if trained_length else {}
        self.yarn = {**_YARN_DEFAULTS, **window, **(rope_scaling or kwargs.pop("yarn", None) or {})}
        self.trained_length = trained_length
        self.rms_norm_eps = pick(rms_norm_eps, "rms_norm_eps")
        self.dropout = dropout
        self.flash_attn = flash_attn
        self.initializer_range = initializer_range
        self.zero_init_residual = zero_init_residual
        self.use_moe = bool(use_moe)
        alias = kwargs.pop("num_experts", None)
        self.n_routed_experts = n_routed_experts or alias or 4
        self.num_experts_per_tok = pick(num_experts_per_tok, "num_experts_per_tok")
        self.n_shared_experts = pick(n_shared_experts, "n_shared_experts")
        self.moe_intermediate_size = moe_intermediate_size or self.intermediate_size
        self.scoring_func = scoring_func
        self.norm_topk_prob = norm_topk_prob
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
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} 必须是 "
                f"num_key_value_heads={self.num_key_value_heads} 的整数倍，请调整其中一个"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"每个头的维数必须是偶数才能做旋转位置编码，得到 {self.head_dim}；请改 hidden_size 或头数"
            )
        if self.hidden_act != "silu" or self.scoring_func != "softmax":
            raise ValueError("只支持 hidden_act='silu' 与 scoring_func='softmax'")
        if self.use_moe and not 1 <= self.num_experts_per_tok <= self.n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} 应在 1 与 n_routed_experts={self.n_routed_experts} 之间"
            )


_INSTALLED = not __name__.startswith(
    "transformers_modules."
)  # 导出目录里的那一份由 auto_map 找到，不顶掉装着的
if _INSTALLED:
    AutoConfig.register("minimind", MiniMindConfig, exist_ok=True)


def _register_model() -> None:
    """``AutoModelForCausalLM`` 在内存里就登记到它那里；不在，就不为登记读入它（2 s 处理器时间）。

    它总是先建配置、再按配置的类找模型，所以建配置时登记正好赶上。
    """
    if _INSTALLED and "transformers.models.auto.modeling_auto" in sys.modules:
        from .hf import MiniMindForCausalLM  # noqa: F401  登记在那个文件的末尾


# ---------------------------------------------------------------- 矩阵乘

# 小于这么多次乘加的矩阵乘，调度的开销比省下的时间多
_SMALL_MATMUL = 2**20


@functools.cache
def _onednn_is_faster() -> bool:
    """这台机器的 fp32 矩阵乘要不要改走 oneDNN：只看处理器的厂家与 torch 怎样编译的，不测速。

    x86 的 torch 默认用 MKL，它在 AMD 上不用 AVX-512。靠测速来选，忙的时候会选错，断点续训就不再逐位相同。
    """
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            return "AuthenticAMD" in info.read(4096)
    except OSError:  # 不是 Linux
        return "AuthenticAMD" in platform.processor()


def matmul_nt(x: Tensor, weight: Tensor) -> Tensor:
    """x [N, in] · weightᵀ，weight [out, in] → [N, out]，不求梯度。

    AMD 单线程，fp32，MKL → oneDNN 的毫秒：[1500, 512] 乘到 1408 维 22 → 12，[4096, 512] 乘到 512 维 22.5 → 9.9，
    [4096, 512] 乘到 6400 维 320 → 172；结果只差舍入。
    """
    eager = x.device.type == "cpu" and not torch.compiler.is_compiling()
    big = x.numel() * len(weight) >= _SMALL_MATMUL
    if eager and big and x.dtype == weight.dtype == torch.float32 and _onednn_is_faster():
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return x @ weight.t()


class _LinearCPU(torch.autograd.Function):
    """前向与两个梯度都走 matmul_nt 的线性层。"""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return matmul_nt(x, weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        need_x, need_weight = ctx.needs_input_grad
        grad_x = matmul_nt(grad, weight.t()) if need_x else None
        return grad_x, matmul_nt(grad.t(), x.t()) if need_weight else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """同 F.linear：x [..., in] → [..., out]；CPU 的 fp32 走这台机器上快的那个内核。"""
    eager = x.device.type == "cpu" and not torch.compiler.is_compiling()
    if eager and bias is None and compute_dtype(x) == torch.float32 and _onednn_is_faster():
        return _LinearCPU.apply(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], len(weight))
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """没有偏置的线性层，名字、权重、初始化都与 nn.Linear 相同。"""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out]。"""
        return linear(x, self.weight, self.bias)


# ---------------------------------------------------------------- 归一化


def compute_dtype(x: Tensor) -> torch.dtype:
    """矩阵乘将用的精度：自动混合精度开着就是它的精度，否则是 x 自己的。"""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class _RMSNormCPU(torch.autograd.Function):
    """手写反向的均方根归一化。CPU 上 [8, 512, 512] 前向加反向 4.5 ms，自动微分的同一公式 11.3 ms，F.rms_norm 23.7 ms。"""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        x32 = x.float()
        scale = (
            torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        )
        ctx.save_for_backward(x, weight, scale)
        return (x32 * scale).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, scale = ctx.saved_tensors
        normed, grad = x.float() * scale, grad.float()
        grad_normed = grad * normed
        grad_weight = grad_normed.flatten(0, -2).sum(0)
        mean = grad_normed.mul_(weight).mean(-1, keepdim=True)
        grad_x = (grad * weight).sub_(normed.mul_(mean)).mul_(scale)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None, None


class RMSNorm(nn.Module):
    """均方根归一化（Zhang & Sennrich 2019）：x / sqrt(mean(x²) + eps) · weight，内部用 fp32。

    输入输出 [..., H]。自动混合精度时直接给出半精度：后面几个线性层不必各自再转一遍。
    """

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        dtype = compute_dtype(x)
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            return _RMSNormCPU.apply(x, self.weight, self.eps, dtype)
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).to(dtype)


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


@dataclass
class AttentionPlan:
    """一次前向里各层共用的注意力安排，只算一次，层里不与主机同步。

    mode: "segments" 按 cu_seqlens（展平到 B·T 的边界）分段，段内因果，段间不可见；segments 是读出来的起止位置，
            编译时没有；
        "varlen" 同样的意思交给 CUDA 变长内核，边界在 cu_seqlens、max_seqlen；
        "sdpa" 用 mask [B 或 1, 1, T, S]（布尔，True 可见；或加性浮点），没有 mask 时按 causal，
        causal=False 即全部可见（逐词元解码）。
    """

    mode: str = "sdpa"
    segments: list[tuple[int, int]] | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int = 0
    mask: Tensor | None = None
    causal: bool = True


class _SegmentAttentionCPU(torch.autograd.Function):
    """CPU 上逐段、逐查询块的因果注意力：一块的分数留在高速缓存里，块右上方的键根本不算；反向重算概率，不存 T×T。

    CPU 的 SDPA 内核不跳过被因果遮住的部分。单线程，[N, 8, 64]、2 个键值头，前向加反向毫秒数：

        行长 × 行数，文档平均长度       本函数     逐段 SDPA   布尔 T×T      补齐成一批
        fp32   340 × 8，250             49        72         83          158
               512 × 8，300             97       149        189          396
               512 × 8，100             56        99        189          261
              1024 × 4，200             75       118        373          566
        bf16   512 × 8，300             58       153        167          363
              1024 × 4，200             54       156        296          577
        fp32   512 × 8，整行           126       192   整批一次 SDPA 181
        bf16   512 × 8，整行            72       180   整批一次 SDPA 170

    块长 64、128、256 在 fp32 下依次为 97、108、137 ms，bf16 下 58、55、62，取 64。
    """

    BLOCK = 64

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, segments: list[tuple[int, int]]) -> Tensor:
        """q [N, heads, D]，k、v [N, kv_heads, D] → [N, heads, D]。"""
        ctx.save_for_backward(q, k, v)
        ctx.segments = segments
        return _SegmentAttentionCPU.attend(q, k, v, segments)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return *_SegmentAttentionCPU.gradients(grad, *ctx.saved_tensors, ctx.segments), None

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor, segments: list[tuple[int, int]]) -> Tensor:
        out, future = torch.empty_like(q), _SegmentAttentionCPU._future()
        for start, stop in segments:
            k_seg, v_seg = k[start:stop].transpose(0, 1), v[start:stop].transpose(0, 1)  # [kv_heads, L, D]
            for rows, keys in _SegmentAttentionCPU._blocks(start, stop):
                prob = _SegmentAttentionCPU._probability(_group(q[rows], k.shape[1]), k_seg[:, :keys], future)
                out[rows] = _ungroup(prob.to(v.dtype) @ v_seg[:, :keys], rows)
        return out

    @staticmethod
    def gradients(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, segments: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        kv_heads, scale, future = k.shape[1], q.shape[2] ** -0.5, _SegmentAttentionCPU._future()
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for start, stop in segments:
            k_seg, v_seg = k[start:stop].transpose(0, 1), v[start:stop].transpose(0, 1)
            dk, dv = (torch.zeros(t.shape, dtype=t.dtype) for t in (k_seg, v_seg))
            for rows, keys in _SegmentAttentionCPU._blocks(start, stop):
                q_blk, g_blk = _group(q[rows], kv_heads), _group(grad[rows], kv_heads)
                prob = _SegmentAttentionCPU._probability(q_blk, k_seg[:, :keys], future)
                dv[:, :keys].baddbmm_(prob.to(v.dtype).transpose(1, 2), g_blk)
                d_prob = (g_blk @ v_seg[:, :keys].transpose(1, 2)).float()
                d_score = (
                    torch._softmax_backward_data(d_prob, prob, -1, torch.float32).mul_(scale).to(q.dtype)
                )
                grad_q[rows] = _ungroup(d_score @ k_seg[:, :keys], rows)
                dk[:, :keys].baddbmm_(d_score.transpose(1, 2), q_blk)
            grad_k[start:stop], grad_v[start:stop] = dk.transpose(0, 1), dv.transpose(0, 1)
        return grad_q, grad_k, grad_v

    @staticmethod
    def _blocks(start: int, stop: int):
        """依次给出（查询所在的行，它们能看到的键数）。"""
        for a in range(start, stop, _SegmentAttentionCPU.BLOCK):
            b = min(a + _SegmentAttentionCPU.BLOCK, stop)
            yield slice(a, b), b - start

    @staticmethod
    def _future() -> Tensor:
        """块对角上要加的 [BLOCK, BLOCK]：右上为 -inf，其余为 0。相加比 masked_fill_ 快三倍。"""
        return torch.full((_SegmentAttentionCPU.BLOCK,) * 2, float("-inf")).triu_(1)

    @staticmethod
    def _probability(q: Tensor, k: Tensor, future: Tensor) -> Tensor:
        """q [kv_heads, 组·n, D]（段内最后 n 个位置），k [kv_heads, keys, D] → fp32 概率 [kv_heads, 组·n, keys]。"""
        keys = k.shape[1]
        n = (keys - 1) % _SegmentAttentionCPU.BLOCK + 1
        score = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=q.shape[2] ** -0.5).float()
        score.view(len(k), -1, n, keys)[..., keys - n :].add_(future[:n, :n])
        return score.softmax(-1)


def _segments(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    return [(start, stop) for start, stop in pairwise(cu_seqlens.tolist()) if stop > start]


# 编译时的同一件事：作为一个算子整个进图，段的长短只是它的输入，不断图，也不因段数不同而重编译
@torch.library.custom_op("minimind::segment_attention", mutates_args=(), device_types="cpu")
def _segment_op(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    return _SegmentAttentionCPU.attend(q, k, v, _segments(cu_seqlens))


@torch.library.custom_op("minimind::segment_attention_backward", mutates_args=(), device_types="cpu")
def _segment_op_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _SegmentAttentionCPU.gradients(grad, q, k, v, _segments(cu_seqlens))


@_segment_op.register_fake
def _(q, k, v, cu_seqlens):
    return torch.empty_like(q)


@_segment_op_backward.register_fake
def _(grad, q, k, v, cu_seqlens):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


_segment_op.register_autograd(
    lambda ctx, grad: (*_segment_op_backward(grad, *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def _group(x: Tensor, kv_heads: int) -> Tensor:
    """[n, heads, D] → [kv_heads, 组·n, D]：共用一个键值头的查询头并到行里，矩阵乘更大。"""
    n, heads, dim = x.shape
    return x.view(n, kv_heads, heads // kv_heads, dim).permute(1, 2, 0, 3).reshape(kv_heads, -1, dim)


def _ungroup(x: Tensor, rows: slice) -> Tensor:
    """`_group` 的逆：[kv_heads, 组·n, D] → [n, heads, D]。"""
    kv_heads, _, dim = x.shape
    return x.view(kv_heads, -1, rows.stop - rows.start, dim).permute(2, 0, 1, 3).flatten(1, 2)


def segment_attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, dropout: float = 0.0) -> Tensor:
    """注意力不出段：q [N, heads, D]，k、v [N, kv_heads, D] → [N, heads, D]。"""
    if q.device.type != "cpu" or dropout:
        return _segment_by_segment(q, k, v, plan, dropout)
    if torch.compiler.is_compiling():
        return _segment_op(q, k, v, plan.cu_seqlens)
    return _SegmentAttentionCPU.apply(q, k, v, plan.segments)


# 段的长短批批不同，编译它只会反复重编译。公开的 torch.compiler.disable 在这里就要读入编译器，约 1 s 处理器时间；
# torch 自己用的这个到第一次调用才读
@torch._disable_dynamo
def _segment_by_segment(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, dropout: float) -> Tensor:
    """同 `segment_attention`，逐段一次 SDPA：CPU 上有 dropout 时，以及 NPU、MPS。"""
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
    segments = _segments(plan.cu_seqlens) if plan.segments is None else plan.segments
    pieces = ((q[:, :, s:e], k[:, :, s:e], v[:, :, s:e]) for s, e in segments)
    out = torch.cat([attention(*piece, mask=None, causal=True, dropout=dropout) for piece in pieces], dim=2)
    return out.squeeze(0).transpose(0, 1)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """同 `segment_attention`，用 CUDA 的变长 flash 内核，不需要知道段数。"""
    options: dict[str, Any] = (
        {"window_size": (-1, 0)} if "window_size" in _VARLEN_OPTIONS else {"is_causal": True}
    )
    if "enable_gqa" in _VARLEN_OPTIONS:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    else:
        k, v = _expand_heads(k, q), _expand_heads(v, q)
    return varlen_attn(q, k, v, plan.cu_seqlens, plan.cu_seqlens, plan.max_seqlen, plan.max_seqlen, **options)


def varlen_available(x: Tensor) -> bool:
    """变长 flash 内核能不能用：CUDA、算力 8.0 以上、半精度。"""
    if varlen_attn is None or not x.is_cuda or compute_dtype(x) == torch.float32:
        return False
    return torch.cuda.get_device_capability(x.device) >= (8, 0)


def _expand_heads(x: Tensor, q: Tensor) -> Tensor:
    """键值头（第 1 维）逐个重复到与查询头一样多：[…, kv_heads, …] → […, heads, …]。"""
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout: float = 0.0
) -> Tensor:
    """SDPA：q [B, heads, T, D]，k、v [B, kv_heads, S, D] → [B, heads, T, D]。"""
    gqa = q.shape[1] != k.shape[1]
    if gqa and q.device.type != "cpu" and (mask is not None or q.dtype == torch.float32 or not q.is_cuda):
        # CUDA 上只有半精度、无 mask 的 flash 内核直接吃 GQA，否则退回全量 softmax，不如先展开头；NPU、MPS 同样展开
        k, v, gqa = _expand_heads(k, q), _expand_heads(v, q), False
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal and mask is None, enable_gqa=gqa
    )


def plain_attention(q, k, v, mask: Tensor | None, causal: bool, dropout: float = 0.0) -> Tensor:
    """同 `attention`，公式写明白：softmax(q·kᵀ/√D + mask)·v。`flash_attn=False` 时用，供对照与教学。"""
    k, v = _expand_heads(k, q), _expand_heads(v, q)
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
        width, kv_width = (
            n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads)
        )
        self.q_proj = Linear(config.hidden_size, width, bias=False)
        self.k_proj = Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = Linear(width, config.hidden_size, bias=False)
        self.o_proj.writes_residual = True
        self.q_norm = self.k_norm = None
        if config.arch == "v3":
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], plan: AttentionPlan, cache: Any = None
    ) -> Tensor:
        """x [B, T, H] → [B, T, H]。"""
        B, T, _ = x.shape
        q, k, v = (proj(x).view(B, T, -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        dropout = self.dropout if self.training else 0.0
        if plan.mode == "segments":
            out = segment_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), plan, dropout)
        elif plan.mode == "varlen":
            out = varlen_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), plan)
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


class _Dispatch(torch.autograd.Function):
    """按专家排好序取词元：x [N, H] → [N·K, H]。反向是收集再求和，不用原子加，结果可重复。"""

    @staticmethod
    def forward(ctx, x, order, inverse, k):
        ctx.save_for_backward(inverse)
        ctx.k = k
        return x.index_select(0, order // k)

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse).view(-1, ctx.k, grad.shape[-1]).sum(1), None, None, None


class _Unsort(torch.autograd.Function):
    """把按专家排序的结果放回原来的次序：[N·K, H] → [N·K, H]。"""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(order)
        return x.index_select(0, inverse)

    @staticmethod
    def backward(ctx, grad):
        (order,) = ctx.saved_tensors
        return grad.index_select(0, order), None, None


def refuse_wrapped(what: str, layer: nn.Module) -> None:
    """直接取 weight 来算的层（输出头、路由器）上包了 LoRA 之类的增量，增量就不起作用，所以拒绝。

    Raises:
        TypeError: ``layer`` 是包装，原来的层在它里面。
    """
    if any(True for _ in layer.children()):
        raise TypeError(
            f"{what} 被换成了 {type(layer).__name__}，这里直接用它的权重，换上的不起作用；"
            "请不要在它上面加 LoRA 或别的包装"
        )


class MoE(nn.Module):
    """混合专家前馈：softmax 门控，取前 K 个专家，外加总是参与的共享专家。

    负载均衡损失（Switch Transformer 式 4；DeepSeek-V2 的按序列版本）：alpha · E · Σ_e f_e·P_e，
    f_e 是专家 e 分到的份额（除以 K，不随 top-k 变大），P_e 是平均门控概率。
    """

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        width = config.moe_intermediate_size
        self.num_experts, self.top_k = config.n_routed_experts, config.num_experts_per_tok
        self.norm_topk, self.alpha, self.seq_aux = (
            config.norm_topk_prob,
            config.aux_loss_alpha,
            config.seq_aux,
        )
        self.norm_single = config.arch == "v3"
        self.gate = Linear(config.hidden_size, self.num_experts, bias=False)
        self.experts = nn.ModuleList(MLP(config.hidden_size, width) for _ in range(self.num_experts))
        if config.n_shared_experts:
            self.shared_experts = nn.ModuleList(
                MLP(config.hidden_size, width) for _ in range(config.n_shared_experts)
            )
        else:
            self.shared_experts = None
        self.last_load: Tensor | None = None

    def forward(self, x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [B, T, H]，valid [B, T]（True 为真词元，None 表示全是）→ 输出 [B, T, H] 与辅助损失标量。"""
        B, T, H = x.shape
        flat = x.reshape(-1, H)
        refuse_wrapped("路由器 gate", self.gate)
        with torch.autocast(x.device.type, enabled=False):  # 路由差一点就换专家，用 fp32
            score = linear(flat.float(), self.gate.weight.float()).softmax(-1)
        weight, expert = score.topk(self.top_k, dim=-1, sorted=False)
        if self.norm_topk and (self.top_k > 1 or self.norm_single):
            weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)

        order = expert.flatten().argsort(stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        chosen = torch.zeros_like(score).scatter_(1, expert, 1.0)  # [N, E]，选中为 1
        count = chosen.sum(0).long()  # [E]
        y = self._experts(_Dispatch.apply(flat, order, inverse, self.top_k), count)
        y = _Unsort.apply(y, order, inverse).view(-1, self.top_k, H)
        y = (y * weight.unsqueeze(-1).to(y.dtype)).sum(1)
        for expert_mlp in self.shared_experts or ():
            y = y + expert_mlp(flat)
        return y.view(B, T, H), self._balance_loss(score, chosen, valid, B, T)

    def _experts(self, x: Tensor, count: Tensor) -> Tensor:
        """x [N·K, H] 已按专家排序，count [E] → [N·K, H]。没有词元的专家得到零梯度而不是 None，DDP 才不会等它。"""
        dtype = compute_dtype(x)
        aligned = (
            x.shape[-1] % 8 == 0 and self.experts[0].gate_proj.out_features % 8 == 0
        )  # 内核要求 16 字节对齐
        # 分组乘法直接取 weight；专家的层被换过（加了 LoRA）时要走它们自己的 forward
        plain = all(type(layer) is Linear for layer in self.experts[0].children()) and aligned
        if x.is_cuda and dtype == torch.bfloat16 and plain and hasattr(F, "grouped_mm"):  # torch>=2.10
            return self._experts_grouped(x.to(dtype), count)
        parts = x.split(count.tolist())
        return torch.cat([expert(part) for expert, part in zip(self.experts, parts)])

    def _experts_grouped(self, x: Tensor, count: Tensor) -> Tensor:
        """三次分组矩阵乘代替逐专家循环，不同步主机。"""
        ends = count.cumsum(0).to(torch.int32)

        def stacked(name: str) -> Tensor:  # [E, 入, 出]
            return torch.stack([getattr(e, name).weight.to(x.dtype) for e in self.experts]).transpose(1, 2)

        with torch.autocast(x.device.type, enabled=False):
            gate = F.grouped_mm(x, stacked("gate_proj"), offs=ends)
            up = F.grouped_mm(x, stacked("up_proj"), offs=ends)
            return F.grouped_mm(F.silu(gate) * up, stacked("down_proj"), offs=ends)

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
        y, aux = self.post_attention_layernorm(x), None
        if isinstance(self.mlp, MoE):
            y, aux = self.mlp(y, valid)
        else:
            y = self.mlp(y)
        return x + self._drop(y), aux


class MiniMindModel(nn.Module):
    """词嵌入、若干层、末尾归一化。"""

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._frequencies: Tensor | None = None
        self.gradient_checkpointing = False  # 反向时重算各层

    def forward(
        self, input_ids, attention_mask=None, position_ids=None, cache=None, cu_seqlens=None, max_seqlen=None,
        inputs_embeds=None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """input_ids [B, T] → 末层隐藏状态 [B, T, H] 与辅助损失标量（各层之和）。"""
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        B, T, _ = x.shape
        past = cache.get_seq_length() if cache is not None else 0
        if past + T > self.config.max_position_embeddings:
            self._check_length(past, T, position_ids, cu_seqlens, max_seqlen)
        if position_ids is None:
            position_ids = torch.arange(past, past + T, device=x.device).unsqueeze(0)
        rope = self._rope(position_ids)
        plan = self._plan(B, T, past, attention_mask, cu_seqlens, max_seqlen, x, cache is not None)
        valid = None  # 哪些是真词元：补齐的位置不计入专家的负载均衡
        if self.config.use_moe:
            if attention_mask is not None and attention_mask.dim() == 2:
                valid = attention_mask[:, -T:].bool()
            elif cu_seqlens is not None and input_ids is not None:
                # 打包行的尾巴没有 mask，靠补齐用的词元认出来
                valid = input_ids != self.config.pad_token_id
        if self.config.dropout and self.training:
            x = F.dropout(x, self.config.dropout)
        aux_total = None
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                x, aux = checkpoint(layer, x, rope, plan, valid, cache, use_reentrant=False)
            else:
                x, aux = layer(x, rope, plan, valid, cache)
            if aux is not None:
                aux_total = aux if aux_total is None else aux_total + aux
        if aux_total is None:
            aux_total = torch.zeros((), device=x.device)
        return self.norm(x), aux_total

    def _check_length(self, past, T, position_ids, cu_seqlens, max_seqlen) -> None:
        """一行比位置上限还长：几篇拼成的看最长的一篇，每篇的位置从 0 起；不与显卡同步。

        Raises:
            ValueError: 有一篇超过 max_position_embeddings。
        """
        limit, longest = self.config.max_position_embeddings, past + T
        if cu_seqlens is not None:
            if max_seqlen is None and (cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling()):
                return  # 不问显卡就不知道；打包的数据装进来之前查过每篇的长度
            longest = int(cu_seqlens.diff().max()) if max_seqlen is None else max_seqlen
        elif position_ids is not None and not past:
            if position_ids.device.type != "cpu" or torch.compiler.is_compiling():
                return
            longest = int(position_ids.max()) + 1
        if longest > limit:
            what = f"已有 {past} 个词元，又来 {T} 个" if past else f"{longest} 个词元"
            raise ValueError(
                f"上下文太长：{what}，超过 max_position_embeddings={limit}。"
                "请截短输入，或调大这个配置（配合 inference_rope_scaling）"
            )

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

    def _plan(self, B, T, past, attention_mask, cu_seqlens, max_seqlen, x, cached) -> AttentionPlan:
        """选一种注意力安排，见 AttentionPlan。x 只用来看设备与精度。"""
        S, device = past + T, x.device
        flash, dropout = self.config.flash_attn, self.config.dropout and self.training
        compiling = torch.compiler.is_compiling()
        if cu_seqlens is not None:
            if attention_mask is not None or cached:
                raise ValueError("cu_seqlens（打包）不能与 attention_mask 或缓存同用：补齐处请作为单独的一段")
            if flash and not dropout and varlen_available(x):
                if max_seqlen is None or compiling:
                    max_seqlen = T  # 编译时用行长这个上界，免得每批的最长文档都触发重编译
                return AttentionPlan("varlen", cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
            if flash and device.type != "cuda":
                segments = None if compiling else _segments(cu_seqlens)
                return AttentionPlan("segments", segments, cu_seqlens)
            document = torch.bucketize(torch.arange(B * T, device=device), cu_seqlens[1:], right=True).view(
                B, T
            )
            return AttentionPlan(mask=(document.unsqueeze(2) == document.unsqueeze(1)).tril().unsqueeze(1))
        if attention_mask is not None and attention_mask.dim() == 4:
            return AttentionPlan(mask=attention_mask)
        if attention_mask is not None and attention_mask.shape != (B, S):
            raise ValueError(
                f"attention_mask 应为 [B, 缓存+本次] = {(B, S)}，得到 {tuple(attention_mask.shape)}"
            )
        # 整次前向只问一次“有没有补齐”，没有就不建 T×S 的表；编译时不问，免得断图，
        # 显卡逐词元解码时也不问，免得每步同步
        ask = not compiling and (T > 1 or device.type == "cpu")
        if attention_mask is not None and ask and bool(attention_mask.all()):
            attention_mask = None
        if attention_mask is None and (T == 1 or past == 0):
            # 128 以下分块没有好处，一次 SDPA 更省调度
            if device.type == "cpu" and T >= 128 and flash and not cached and not compiling:
                segments = [(i, i + T) for i in range(0, B * T, T)]
                return AttentionPlan("segments", segments, torch.arange(0, B * T + 1, T))
            return AttentionPlan(causal=T > 1)
        query = torch.arange(past, S, device=device).unsqueeze(1)
        key = torch.arange(S, device=device).unsqueeze(0)
        mask = (key <= query).unsqueeze(0)
        if attention_mask is not None:
            # 补齐位置的查询看不到任何键，softmax 会得 NaN；让它看自己，输出反正不用
            mask = (mask & attention_mask.bool().unsqueeze(1)) | (key == query)
        return AttentionPlan(mask=mask.unsqueeze(1))


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
            raise RuntimeError(
                f"词嵌入与输出头{found}，而 tie_word_embeddings={self.config.tie_word_embeddings}；"
                "请检查 transformers 的版本与改动模型的代码"
            )

    def check_same(self, embedding: Tensor, head: Tensor) -> None:
        """
        Raises:
            ValueError: 要绑定的两份权重不相等：绑上就丢掉一份，不绑就是另一个模型。
        """
        if embedding is head or embedding.is_meta or head.is_meta:
            return
        if embedding.shape != head.shape or not torch.equal(embedding, head.to(embedding)):
            raise ValueError(
                f"权重里 {EMBEDDING} {tuple(embedding.shape)} 与 {HEAD} {tuple(head.shape)} 不相等，而 tie_word_embeddings=True；"
                "这份权重没有共享词嵌入，请用 tie_word_embeddings=False 的配置读它"
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

    # fmt: off
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        loss_weights: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        logits_to_keep: int | Tensor = 0,
        return_logits: bool | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> MiniMindOutput:
        # fmt: on
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
        hidden, aux_loss = self.model(
            input_ids, attention_mask, position_ids, past_key_values, cu_seqlens, max_seqlen, inputs_embeds
        )
        if return_logits is None:
            return_logits = labels is None or not self.training
        logits = loss = loss_sum = target_count = None
        if return_logits:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            if isinstance(keep, Tensor) and keep.dtype == torch.bool:
                kept = hidden[keep]
            else:
                kept = hidden if isinstance(keep, slice) and not logits_to_keep else hidden[:, keep]
            logits = self.lm_head(kept)
        if labels is not None:
            target = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
            weight = (target != IGNORE_INDEX).float()
            if loss_weights is not None:
                weight = weight * F.pad(loss_weights[:, 1:], (0, 1)).flatten()
            refuse_wrapped("输出头 lm_head", self.lm_head)
            loss_sum = linear_cross_entropy(hidden.flatten(0, 1), self.lm_head.weight, target, weight)
            target_count = weight.sum()
            loss = loss_sum / target_count.where(target_count > 0, 1.0)
        return MiniMindOutput(loss, loss_sum, target_count, aux_loss, logits, past_key_values, hidden)

    def moe_load(self) -> list[Tensor] | None:
        """上一次前向里每层各专家分到的词元份额 [E]（和为 1）；稠密模型返回 None。"""
        if not self.config.use_moe:
            return None
        return [layer.mlp.last_load for layer in self.model.layers]


def _tie_again(model: MiniMindLM, incompatible_keys: Any) -> None:
    """``load_state_dict(assign=True)`` 把两个键各换成一个新参数，换完再绑上。"""
    plain = isinstance(model.model.embed_tokens, nn.Embedding) and isinstance(model.lm_head, nn.Linear)
    if plain and model.config.tie_word_embeddings:
        model.tie()


# ---------------------------------------------------------------- 分块交叉熵


class _LinearCrossEntropy(torch.autograd.Function):
    """一块一块地算 logits、损失与两个梯度，整块 [N, V] 的 fp32 logits 从不存在。"""

    @staticmethod
    def forward(ctx, hidden, weight, target, loss_weight, chunk, need_grad):
        dtype = compute_dtype(hidden)
        need_weight = need_grad and ctx.needs_input_grad[1]  # 输出头冻结（LoRA）时省一次矩阵乘
        with torch.autocast(hidden.device.type, enabled=False):
            w = weight.to(dtype)
            grad_hidden = torch.empty_like(hidden) if need_grad else None
            grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
            total = torch.zeros((), dtype=torch.float32, device=hidden.device)
            for start in range(0, hidden.shape[0], chunk):
                rows = slice(start, start + chunk)
                h, t, lw = hidden[rows].to(dtype), target[rows, None].clamp_min(0), loss_weight[rows, None]
                logp = F.log_softmax(matmul_nt(h, w).float(), dim=-1)
                # 不就地累加：torch 2.11 的编译把就地改过的返回值当成常数，全部梯度成了 0，一声不响
                total = total - (logp.gather(1, t) * lw).sum()
                if need_grad:
                    grad = logp.exp_().scatter_add_(1, t, torch.full_like(lw, -1.0)).mul_(lw).to(dtype)
                    grad_hidden[rows] = matmul_nt(grad, w.t())
                if need_weight:
                    grad_weight += matmul_nt(grad.t(), h.t())
        if need_grad:
            ctx.save_for_backward(grad_hidden, grad_weight)
            ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad_out):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_out).to(ctx.weight_dtype)
        return grad_hidden * grad_out, grad_weight, None, None, None, None


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, loss_weight: Tensor, chunk: int | None = None
) -> Tensor:
    """Σ loss_weight · CE(hidden @ weightᵀ, target)，标量 fp32。

    hidden [N, H]，weight [V, H]，target [N]（负数处权重应为 0），loss_weight [N]。

    CPU 一块 512 行最快：N=4096、V=6400、单线程，块长 128、256、512、1024、4096 依次 984、916、907、886、931 ms，
    bf16 下 311、272、266、301、388 ms；不分块的 F.cross_entropy 是 1033 与 467 ms。
    """
    if chunk is None:
        chunk = 512 if hidden.device.type == "cpu" else max(1024, 2**25 // weight.shape[0])
    if hidden.device.type == "cpu" and not torch.compiler.is_compiling():
        keep = loss_weight.nonzero().squeeze(1)  # 不是目标的位置不必算输出头；显卡上这一问要同步，不划算
        if len(keep) < 0.9 * len(target):
            hidden, target, loss_weight = hidden[keep], target[keep], loss_weight[keep]
    # 反向要的梯度在前向里顺手算好；自定义函数内部看不到外面的 no_grad，所以在这里问
    need_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(hidden, weight, target, loss_weight, chunk, need_grad)


def __getattr__(name: str) -> Any:
    """``MiniMindForCausalLM`` 用到时才读 hf.py：它的基类连带一千多个模块，只看帮助、只做推理的不必等。"""
    if name == "MiniMindForCausalLM":
        from .hf import MiniMindForCausalLM

        return MiniMindForCausalLM
    raise AttributeError(f"{__name__} 里没有 {name}")
