"""在哪里训练：本机的一个设备，或一张不在手边的卡；各有多少内存、大约多快。"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minimind.dataset import PretrainDataset, collate_packed
from minimind.dataset.collate import to_device
from minimind.model import PRESETS, MiniMindForCausalLM, preset
from minimind.plan import cards, measure
from minimind.plan.arguments import PlanArguments
from minimind.plan.planning import LENGTH
from minimind.runtime.device import (
    autocast_context,
    choose_dtype,
    device_name,
    peak_flops,
    prepare_device,
    seed_all,
)
from minimind.trainer.recipe import count_targets, language_model_loss

# 测速之前先猜，好选尺寸与批：利用率，与查不到峰值的设备的峰值
GUESSED_USE, GUESSED_PEAK = {"cpu": 0.4}, 2e12
USUAL_USE = 0.15


@dataclass(frozen=True)
class Place:
    """在哪里训练：本机的设备，或一张卡的名字。"""

    name: str
    device: torch.device | None
    dtype: str
    room_gb: float | None
    flops: dict[str, float]  # 各尺寸每秒大约做多少次浮点运算

    @property
    def memory_options(self) -> dict[str, Any]:
        on_cpu = self.device is not None and self.device.type == "cpu"
        return {"half": self.dtype != "float32", "on_cpu": on_cpu}


def card_place(card: str, args: PlanArguments) -> Place:
    """不在手边的卡：公布的数与假设的利用率。"""
    flops = {name: cards.peak_of(card) * share for name, share in cards.UTILISATION.items()}
    return Place(card, None, "bfloat16", args.memory_gb or cards.memory_of(args.device, card), flops)


def here(device: torch.device, args: PlanArguments, sample: Path, folder: Path, tokenizer: Any) -> Place:
    """本机的设备：精度照训练的办法选，算力先照峰值猜（测速之后就不用它了）。"""
    prepare_device(device)
    seed_all(0)
    model = MiniMindForCausalLM(preset("tiny")).to(device)
    rows = PretrainDataset(sample, tokenizer, LENGTH, cache_dir=folder / "cache", num_workers=0)
    batch = collate_packed([rows[i] for i in range(min(2, len(rows)))])

    def probe(dtype: torch.dtype) -> None:
        with autocast_context(device, dtype):
            loss, _ = language_model_loss(model, to_device(batch, device))
        (loss / count_targets(batch)).backward()
        model.zero_grad(set_to_none=True)

    dtype = choose_dtype("auto", device, probe)
    peak = peak_flops(device, dtype) or GUESSED_PEAK
    room = measure.free_memory(device)
    if args.memory_gb:
        room = min(args.memory_gb, room or args.memory_gb)
    flops = dict.fromkeys(PRESETS, peak * GUESSED_USE.get(device.type, USUAL_USE))
    return Place(device_name(device), device, str(dtype).removeprefix("torch."), room, flops)
