"""模型里快的那些写法：矩阵乘的内核、归一化的反向、注意力的安排、专家的分发、分块交叉熵。

每一样都有一个名字说明它算什么，慢而直白的写法与它只差舍入；读懂模型只看旁边的 model_minimind.py 就够。CPU 上的注意力
较长，在 cpu_attention.py；torch 的私有算子只出现在这两个文件里。随导出的目录走，所以只用 torch。

形状记号同 model_minimind.py：N = B·T，D 每个头的维数，V 词表，E 专家数，K 每个词元选中的专家数。
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import platform
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cpu_attention import SegmentAttention, segment_op, segments_of

varlen_attn, _VARLEN_OPTIONS = None, {}
if torch.cuda.is_available():  # 没有显卡用不上，而它连带编译器，读入要 1 s 处理器时间
    with contextlib.suppress(ImportError):  # torch>=2.10 才有公开的变长注意力；它的参数在 2.12 前后换过名字
        from torch.nn.attention.varlen import varlen_attn

        _VARLEN_OPTIONS = inspect.signature(varlen_attn).parameters

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


def refuse_wrapped(what: str, layer: nn.Module) -> None:
    """直接取 weight 来算的层（输出头、路由器）上包了 LoRA 之类的增量，增量就不起作用，所以拒绝。

    Raises:
        TypeError: ``layer`` 是包装，原来的层在它里面。
    """
    if any(True for _ in layer.children()):
        why = "这里直接用它的权重，换上的不起作用；请不要在它上面加 LoRA 或别的包装"
        raise TypeError(f"{what} 被换成了 {type(layer).__name__}，{why}")


# ---------------------------------------------------------------- 归一化


def compute_dtype(x: Tensor) -> torch.dtype:
    """矩阵乘将用的精度：自动混合精度开着就是它的精度，否则是 x 自己的。"""
    device = x.device.type
    mixed = not x.is_meta and torch.is_autocast_enabled(device)  # meta 上没有自动混合精度，问它是错误
    return torch.get_autocast_dtype(device) if mixed else x.dtype


def autocast_off(x: Tensor) -> contextlib.AbstractContextManager:
    """里面照张量自己的精度算。"""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


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


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight，内部用 fp32：x [..., H] → [..., H]，精度是接下来的矩阵乘要的。"""
    dtype = compute_dtype(x)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return _RMSNormCPU.apply(x, weight, eps, dtype)
    return F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).to(dtype)


# ---------------------------------------------------------------- 注意力


@dataclass
class AttentionPlan:
    """一次前向里各层共用的注意力安排，只算一次，层里不与主机同步。

    mode: "segments"（CPU）按 cu_seqlens（展平到 B·T 的边界）分段，段内因果，段间不可见；segments 是读出来的起止位置，
            编译时没有；
        "varlen" 同样的意思交给 CUDA 变长内核，边界在 cu_seqlens、max_seqlen；
        "buckets" 同样的意思，没有变长内核的地方：长度相近的段补齐成批，见 Buckets；编译时没有 buckets；
        "sdpa" 用 mask [B 或 1, 1, T, S]（布尔，True 可见；或加性浮点），没有 mask 时按 causal，
        causal=False 即全部可见（逐词元解码）。
    """

    mode: str = "sdpa"
    segments: list[tuple[int, int]] | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int = 0
    buckets: Buckets | None = None
    mask: Tensor | None = None
    causal: bool = True


def segment_attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """CPU 上注意力不出段，见 cpu_attention.py：q [N, heads, D]，k、v [N, kv_heads, D] → [N, heads, D]。"""
    if torch.compiler.is_compiling():
        return segment_op(q, k, v, plan.cu_seqlens)
    return SegmentAttention.apply(q, k, v, plan.segments)


