"""base 一步的时间去向：按类的份额，与最花时间的内核。"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from card_parts import Card
from card_training import LENGTH, ROWS, BareStep, random_rows

from minimind.dataset.collate import to_device

# 内核或算子的名字 → 类；从上往下，先中先得
KINDS = (
    ("注意力", r"flash|fmha|attention|segment_attention"),
    ("矩阵乘", r"gemm|cutlass|nvjet|xmma|cublas|wgmma|sm\d+_|\bmm\b|::mm|bmm|addmm|linear|matmul"),
    ("编译出的融合内核", r"triton|cpp_fused"),
    ("拷贝与换精度", r"copy|cast|memcpy|memset|fill|clone"),
    ("归一化", r"norm|rsqrt|mean"),
    ("归约与 softmax", r"softmax|reduce|sum|logsumexp|gather|scatter|index"),
    ("逐元素", r"elementwise|vectorized|mul|add|silu|sub|div|exp|lerp|foreach|multi_tensor"),
)


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), "其他")


def shares(card: Card, call: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """各类占的份额，与最花时间的十二个内核（卡上看内核，CPU 上看算子）。"""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if card.on_cuda else [])
    call()
    with profile(activities=activities) as profiled:
        for _ in range(repeats):
            call()
        if card.on_cuda:
            torch.cuda.synchronize()
    attribute = "self_device_time_total" if card.on_cuda else "self_cpu_time_total"
    times: dict[str, float] = {}
    for event in profiled.key_averages():
        spent = getattr(event, attribute, 0.0)
        # 卡上只数内核：算子那一行的设备时间是它发出的内核的，数了就重复
        if spent > 0 and (not card.on_cuda or str(event.device_type).endswith("CUDA")):
            times[event.key] = times.get(event.key, 0.0) + spent
    total = sum(times.values()) or 1.0
    kinds: dict[str, float] = {}
    for name, spent in times.items():
        kinds[kind_of(name)] = kinds.get(kind_of(name), 0.0) + spent / total
    top = sorted(times.items(), key=lambda pair: -pair[1])[:12]
    return {
        "kinds": {k: round(v, 4) for k, v in sorted(kinds.items(), key=lambda pair: -pair[1])},
        "useful_share": kinds.get("矩阵乘", 0.0) + kinds.get("注意力", 0.0),
        "kernel_ms": total / repeats / 1000,
        "top": [[name[:90], kind_of(name), round(spent / total, 4)] for name, spent in top],
    }


def profile(card: Card) -> None:
    """base 一步的时间去向：前向反向与优化器分开看（Muon 的迭代也是矩阵乘，混在一起就看不出）。"""
    config = card.size("base")
    rows, length = card.pick((ROWS, LENGTH), (2, 128))
    batch = to_device(random_rows(rows, length, config.vocab_size, 0), card.device)
    for mode in ("eager", "compiled"):
        step = BareStep(card, config, mode == "compiled")
        found = shares(card, lambda: step.forward_backward(batch), card.pick(3, 1))  # noqa: B023
        card.note(**{mode: found})
        card.note(**{f"{mode}_optimizer": shares(card, step.optimizer.step, card.pick(3, 1))})
