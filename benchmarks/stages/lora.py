"""LoRA：身份从 MiniMind 换成小雾灯，别的本事不掉。"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from bench_stages import Bench, Goal, Outcome

from minimind.evaluate.microworld import accuracy, evaluate_items
from minimind.model.model_lora import load_adapter, merge_lora
from minimind.recipes.lora import LoRAArguments
from minimind.recipes.lora import run as train_lora
from minimind.runtime.adapters import adapter_path, read_adapter

TITLE = "LoRA：换身份"
FIGURE = {"title": "LoRA: new identity, tiny model", "y": "training loss", "log_y": True}
GOALS = [
    Goal("identity", "新身份答对（留出的问法）", at_least=0.95),
    Goal("others", "其他任务答对", at_least=-0.03, change=True),
    Goal("size", "增量占底座参数", at_most=0.10),
    Goal("merge", "合并前后 logits 最大差", at_most=1e-4, percent=False),
]


def exam(bench: Bench, loaded: Any) -> dict[str, float]:
    """新身份的题，与旧身份之外的全部简单题。"""
    identity = evaluate_items(loaded.model, loaded.tokenizer, bench.items("lora"), description="新身份")
    others = bench.items("easy", skip=("identity",))
    rest = evaluate_items(loaded.model, loaded.tokenizer, others, description="其他任务")
    return {"identity": accuracy(identity), "others": accuracy(rest)}


def before(bench: Bench) -> dict[str, float]:
    return exam(bench, bench.open(bench.base, "full_sft"))


def settings(bench: Bench, seed: int, folder: Path) -> LoRAArguments:
    """演示里用的就是这一组。"""
    return LoRAArguments(
        **bench.common(seed, folder, "lora_identity"),
        max_seq_len=256,
        batch_size=4,
        epochs=4,
    )


def run(bench: Bench, seed: int) -> Outcome:
    """训练一次并考试。"""
    folder = bench.folder(seed)
    result = train_lora(settings(bench, seed, folder))
    metrics = exam(bench, bench.open(folder, "full_sft", lora_weight="lora_identity"))
    return Outcome(metrics | compare_merged(bench, folder), curves={"loss": bench.loss_curve(result.log)})


@torch.no_grad()
def compare_merged(bench: Bench, folder: Path) -> dict[str, float]:
    """合并前后同一段输入的 logits 差，与增量的大小。"""
    model = bench.open(folder, "full_sft", dtype="float32").model
    adapter, _ = read_adapter(adapter_path(model.config, "lora_identity", folder))
    total = sum(p.numel() for p in model.parameters())
    ids = torch.randint(3, model.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    load_adapter(model, adapter)
    apart = model(ids.to(model.device)).logits
    merge_lora(model)
    together = model(ids.to(model.device)).logits
    size = sum(value.numel() for value in adapter.state.values()) / total
    return {"size": size, "merge": float((apart - together).abs().max())}
