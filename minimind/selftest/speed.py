"""速度：训练与解码每秒多少词元、利用率、内存；同一批反复练，损失要降下来。"""

from __future__ import annotations

import functools
import time
from typing import Any

import torch

from minimind.dataset import collate_packed
from minimind.dataset.collate import to_device
from minimind.inference.engine import Engine
from minimind.inference.sampling import SamplingParams
from minimind.model import MiniMindForCausalLM, count_parameters, flops_per_token, preset
from minimind.runtime.device import (
    autocast_context,
    make_scaler,
    peak_flops,
    peak_memory_bytes,
    pick_threads,
    synchronize,
)
from minimind.selftest.numerics import PRECISIONS
from minimind.selftest.rows import Check, Measure, Outcome
from minimind.selftest.toys import packed_row
from minimind.trainer.optim import build_optimizer
from minimind.trainer.recipe import count_targets, language_model_loss
from minimind.trainer.train_args import TrainArguments

# (预设, 行数, 行长, 至多测几步)。卡上用默认的 26M、训练常用的批；CPU 上用演示的 3.6M
SIZES = {"cpu": ("tiny", 2, 256, 4)}
DEFAULT_SIZE = ("small", 32, 512, 20)
SECONDS = 6.0  # 测到这么久就不再多测一步：机器忙的时候一步要几秒
WARMUP = 2  # 头几步含载入核、自动调优，不计时
NEW_TOKENS = 32


def sizes_of(device: torch.device) -> tuple[str, int, int, int]:
    """(预设, 行数, 行长, 测几步)。"""
    return SIZES.get(device.type, DEFAULT_SIZE)


def speed_model(name: str, device: torch.device) -> MiniMindForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MiniMindForCausalLM(preset(name, zero_init_residual=True)).to(device)


def training_speed(dtype: torch.dtype, device: torch.device) -> Outcome:
    """完整的训练步：前向、反向、缩放、优化器。"""
    name, rows, length, steps = sizes_of(device)
    model = speed_model(name, device).train()
    generator = torch.Generator().manual_seed(4)
    packed = [packed_row((length // 2, length // 2 - 8, 8), generator) for _ in range(rows)]
    batch = collate_packed(packed)
    targets, batch = count_targets(batch), to_device(batch, device)
    precision = str(dtype).removeprefix("torch.")
    optimizer = build_optimizer(model, TrainArguments(), newton_schulz_dtype=precision)
    scaler = make_scaler(device, dtype)
    losses = []

    def step(batch: dict[str, Any] = batch, targets: float = targets) -> None:
        with autocast_context(device, dtype):
            total, _ = language_model_loss(model, batch)
        loss = total / targets
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        model.zero_grad(set_to_none=True)
        losses.append(loss.detach())

    note = f"{name}（{count_parameters(model) / 1e6:.1f}M），{rows} × {length}"
    if device.type == "cpu":
        few = collate_packed([packed_row((48, 8, 8), generator)])
        note += f"，{pick_threads(lambda: step(few, count_targets(few)))} 线程"
        losses.clear()
    for _ in range(WARMUP):
        step()
    synchronize(device)
    start = time.perf_counter()
    done = 0
    while done < steps and time.perf_counter() - start < SECONDS:
        step()
        done += 1
    synchronize(device)
    speed = done * batch["num_tokens"] / (time.perf_counter() - start)
    measures = [
        Measure("词元/秒", speed),
        Measure("损失由", float(losses[0])),
        Measure("降到", float(losses[-1]), high=float(losses[0]) - 0.05),
        Measure("内存最高 GB", peak_memory_bytes(device) / 2**30),
    ]
    peak = peak_flops(device, dtype)
    if peak:
        used = speed * flops_per_token(model.config, length / 2)
        measures.insert(1, Measure("利用率 %", 100 * used / peak))
        note += f"，按峰值 {peak / 1e12:.3g} TFLOPS"
    else:
        note += "；不知道这个设备的峰值，没有利用率"
    return Outcome(measures, note)


def decoding_speed(rows: int, dtype: torch.dtype, device: torch.device, **options: Any) -> Outcome:
    """同时写 ``rows`` 条，每条提示 64 个词元。"""
    name = sizes_of(device)[0]
    model = speed_model(name, device).eval()
    engine = Engine(model, eos_ids=(), max_slots=rows, dtype=dtype, **options)

    def write() -> int:
        for index in range(rows):
            prompt = [(7 * index + k) % 6000 + 3 for k in range(64)]
            engine.add_request(prompt, SamplingParams(temperature=1.0, seed=index), NEW_TOKENS)
        total = 0
        while engine.has_unfinished:
            total += sum(len(sequence.ids) for sequence in engine.step())
        return total

    write()
    synchronize(device)
    start = time.perf_counter()
    total = write()
    synchronize(device)
    seconds = time.perf_counter() - start
    measures = [Measure("词元/秒", total / seconds), Measure("写完", total, low=rows * NEW_TOKENS)]
    return Outcome(measures, f"{name}，提示 64，各写 {NEW_TOKENS}")


def speed_checks(device: torch.device, default: str) -> list[Check]:
    dtype = PRECISIONS[default].dtype
    few, many = (1, 8) if device.type == "cpu" else (1, 64)
    plain = functools.partial(decoding_speed, cuda_graphs=False)
    checks = [
        Check("速度", f"训练 {default}", functools.partial(training_speed, dtype, device), 5.0),
        Check("速度", f"解码 {few} 条", functools.partial(plain, few, dtype, device)),
        Check("速度", f"解码 {many} 条", functools.partial(plain, many, dtype, device)),
    ]
    if device.type == "cuda":
        record = functools.partial(decoding_speed, few, dtype, device, cuda_graphs=True)
        checks.append(Check("速度", f"解码 {few} 条，录制", record))
    return checks
