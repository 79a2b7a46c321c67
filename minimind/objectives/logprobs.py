"""目标词元的对数概率：偏好、蒸馏与强化学习都从这里取，算法各自只管怎么用。

只在目标位置上算输出头：回答常常只占一行的小半，词表又有 6400 个词；目标多时再一块一块地算，整块 ``[N, V]`` 从不存在。
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind.dataset.collate import IGNORE, model_inputs, target_mask, target_places  # noqa: F401  也从这里引用
from minimind.model.kernels import autocast_off, compute_dtype, linear, matmul_nt, refuse_wrapped

CPU_CHUNK, DEVICE_ELEMENTS = 512, 2**25  # CPU 上一块多少行；卡上一块多少个 logits，至少 1024 行
KEPT = 4  # 前几块的 logits 留给反向，其余反向时重算：目标不多时一次矩阵乘也不多做


class TargetLogits(NamedTuple):
    """目标位置上的预测，按行优先的次序，共 N 个。

    hidden: ``[N, H]``，预测 ``targets`` 的那些位置的末层隐藏状态；weight: ``[V, H]``，输出头。
    targets: ``[N]`` int64。
    rows: ``[N]`` int64，属于第几条：打包的批是第几段（``cu_seqlens``，末尾的填充也占一段），否则是第几行。
    aux_loss: 0 维，混合专家的负载均衡损失（已乘系数），稠密模型为 0。
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    rows: Tensor
    aux_loss: Tensor

    @property
    def logits(self) -> Tensor:
        """``[N, V]``，整块：只给 N 不大、又真要看整个分布的用。"""
        return linear(self.hidden, self.weight)

    def logprobs(self, temperature: float = 1.0) -> Tensor:
        """同 :func:`selected_logprobs`，``[N]`` fp32，分块算。"""
        return chunked_logprobs(self.hidden, self.weight, self.targets, temperature)[0]

    def logprobs_and_entropy(self, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """:func:`selected_logprobs` 与 :func:`entropy_of`，各 ``[N]`` fp32，共用一遍 logits；熵没有梯度。"""
        return chunked_logprobs(self.hidden, self.weight, self.targets, temperature, entropy=True)


def target_rows(batch: dict[str, Any], places: Tensor) -> Tensor:
    """``[N]`` int64：展平后在 ``places`` ``[N]`` 的目标各属于第几段（打包）或第几行。"""
    if "cu_seqlens" in batch:
        edges = batch["cu_seqlens"][1:].to(places.device, torch.int64, non_blocking=True)
        return torch.bucketize(places, edges, right=True)
    return places // batch["labels"].shape[1]


def target_logits(model: nn.Module, batch: dict[str, Any]) -> TargetLogits:
    """一次前向，只取目标位置上的隐藏状态；logits 到要用时才一块一块地算。

    Args:
        model: 模型或它的 DDP 包装（梯度要同步就必须传包装）。
        batch: 有 ``input_ids``、``labels``（``[B, T]``，未移位，-100 不是目标），打包的批还有 ``position_ids``、
            ``cu_seqlens``、``max_seqlen``，左填充的批还有 ``attention_mask``。

    Raises:
        TypeError: 输出头被换成了别的模块，而这里直接用它的权重。
    """
    places = target_places(batch)
    out = model(**model_inputs(batch), return_logits=False)
    head = output_head(model)
    refuse_wrapped("输出头 lm_head", head)
    hidden = out.hidden_states.flatten(0, 1).index_select(0, places)
    targets = batch["labels"].flatten()[places + 1]
    return TargetLogits(hidden, head.weight, targets, target_rows(batch, places), out.aux_loss)


def output_head(model: nn.Module) -> nn.Module:
    """模型的输出头，隔着几层包装都行。"""
    while not hasattr(model, "lm_head"):
        model = model.module
    return model.lm_head


def selected_logprobs(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """``log softmax(logits / temperature)`` 在目标词元上的值，``[N]`` fp32。

    Args:
        logits: ``[N, V]``；softmax 一律在 fp32 里做。
        targets: ``[N]``。
        temperature: 采样时的温度；强化学习里两边必须相同，比值才有意义。
    """
    return -F.cross_entropy(_tempered(logits, temperature), targets, reduction="none")


class _ChunkedLogprobs(torch.autograd.Function):
    """一块一块地算 logits 与它们的对数概率；反向重算一遍 logits（前几块留着），整块从不存在。"""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk, entropy, need_grad):
        logps, entropies, kept = [], [], []
        dtype = compute_dtype(hidden)  # 关掉自动混合精度之前问
        with autocast_off(hidden):
            h, w = hidden.to(dtype), weight.to(dtype)
            for rows in _chunks(len(h), chunk):
                logits = matmul_nt(h[rows], w)
                logps.append(selected_logprobs(logits, targets[rows], temperature))
                if entropy:
                    entropies.append(entropy_of(logits, temperature))
                if need_grad and len(kept) < KEPT:
                    kept.append(logits)
        ctx.save_for_backward(hidden, weight, targets, *kept)
        ctx.temperature, ctx.chunk, ctx.dtype = temperature, chunk, dtype
        found = torch.cat(entropies) if entropy else hidden.new_empty(0)
        ctx.mark_non_differentiable(found)
        return torch.cat(logps), found

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, targets, *kept = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        with autocast_off(hidden):
            h, w = hidden.to(ctx.dtype), weight.to(ctx.dtype)
            for i, rows in enumerate(_chunks(len(h), ctx.chunk)):
                with torch.enable_grad():
                    logits = kept[i] if i < len(kept) else matmul_nt(h[rows], w)
                    logits = logits.detach().requires_grad_()
                    logp = selected_logprobs(logits, targets[rows], ctx.temperature)
                (grad_logits,) = torch.autograd.grad(logp, logits, grad[rows])
                if need_hidden:
                    grad_hidden[rows] = matmul_nt(grad_logits, w.t()).to(hidden.dtype)
                if need_weight:
                    grad_weight += matmul_nt(grad_logits.t(), h[rows].t())
        return (
            grad_hidden,
            grad_weight if grad_weight is None else grad_weight.to(weight.dtype),
            *([None] * 5),
        )


def chunked_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    *,
    entropy: bool = False,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``selected_logprobs(hidden @ weightᵀ, targets)`` 与 :func:`entropy_of`，值与梯度同整块算，整块 ``[N, V]`` 不存在。

    N = 16,384、V = 6400 时整块的 fp32 logits 是 420 MB，连它的对数概率与梯度共三份。

    Args:
        hidden: ``[N, H]``；weight: ``[V, H]``；targets: ``[N]``。
        entropy: 要不要熵；不要时第二个结果是空的。
        chunk: 一块多少行。

    Returns:
        对数概率 ``[N]`` 与熵 ``[N]``，fp32；熵没有梯度。
    """
    if chunk is None:
        on_cpu = hidden.device.type == "cpu"
        chunk = CPU_CHUNK if on_cpu else max(1024, DEVICE_ELEMENTS // len(weight))
    need_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _ChunkedLogprobs.apply(hidden, weight, targets, temperature, chunk, entropy, need_grad)


def _chunks(n: int, chunk: int) -> list[slice]:
    """``n`` 行切成的各块；一行也没有时是一个空块，图还连着。"""
    return [slice(start, start + chunk) for start in range(0, max(n, 1), chunk)]


def sequence_sums(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """按条求和：``[N]`` → ``[count]``；没有目标的条是 0。"""
    return values.new_zeros(count).index_add(0, rows, values)


@torch.no_grad()
def entropy_of(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """每个位置上分布的熵（自然对数），``[N]`` fp32；只用来看，不求梯度。"""
    scaled = _tempered(logits, temperature)
    probs = scaled.softmax(-1)
    # H = ln Σ eˣ − Σ p·x；归一化常数由最大的那个词反推，比先取对数再乘少走三遍 [N, V]（4096×6400：240 → 110 毫秒）
    normalizer = scaled.amax(-1) - probs.amax(-1).log()
    return normalizer - torch.linalg.vecdot(probs, scaled)


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    """``logits / temperature``，fp32；温度 1（默认）时不白走一遍。"""
    logits = logits.float()
    return logits if temperature == 1.0 else logits / temperature
