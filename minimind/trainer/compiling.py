"""编译：逐层 ``torch.compile``，并且先核对后使用。

只编译每一层（:class:`~minimind.model.model_minimind.Block`），各层共用一个图，几秒到几十秒就好；CUDA 上损失里一块 logits
的 softmax 也编译，词嵌入与输出头的矩阵乘照旧逐算子执行。编译改变的是梯度怎样算出来，所以头一个微批次两种算法各走一遍，损失与每个参数的梯度都对得上才用；
对不上、编译不了都只是一句话，训练照常不编译地走下去。
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind.console import format_duration, say
from minimind.dataset.collate import to_device
from minimind.model import MiniMindLM, flops_per_token
from minimind.model.kernels import (
    compute_dtype,
    linear_cross_entropy,
    segments_available,
    varlen_available,
)
from minimind.model.model_minimind import MLP, Attention, Block, MiniMindModel, MoE
from minimind.runtime.device import autocast_context, preserved_rng
from minimind.runtime.distributed import any_process, gather_objects
from minimind.trainer.recipe import Batch, Window

if TYPE_CHECKING:
    from minimind.trainer.recipe import Run

# auto：不编译要跑这么久才值得先花几十秒编译；算力按峰值的两成、查不到峰值时按步数估
WORTH_SECONDS, WORTH_STEPS, EAGER_SHARE_OF_PEAK = 300.0, 2000, 0.2
# 核对的松紧：（余弦至少，范数与损失的相对差至多，小于全局梯度范数的这么多倍就只剩舍入、不比）
TOLERANCE = {
    torch.float32: (0.999, 0.01, 1e-6),
    torch.bfloat16: (0.97, 0.1, 1e-3),
    torch.float16: (0.97, 0.1, 1e-3),
}
NO_COMPILE = ("npu", "mps")
# 编译过的损失一块的 logits 至多多少字节（梯度也是这么多）：半精度时 fp32 的不落到显存里，块可以大，
# H200 上一块 16,384 行比 8,192 行再快四分之一
CHUNK_BYTES = 2**28
HALF_SCALE = 256.0  # 核对时 float16 的损失乘这么多，小梯度才不会下溢


def fusible_chunk_loss(
    logits: Tensor, target: Tensor, weight: Tensor, need_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """:func:`~minimind.model.kernels.chunk_loss`，写成编译器能融成一个内核的样子：fp32 的一块不落到显存里。

    H200，N=32768、V=6400、bf16，整个损失连两个梯度：逐算子 5.8 毫秒，这样编译之后 1.8 毫秒。
    """
    dtype, logits = logits.dtype, logits.float()
    top = logits.amax(-1, keepdim=True)
    power = (logits - top).exp()
    total = power.sum(-1, keepdim=True)
    loss = ((total.log() + top - logits.gather(1, target)) * weight).sum()
    hit = torch.arange(logits.shape[1], device=logits.device) == target  # scatter 融不进去
    return loss, ((power / total - hit.float()) * weight).to(dtype) if need_grad else None


class CompiledBlocks(nn.Module):
    """模型的包装：前向时各层换成编译过的，出了前向一切照旧，所以 ``model`` 自己、存档的键名、验证都不受影响。

    Args:
        model: 含若干 :class:`Block` 的模型。
        backend: 交给 ``torch.compile``；默认 inductor。

    Attributes:
        state: "unchecked" 还没核对（先不用编译的）、"checking"、"on"、"off"。
    """

    def __init__(self, model: nn.Module, backend: str | Callable = "inductor"):
        super().__init__()
        self.module, self.backend, self.state = model, backend, "unchecked"
        self.first_shape: torch.Size | None = None
        self.capacity = 0
        self._compiled: dict[Callable, Callable] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """同 ``model(*args, **kwargs)``；还没核对、或已经关掉时就是它。"""
        if self.state == "checking":
            return self.run_compiled(*args, **kwargs)
        if self.state == "on" and not self._is_tail(*args, **kwargs):
            try:
                return self.run_compiled(*args, **kwargs)
            except Exception as error:  # 换了形状要重编译而编译不了；真是模型的错，下面会再报一次
                self.turn_off(f"重新编译失败（{one_line(error)}）")
        return self.module(*args, **kwargs)

    def run_compiled(self, *args: Any, **kwargs: Any) -> Any:
        """用编译过的层做一次前向；头一次调用时编译。"""
        args = tuple(self.static_inputs(a) if isinstance(a, dict) else a for a in args)
        with self._swapped():
            return self.module(*args, **self.static_inputs(kwargs))

    def check(self, run: Run, window: Window) -> None:
        """见 :func:`compile_and_check`。"""
        compile_and_check(run, window)

    def turn_off(self, reason: str) -> None:
        """从此不用编译的，说明为什么。"""
        self.state = "off"
        say(f"{reason}；接着训练，但不编译。")

    def static_inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """段界补到固定的个数（重复末尾那个边界，即空段），最长段改由行长代替：批与批之间形状不变，不必重编译。"""
        if batch.get("cu_seqlens") is None:
            return batch
        edges = batch["cu_seqlens"]
        if len(edges) > self.capacity:  # 头一批的两倍，凑成 2 的幂
            self.capacity = max(64, 1 << (2 * len(edges) - 1).bit_length())
        padded = torch.cat((edges, edges[-1:].expand(self.capacity - len(edges))))
        return {**batch, "cu_seqlens": padded, "max_seqlen": None}

    def _is_tail(self, *args: Any, **kwargs: Any) -> bool:
        """一轮末尾不满的批：只有行数少了。为它重编译不划算，逐算子走。"""
        batch = next((a for a in args if isinstance(a, dict)), kwargs)
        if batch.get("input_ids") is None:
            return False
        shape = batch["input_ids"].shape
        self.first_shape = self.first_shape or shape
        return shape[1:] == self.first_shape[1:] and shape[0] < self.first_shape[0]

    @property
    def attention_fits(self) -> bool:
        """注意力能不能进图：按长度成批的（有 dropout，或设备没有变长内核）形状批批不同，进不了，只编译前馈。"""
        weight = next(self.module.parameters())
        plain = has_dropout(self.module) or not getattr(self.module.config, "flash_attn", True)
        return not plain and (segments_available(weight) or varlen_available(weight))

    def units(self) -> Iterator[nn.Module]:
        """编译的单位：一般是整层；混合专家的层，词元的分法批批不同，只编译注意力与共享专家。"""
        for layer in self.module.modules():
            if not isinstance(layer, Block):
                continue
            mixture = isinstance(layer.mlp, MoE)
            if self.attention_fits and not mixture:
                yield layer
                continue
            if self.attention_fits:
                yield layer.self_attn
            yield from (layer.mlp.shared_experts or ()) if mixture else (layer.mlp,)

    @property
    def loss_fits(self) -> bool:
        """损失编不编译：CPU 上先去掉不是目标的位置，块的行数批批不同，进不了图。"""
        return next(self.module.parameters()).device.type == "cuda"

    def cross_entropy(self, hidden: Tensor, weight: Tensor, target: Tensor, loss_weight: Tensor) -> Tensor:
        """:func:`linear_cross_entropy`，每块用编译过的；各块一样长，少编译一次。"""
        rows, size = len(target), len(weight) * compute_dtype(hidden).itemsize
        chunk = -(-rows // max(1, -(-rows * size // CHUNK_BYTES)))
        compiled = self._compiled_function(fusible_chunk_loss)
        return linear_cross_entropy(hidden, weight, target, loss_weight, chunk, compiled)

    @contextlib.contextmanager
    def _swapped(self) -> Iterator[None]:
        """里面各单位的 ``forward`` 是编译过的；同一类的单位共用一个编译结果。"""
        units, modules = list(self.units()), list(self.module.modules())
        trunks = [module for module in modules if isinstance(module, MiniMindModel)]
        heads = [module for module in modules if isinstance(module, MiniMindLM) and self.loss_fits]
        for unit in units:
            unit.forward = functools.partial(self._compiled_forward(type(unit)), unit)
        for trunk in trunks:  # 反向时重算的那一遍也要换成编译过的
            trunk.recompute = functools.partial(MiniMindModel.recompute, context_fn=self._recomputing)
        for head in heads:
            head.cross_entropy = self.cross_entropy
        try:
            yield
        finally:
            for unit in units:
                del unit.forward
            for trunk in trunks:
                del trunk.recompute
            for head in heads:
                del head.cross_entropy

    def _recomputing(self) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
        """:func:`torch.utils.checkpoint.checkpoint` 的 ``context_fn``：前向时已经换好，重算时再换一次。"""
        return contextlib.nullcontext(), self._swapped()

    def _compiled_forward(self, kind: type) -> Callable:
        return self._compiled_function(
            {Block: Block.forward, Attention: Attention.forward, MLP: MLP.forward}[kind]
        )

    def _compiled_function(self, function: Callable) -> Callable:
        if function not in self._compiled:
            self._compiled[function] = torch.compile(function, fullgraph=True, backend=self.backend)
        return self._compiled[function]


def maybe_compile(model: nn.Module, choice: int | str, run: Run) -> nn.Module:
    """按 ``--use_compile``（0、1、auto）包装模型；不编译时原样返回，该说的说一声。"""
    device = run.device.type
    if choice == "auto":
        choice = int(worth_compiling(run))
    if not choice:
        return model
    if device in NO_COMPILE:
        say(f"{device.upper()} 上不用 torch.compile，已跳过 --use_compile。")
        return model
    wrapped = CompiledBlocks(model)
    if next(wrapped.units(), None) is None:
        say("这个模型里没有认得的层可编译，已跳过 --use_compile。")
        return model
    if any(isinstance(module, MoE) for module in model.modules()):
        say("混合专家层里词元的分法批批不同，不进图：--use_compile 只编译注意力与共享专家。")
    # 图不必按 DDP 的桶再切：每层的反向一结束梯度就能归约
    torch._dynamo.config.optimize_ddp = False
    return wrapped


def worth_compiling(run: Run) -> bool:
    """``auto``：只在 CUDA 上，且剩下的训练长到值得先花时间编译。强化学习的时间在采样上，形状也多变，不编译。"""
    if run.device.type != "cuda" or run.recipe.prepare is not None:
        return False
    args, steps = run.args, run.state.total_steps - run.state.step
    peak = run.numerics["peak_flops"]
    if not peak or not hasattr(run.config, "num_hidden_layers"):
        return steps >= WORTH_STEPS
    length = getattr(run.data.train, "row_length", args.max_seq_len)
    flops = flops_per_token(run.config, length) * length * args.batch_size * args.accumulation_steps
    return steps * flops / (EAGER_SHARE_OF_PEAK * peak) >= WORTH_SECONDS


# ---------------------------------------------------------------- 核对


def compile_and_check(run: Run, window: Window) -> None:
    """头一个更新之前调用：编译，并与逐算子的算法核对，决定用不用；已经有了定论就立刻返回。

    两遍从同一个随机数状态出发，结束后状态复原，所以核对过的训练与没核对的逐位相同。dropout 在编译后用的是另一种
    随机数，核对时关掉。梯度全为 0 的微批次说明不了什么（优势全是 0 的强化学习），留到下一个更新再核对。
    各进程一起得出同一个结论。
    """
    compiled = run.compiled
    if compiled.state != "unchecked":
        return
    with run.meter.pause("compile"), preserved_rng(run.device):
        batch = next((b for ids, b in window if ids), window[0][1])
        with no_dropout(compiled):
            plain = gradients(run, run.model, batch)
        if not any_process(plain.informative, run.device):
            return
        say("正在编译（torch.compile，逐层一个图）：头一次要几秒到几十秒，不计入速度与剩余时间。")
        reasons = gather_objects(difference(run, compiled, batch, plain))
    reason = next((r for r in reasons if r), None)
    if reason:
        compiled.turn_off(reason)
        return
    compiled.state = "on"
    seconds = run.meter.pauses["compile"][-1]
    say(
        f"编译与核对用时 {format_duration(seconds)}，损失与 {len(plain.grads)} 个参数的梯度都与不编译时一致。"
    )


class Gradients:
    """一个微批次的平均损失与各参数的梯度（按名字；没有参与的参数没有）。"""

    def __init__(self, loss: Tensor, grads: dict[str, Tensor]):
        self.loss, self.grads = float(loss), grads
        self.norm = float(torch.nn.utils.get_total_norm(list(grads.values()))) if grads else 0.0
        self.informative = self.norm > 0


def gradients(run: Run, model: nn.Module, batch: Batch) -> Gradients:
    """不碰 ``.grad``、不惊动 DDP 地求一次梯度。"""
    named = [(name, p) for name, p in run.model.named_parameters() if p.requires_grad]
    with preserved_rng(run.device):
        with autocast_context(run.device, run.dtype):
            loss, _ = run.recipe.loss(model, to_device(batch, run.device, run.dtype))
        scale = HALF_SCALE if run.dtype == torch.float16 else 1.0
        loss = loss / max(run.recipe.count(batch), 1.0)
        found = torch.autograd.grad(loss * scale, [p for _, p in named], allow_unused=True)
    return Gradients(loss.detach(), {name: g for (name, _), g in zip(named, found) if g is not None})


def difference(run: Run, compiled: CompiledBlocks, batch: Batch, plain: Gradients) -> str | None:
    """编译后的与 ``plain`` 差在哪里，说成半句话；一致为 None。编译不了也是一种差。"""
    compiled.state = "checking"
    try:
        with no_dropout(compiled):
            ours = gradients(run, compiled, batch)
        if has_dropout(compiled.module):  # 训练时用的是带 dropout 的图，也在这里编好
            gradients(run, compiled, batch)
    except Exception as error:  # 没有 C++ 编译器、断图、内部错误……不编译也能训练，所以只说一句
        return f"编译失败（{one_line(error)}）"
    finally:
        compiled.state = "unchecked"
    return compare(plain, ours, run.dtype)


def compare(plain: Gradients, ours: Gradients, dtype: torch.dtype) -> str | None:
    """两份梯度的第一处不同；一致为 None。"""
    cosine_least, relative, floor = TOLERANCE[dtype]
    if not abs(ours.loss - plain.loss) <= relative * abs(plain.loss) + 1e-6:
        return f"编译后的损失是 {ours.loss:.6g}，不编译是 {plain.loss:.6g}"
    for name, a in plain.grads.items():
        b = ours.grads.get(name)
        if b is None:
            return f"编译后 {name} 没有梯度"
        a, b = a.float().flatten(), b.float().flatten()
        norms = float(a.norm()), float(b.norm())
        if max(norms) < floor * plain.norm:  # 只剩舍入
            continue
        cosine = float(F.cosine_similarity(a, b, dim=0))
        if not (cosine >= cosine_least and abs(norms[1] - norms[0]) <= relative * max(norms)):
            return (
                f"编译后的梯度不对：{name} 与不编译时的余弦是 {cosine:.4f}，范数 {norms[1]:.4g} 对 {norms[0]:.4g}"
                f"（torch {torch.__version__}）"
            )
    return None


def has_dropout(model: nn.Module) -> bool:
    return bool(getattr(model.config, "dropout", 0.0))


@contextlib.contextmanager
def no_dropout(compiled: CompiledBlocks) -> Iterator[None]:
    """里面各层当作不在训练，于是没有 dropout；没有 dropout 的模型不动。"""
    layers = [m for m in compiled.module.modules() if isinstance(m, (Block, Attention)) and m.training]
    layers = layers if has_dropout(compiled.module) else []
    for layer in layers:
        layer.training = False
    try:
        yield
    finally:
        for layer in layers:
            layer.training = True


def one_line(error: Exception) -> str:
    """异常的类名与开头两行，至多 200 个字；缘由常在第二行（``backend='inductor' raised:`` 之后）。"""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}：{' '.join(lines[:2])}"[:200]