@dataclass
class Buckets:
    """长度相近的段补齐成批的排法：不建整行的 T×T，也不逐段调用；补在末尾，因果注意力里真词元看不到它们。

    shapes: 各批的（段数 n，长度 L）。
    take: [Σ n·L]，依次排下各批要取的行；补的位置重复取段的最后一行。
    place: [N]，每一行的结果在 take 里的位置。
    """

    SHORTEST = 32  # 不足的并进同一批：再分细，调用的次数多过省下的计算
    SCORES = 2**23  # 一批至多 n·L² 这么多：没有融合内核的设备会把分数整块存下来

    shapes: list[tuple[int, int]]
    take: Tensor
    place: Tensor

    @classmethod
    def of(cls, segments: list[tuple[int, int]], device: torch.device) -> Buckets:
        """在主机上排好，一次送到 ``device``：不必从卡上读任何东西。"""
        similar: dict[int, list[tuple[int, int]]] = {}
        for start, stop in segments:
            power = (
                1 << (max(stop - start, cls.SHORTEST) - 1).bit_length()
            )  # 不小于它的 2 的幂，或它的四分之三
            fits = 3 * power // 4 if stop - start <= 3 * power // 4 else power
            similar.setdefault(fits, []).append((start, stop))
        shapes, take, at = [], [], 0
        place = torch.empty(segments[-1][1], dtype=torch.int64)
        for fits, members in sorted(similar.items()):
            most = max(1, cls.SCORES // fits**2)
            for batch in (members[i : i + most] for i in range(0, len(members), most)):
                length = max(stop - start for start, stop in batch)
                for start, stop in batch:
                    take.append(torch.arange(start, start + length).clamp_(max=stop - 1))
                    place[start:stop] = torch.arange(at, at + stop - start)
                    at += length
                shapes.append((len(batch), length))
        both = torch.cat((*take, place)).to(device, non_blocking=True)
        return cls(shapes, both[:at], both[at:])


# 段的长短批批不同，编译它只会反复重编译。公开的 torch.compiler.disable 在这里就要读入编译器，约 1 s 处理器时间；
# torch 自己用的这个到第一次调用才读
@torch._disable_dynamo
def bucket_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, dropout: float = 0.0, attend: Any = None
) -> Tensor:
    """同 `segment_attention`，按 :class:`Buckets` 一批一批地算；``attend`` 是每批用的注意力，默认 `attention`。"""
    buckets = plan.buckets or Buckets.of(segments_of(plan.cu_seqlens), q.device)
    # 补的位置梯度恰为 0，所以反向只取真词元那一份
    q, k, v = (_Rearrange.apply(t, buckets.take, buckets.place, 1) for t in (q, k, v))
    sizes = [n * length for n, length in buckets.shapes]
    outs = []
    for shape, *pieces in zip(buckets.shapes, *(t.split(sizes) for t in (q, k, v))):
        batch = (t.unflatten(0, shape).transpose(1, 2) for t in pieces)  # [n, heads, L, D]
        outs.append((attend or attention)(*batch, None, True, dropout).transpose(1, 2).flatten(0, 1))
    return torch.cat(outs).index_select(0, buckets.place)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """同 `segment_attention`，用 CUDA 的变长 flash 内核，不需要知道段数。"""
    options: dict[str, Any] = (
        {"window_size": (-1, 0)} if "window_size" in _VARLEN_OPTIONS else {"is_causal": True}
    )
    if "enable_gqa" in _VARLEN_OPTIONS:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    else:
        k, v = expand_heads(k, q), expand_heads(v, q)
    return varlen_attn(q, k, v, plan.cu_seqlens, plan.cu_seqlens, plan.max_seqlen, plan.max_seqlen, **options)


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, dropout: float = 0.0, attend: Any = None
) -> Tensor:
    """打包的行上的注意力，按 ``plan.mode`` 走：q [N, heads, D]，k、v [N, kv_heads, D] → [N, heads, D]。

    dropout、attend 只有 "buckets" 认，有这两样时安排的就是它。
    """
    if plan.mode == "buckets":
        return bucket_attention(q, k, v, plan, dropout, attend)
    return (varlen_attention if plan.mode == "varlen" else segment_attention)(q, k, v, plan)


def has_flash(device: torch.device) -> bool:
    """CUDA，算力 8.0 以上：flash 内核要这一代的卡。"""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def varlen_available(x: Tensor) -> bool:
    """变长 flash 内核能不能用：CUDA、算力 8.0 以上、半精度、torch>=2.10。"""
    half = compute_dtype(x) != torch.float32
    return varlen_attn is not None and half and has_flash(x.device)


def segments_available(x: Tensor) -> bool:
    """分块的 CPU 注意力能不能用。"""
    return x.device.type == "cpu"


def keep_lengths_on_host(device: torch.device, dtype: torch.dtype | None = None) -> bool:
    """批搬到 ``device`` 上时段界要不要留在主机：没有变长内核的设备（NPU、MPS、旧卡）上，安排由主机来做；内核只认半精度，
    所以用 fp32 算的（``dtype``，不知道为 None）也一样。"""
    fits = varlen_attn is not None and has_flash(device) and dtype != torch.float32
    return device.type != "cpu" and not fits


