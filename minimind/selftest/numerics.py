"""前向与反向：设备上的损失、每个参数的梯度，与 CPU 上 fp32、写明白的注意力算出的比。

结构 v2、v3、混合专家；批次打包、左填充；fp32、bf16、fp16；照常跑、编译后跑。
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minimind.dataset.collate import to_device
from minimind.runtime.device import autocast_context, module_of
from minimind.selftest.rows import Check, Measure, NotApplicable, Outcome
from minimind.selftest.toys import KINDS, LAYOUTS, matmul_precision, on_device, toy_batch, toy_model
from minimind.trainer.compiling import NO_COMPILE, CompiledBlocks
from minimind.trainer.recipe import count_targets, language_model_loss


@dataclass(frozen=True)
class Precision:
    """一种精度与它的限度，都是相对值。

    Args:
        matmul: fp32 矩阵乘的精度（:func:`minimind.selftest.toys.matmul_precision`）。
        loss: 损失差至多多少。
        angle: 各参数梯度的 1 − 余弦至多多少。
        error: 各参数梯度的差的范数至多多少。
        rounding: 梯度差 *至少* 多少：半精度算出来与 fp32 分毫不差，就是根本没有用半精度。
        scale: 反向之前损失乘多少；fp16 的小梯度不放大就成了零。
    """

    dtype: torch.dtype
    matmul: str = "highest"
    loss: float = 1e-4
    angle: float = 1e-4
    error: float = 1e-3
    rounding: float | None = None
    scale: float = 1.0


PRECISIONS = {
    "fp32": Precision(torch.float32),
    # 训练时 CUDA 上的 fp32 允许 TF32：尾数 10 位，与 fp16 相当
    "tf32": Precision(torch.float32, "high", loss=2e-3, angle=1e-3, error=0.03),
    "bf16": Precision(torch.bfloat16, loss=5e-3, angle=0.01, error=0.15, rounding=1e-4),
    "fp16": Precision(torch.float16, loss=2e-3, angle=0.01, error=0.15, rounding=1e-5, scale=1024.0),
}


def precisions_of(device: torch.device) -> list[str]:
    """这种设备要测的精度：TF32 只有 CUDA 有。"""
    return [name for name in PRECISIONS if name != "tf32" or device.type == "cuda"]


def require_precision(name: str, device: torch.device) -> None:
    """Raises: NotApplicable：这张卡没有 bf16。"""
    if name != "bf16" or device.type not in ("cuda", "npu"):
        return
    supported = getattr(module_of(device), "is_bf16_supported", None)
    options = {"including_emulation": False} if device.type == "cuda" else {}
    if supported is not None and not supported(**options):
        raise NotApplicable("这张卡没有 bf16，训练默认用 fp16")


def loss_and_gradients(
    model: nn.Module, forward: Any, batch: dict[str, Any], device: torch.device, precision: Precision
) -> tuple[float, dict[str, Tensor]]:
    """一次前向反向：平均损失（含负载均衡的那部分），与各参数的梯度（float64，在 CPU 上）。

    Args:
        model: 取梯度的模型。
        forward: 用来算的：``model`` 自己或它编译之后的。
    """
    with matmul_precision(precision.matmul):
        with autocast_context(device, precision.dtype):
            total, _ = language_model_loss(forward, to_device(batch, device))
            loss = total / count_targets(batch)
        (loss * precision.scale).backward()
    gradients = {
        name: torch.zeros_like(p, device="cpu", dtype=torch.float64)
        if p.grad is None
        else p.grad.cpu().double() / precision.scale
        for name, p in model.named_parameters()
    }
    return float(loss.detach()), gradients


@functools.cache
def reference(kind: str, layout: str) -> tuple[float, dict[str, Tensor]]:
    """CPU、fp32、``flash_attn=False``：注意力是写明白的 softmax 加一整张掩码，不经过任何融合的核。"""
    model = toy_model(kind, flash_attn=False)
    return loss_and_gradients(model, model, toy_batch(layout), torch.device("cpu"), PRECISIONS["fp32"])


def compare(precision: Precision, got: tuple, want: tuple) -> Outcome:
    """两份（损失，梯度）之差；说明里写出最差的那个参数。

    Raises:
        RuntimeError: 参数不是同一批（例如输出头不再与词嵌入共享）。
    """
    (loss, gradients), (expected_loss, expected) = got, want
    if gradients.keys() != expected.keys():
        odd = sorted(gradients.keys() ^ expected.keys())
        raise RuntimeError(f"参数与参考不是同一批：{'、'.join(odd[:3])}")
    angles, errors = {}, {}
    for name, want_grad in expected.items():
        got_grad, norm = gradients[name], float(want_grad.norm())
        errors[name] = float((got_grad - want_grad).norm()) / norm
        cosine = float((got_grad * want_grad).sum()) / (norm * max(float(got_grad.norm()), 1e-30))
        angles[name] = max(1 - cosine, 0.0) if cosine == cosine else float("nan")
    worst = max(errors, key=lambda name: nan_is_worst(errors[name]))
    measures = [
        Measure("损失差", abs(loss - expected_loss) / abs(expected_loss), high=precision.loss),
        Measure("1−余弦", angles[max(angles, key=lambda n: nan_is_worst(angles[n]))], high=precision.angle),
        Measure("梯度差", errors[worst], low=precision.rounding, high=precision.error),
    ]
    note = ""
    if not all(measure.ok for measure in measures):
        note = f"最差的是 {worst}"
        if precision.rounding and errors[worst] < precision.rounding:
            note = "与 fp32 分毫不差：没有真的用半精度"
    return Outcome(measures, note)


def nan_is_worst(value: float) -> float:
    """排序用：NaN 与谁比都是假，``max`` 会漏掉它。"""
    return value if value == value else float("inf")


def gradient_check(kind: str, layout: str, name: str, device: torch.device, compiled: bool) -> Outcome:
    """表里的一行。"""
    require_precision(name, device)
    precision = PRECISIONS[name]
    want = reference(kind, layout)
    model = forward = on_device(toy_model(kind), device)
    if compiled:
        forward = compile_or_skip(model, device)
    try:
        got = loss_and_gradients(model, forward, toy_batch(layout), device, precision)
    except Exception as error:
        missing = compiled and missing_compiler(error)
        if missing:
            raise NotApplicable(f"没有能用的{missing}，用不了 --use_compile") from error
        raise
    return compare(precision, got, want)


def missing_compiler(error: BaseException | None) -> str:
    """编译失败是不是因为机器上缺工具：C++ 编译器或 Triton；不是则为空。"""
    names = {"InvalidCxxCompiler": " C++ 编译器", "TritonMissing": " Triton"}
    while error is not None:
        if type(error).__name__ in names:
            return names[type(error).__name__]
        error = getattr(error, "inner_exception", None) or error.__cause__
    return ""


def compile_or_skip(model: nn.Module, device: torch.device) -> Any:
    """用编译过的层做前向的函数，与 ``--use_compile`` 同一个做法；每次从头编译，不受前面几行的影响。

    Raises:
        NotApplicable: 这种设备上不编译。
    """
    if device.type in NO_COMPILE:
        raise NotApplicable(f"{device.type.upper()} 上不用 torch.compile")
    torch.compiler.reset()
    return compiled_forward(model)


def compiled_forward(model: nn.Module) -> Any:
    """编译或运行出了错就抛出来，不像训练那样退回逐算子。"""
    return CompiledBlocks(model).run_compiled


COMPILE_SECONDS = 20.0  # 头一项之前的猜测；之后按上一项的用时


def eager_checks(device: torch.device) -> list[Check]:
    return [
        Check("前向反向", f"{kind} {layout} {name}", functools.partial(gradient_check, kind, layout, name, device, False))
        for name in precisions_of(device)
        for kind in KINDS
        for layout in LAYOUTS
    ]  # fmt: skip


def compiled_checks(device: torch.device, default: str) -> list[Check]:
    """编译的各行，训练最常用的在前：时间不够时先丢掉后面的。

    Args:
        default: 这种设备训练时默认的精度（:data:`PRECISIONS` 里的名字）。
    """

    def cases() -> Iterator[tuple[str, str, str]]:
        names = sorted(precisions_of(device), key=lambda name: name != default)
        for name in names:
            for layout in LAYOUTS:
                for kind in KINDS:
                    yield kind, layout, name

    return [
        Check("编译", f"{kind} {layout} {name}", functools.partial(gradient_check, kind, layout, name, device, True), COMPILE_SECONDS)
        for kind, layout, name in cases()
    ]  # fmt: skip