def expand_heads(x: Tensor, q: Tensor) -> Tensor:
    """键值头（第 1 维）逐个重复到与查询头一样多：[…, kv_heads, …] → […, heads, …]。"""
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout: float = 0.0
) -> Tensor:
    """SDPA：q [B, heads, T, D]，k、v [B, kv_heads, S, D] → [B, heads, T, D]。"""
    gqa = q.shape[1] != k.shape[1]
    if (
        gqa
        and q.device.type != "cpu"
        and (mask is not None or q.dtype == torch.float32 or not has_flash(q.device))
    ):
        # 只有半精度、无 mask 的 flash 内核直接吃 GQA，否则退回全量 softmax，不如先展开头；旧卡、NPU、MPS 同样展开
        k, v, gqa = expand_heads(k, q), expand_heads(v, q), False
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal and mask is None, enable_gqa=gqa
    )


def plan_attention(
    x: Tensor,
    past: int,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    cached: bool = False,
    flash: bool = True,
    dropout: bool = False,
) -> AttentionPlan:
    """选一种注意力安排，见 :class:`AttentionPlan`。

    Args:
        x: [B, T, H]，看形状、设备与精度。
        past: 缓存里已有几个。
        attention_mask, cu_seqlens, max_seqlen: 见模型的前向。
        cached: 有没有缓存；flash: 假表示用写明白的 softmax；dropout: 这次有没有丢弃。

    Raises:
        ValueError: 打包与 mask 或缓存同用，或 mask 的形状不对。
    """
    (B, T, _), device = x.shape, x.device
    S, compiling = past + T, torch.compiler.is_compiling()
    if cu_seqlens is not None:
        if attention_mask is not None or cached:
            raise ValueError("cu_seqlens（打包）不能与 attention_mask 或缓存同用：补齐处请作为单独的一段")
        if flash and not dropout and varlen_available(x):
            if max_seqlen is None or compiling:
                max_seqlen = T  # 编译时用行长这个上界，免得每批的最长文档都触发重编译
            edges = cu_seqlens.to(device, non_blocking=True)
            return AttentionPlan("varlen", cu_seqlens=edges, max_seqlen=max_seqlen)
        segments = None if compiling else segments_of(cu_seqlens)
        if segments and segments[-1][1] != B * T:
            raise ValueError(f"cu_seqlens 的末尾应是 B·T = {B * T}，得到 {segments[-1][1]}")
        if flash and not dropout and segments_available(x):
            return AttentionPlan("segments", segments, cu_seqlens)
        buckets = Buckets.of(segments, device) if segments else None
        return AttentionPlan("buckets", cu_seqlens=cu_seqlens, buckets=buckets)
    if attention_mask is not None and attention_mask.dim() == 4:
        return AttentionPlan(mask=attention_mask)
    if attention_mask is not None and attention_mask.shape != (B, S):
        raise ValueError(f"attention_mask 应为 [B, 缓存+本次] = {(B, S)}，得到 {tuple(attention_mask.shape)}")
    # 整次前向只问一次“有没有补齐”，没有就不建 T×S 的表；编译时不问，免得断图，
    # 显卡逐词元解码时也不问，免得每步同步
    ask = not compiling and (T > 1 or device.type == "cpu")
    if attention_mask is not None and ask and bool(attention_mask.all()):
        attention_mask = None
    if attention_mask is None and (T == 1 or past == 0):
        # 128 以下分块没有好处，一次 SDPA 更省调度
        if segments_available(x) and T >= 128 and flash and not dropout and not cached and not compiling:
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


# ---------------------------------------------------------------- 混合专家


class _Rearrange(torch.autograd.Function):
    """按 take 取行，反向按 back 收回再把同一行的 copies 份相加：不用原子加，结果可重复。"""

    @staticmethod
    def forward(ctx, x: Tensor, take: Tensor, back: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.copies = copies
        return x.index_select(0, take)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad = grad.index_select(0, *ctx.saved_tensors)
        if ctx.copies > 1:
            grad = grad.view(-1, ctx.copies, grad.shape[-1]).sum(1)
        return grad, None, None, None


class ExpertOrder:
    """词元按专家排好的次序。

    Args:
        expert: [N, K]，每个词元选中的专家。
    """

    def __init__(self, expert: Tensor):
        self.top_k = expert.shape[1]
        self.order = expert.flatten().argsort(stable=True)
        places = torch.arange(len(self.order), device=expert.device)
        self.inverse = torch.empty_like(self.order).scatter_(0, self.order, places)

    def dispatch(self, x: Tensor) -> Tensor:
        """x [N, H] → [N·K, H]，同一个专家的挨着。"""
        return _Rearrange.apply(x, self.order // self.top_k, self.inverse, self.top_k)

    def restore(self, y: Tensor) -> Tensor:
        """按专家排的 [N·K, H] → [N, K, H]。"""
        return _Rearrange.apply(y, self.inverse, self.order, 1).view(-1, self.top_k, y.shape[-1])


def grouped_mm_available(x: Tensor, width: int) -> bool:
    """分组矩阵乘能不能用：CUDA、bf16，两边的宽度都是 8 的倍数（内核要求 16 字节对齐），torch>=2.10。"""
    aligned = x.shape[-1] % 8 == 0 and width % 8 == 0
    return x.is_cuda and compute_dtype(x) == torch.bfloat16 and aligned and hasattr(F, "grouped_mm")


def grouped_swiglu(experts: nn.ModuleList, x: Tensor, count: Tensor) -> Tensor:
    """三次分组矩阵乘代替逐专家循环，不同步主机：x [N·K, H] 已按专家排序，count [E] → [N·K, H]。"""
    x, ends = x.to(compute_dtype(x)), count.cumsum(0).to(torch.int32)

    def stacked(name: str) -> Tensor:  # [E, 入, 出]
        return torch.stack([getattr(e, name).weight.to(x.dtype) for e in experts]).transpose(1, 2)

    with autocast_off(x):
        gate = F.grouped_mm(x, stacked("gate_proj"), offs=ends)
        up = F.grouped_mm(x, stacked("up_proj"), offs=ends)
        return F.grouped_mm(F.silu(gate) * up, stacked("down_proj"), offs=ends)


# ---------------------------------------------------------------- 分块交叉熵


def chunk_loss(
    logits: Tensor, target: Tensor, weight: Tensor, need_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """一块的损失之和，与它对 logits 的梯度（精度同 logits）：logits [n, V]，target、weight [n, 1]。"""
    dtype, logits = logits.dtype, logits.float()
    top, prob = logits.amax(-1, keepdim=True), logits.softmax(-1)
    # 最大的概率是 1/Σexp(x − 最大)，不会下溢：log_softmax 再 exp 要算两遍指数，[512, 6400] 5.9 对 3.5 毫秒
    logp = logits.gather(1, target) - top + prob.amax(-1, keepdim=True).log()
    loss = (logp * weight).sum().neg()
    return loss, prob.mul_(weight).scatter_add_(1, target, -weight).to(dtype) if need_grad else None


class _LinearCrossEntropy(torch.autograd.Function):
    """一块一块地算 logits、损失与两个梯度，整块 [N, V] 的 fp32 logits 从不存在。"""

    @staticmethod
    def forward(ctx, hidden, weight, target, loss_weight, chunk, need_grad, chunk_loss):
        dtype = compute_dtype(hidden)
        need_weight = need_grad and ctx.needs_input_grad[1]  # 输出头冻结（LoRA）时省一次矩阵乘
        with autocast_off(hidden):
            w = weight.to(dtype)
            grad_hidden = torch.empty_like(hidden) if need_grad else None
            grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
            total = torch.zeros((), dtype=torch.float32, device=hidden.device)
            for start in range(0, hidden.shape[0], chunk):
                rows = slice(start, start + chunk)
                h, t, lw = hidden[rows].to(dtype), target[rows, None].clamp_min(0), loss_weight[rows, None]
                loss, grad = chunk_loss(matmul_nt(h, w), t, lw, need_grad)
                # 不就地累加：torch 2.11 的编译把就地改过的返回值当成常数，全部梯度成了 0，一声不响
                total = total + loss
                if need_grad:
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
        return grad_hidden * grad_out, grad_weight, None, None, None, None, None


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, loss_weight: Tensor, chunk: int | None = None,
    chunk_loss: Any = chunk_loss,
) -> Tensor:  # fmt: skip
    """Σ loss_weight · CE(hidden @ weightᵀ, target)，标量 fp32。

    hidden [N, H]，weight [V, H]，target [N]（负数处权重应为 0），loss_weight [N]。chunk 是一块多少行；
    chunk_loss 是一块怎么算，编译过的见 trainer/compiling.py。

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
    return _LinearCrossEntropy.apply(hidden, weight, target, loss_weight, chunk, need_grad, chunk_loss)
