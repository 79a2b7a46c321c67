"""真实文本上的路：small 预训练接着微调，与公开做法给同样的时间，比留出集的每字节比特数。

两边同一个模型的代码、同一个分词器、同样的分钟；学习率按用掉的时间走完日程，所以谁快谁就多见几个词元，不必先猜步数。
本项目：打包的行、Muon、预热与余弦、（卡上）逐层编译。公开做法：AdamW 5e-4、余弦、每篇补齐到 340（微调 512）、截断。
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from bench_quality import PLAIN_INIT, RECIPES
from card_parts import Card
from train_peers import encode_documents, padded_batches

from minimind.dataset import PretrainDataset, SFTDataset, collate_packed
from minimind.dataset.collate import to_device
from minimind.evaluate.bpb import text_loss
from minimind.inference.generate import generate_batch
from minimind.inference.loading import stop_ids
from minimind.inference.prompts import CHAT_PROMPTS, PLAIN_PROMPTS
from minimind.model import MiniMindLM
from minimind.runtime.device import autocast_context, seed_all, synchronize
from minimind.tokenizer import encode_chat_batch, encode_plain_batch, load_tokenizer
from minimind.trainer.compiling import CompiledBlocks
from minimind.trainer.loader import training_batches
from minimind.trainer.optim import build_optimizer, set_learning_rate
from minimind.trainer.progress import lr_at
from minimind.trainer.recipe import count_targets, language_model_loss
from minimind.trainer.train_args import TrainArguments

SPLIT = {"pretrain": 0.6, "sft": 0.4}  # 训练的时间怎样分
OVERHEAD = 0.15  # 数据备好之后，编译、验证与作答至多占余下的这么多，另加十秒
ROWS = {"ours": 64, "public": 64}
LENGTHS = {"ours": {"pretrain": 512, "sft": 512}, "public": {"pretrain": 340, "sft": 512}}


@dataclass
class Side:
    """一边：模型、它的批从哪里来、优化器怎么建、日程怎么走。"""

    name: str
    model: Any
    wrapped: Any

    def settings(self, stage: str) -> TrainArguments:
        """本项目的默认，或公开做法的；微调的学习率是预训练的三分之一（本项目的默认；公开做法的是 5e-5 到 5e-7，也取三分之一）。"""
        if self.name == "ours":
            width = self.model.config.hidden_size
            rate = (1.5 if stage == "pretrain" else 0.5) / width
            return TrainArguments(hidden_size=width, learning_rate=rate)
        overrides = dict(RECIPES["public"].overrides)
        if stage == "sft":
            overrides["learning_rate"] /= 3
        return TrainArguments(**overrides)

    def optimizer(self, settings: TrainArguments) -> Any:
        if self.name == "ours":
            return build_optimizer(self.model, settings)
        fused = self.model.device.type in ("cpu", "cuda")
        return torch.optim.AdamW(self.model.parameters(), lr=settings.learning_rate, fused=fused)


def build(card: Card, name: str) -> Side:
    """两边的结构相同，初始化各用各的默认。"""
    seed_all(0)
    init = PLAIN_INIT if name == "public" else {"zero_init_residual": True}
    model = MiniMindLM(card.size("small", **init)).to(card.device).train()
    wrapped: Any = model
    if name == "ours" and card.on_cuda:
        wrapped = CompiledBlocks(model)
        wrapped.state = "on"
    return Side(name, model, wrapped)


def batches(card: Card, name: str, stage: str, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """没有尽头的批。"""
    path = card.text("pretrain_zh.jsonl" if stage == "pretrain" else "sft.jsonl")
    rows, length = card.pick(ROWS[name], 2), card.pick(LENGTHS[name][stage], 64)
    if name == "public":
        documents = encode_documents(path, stage, tokenizer)
        return padded_batches(documents, length, rows, False, tokenizer.pad_token_id)
    dataset = (PretrainDataset if stage == "pretrain" else SFTDataset)(
        str(path), tokenizer, length, split="all"
    )
    made = training_batches(
        dataset, collate_packed, seed=0, epochs=10**6, batch_size=rows, device=card.device,
        num_workers=card.pick(2, 0),
    )  # fmt: skip
    return (batch for _, batch in made if len(batch["input_ids"]) == rows)


def train_for(
    card: Card, side: Side, stage: str, source: Iterator[dict[str, Any]], seconds: float
) -> dict[str, Any]:
    """训练 ``seconds`` 秒；编译与预热的头三步不计时（它们的梯度照样用上）。"""
    settings = side.settings(stage)
    optimizer = side.optimizer(settings)
    start, steps, tokens, losses = time.perf_counter(), 0, 0, []
    warmup = 3 if steps == 0 and card.on_cuda else 0
    for batch in source:
        if steps == warmup:
            synchronize(card.device)
            start = time.perf_counter()
        used = (time.perf_counter() - start) / seconds if steps >= warmup else 0.0
        if used >= 1 or (card.quick and steps >= 2):
            break
        lr = lr_at(
            used, 1.0, peak=settings.learning_rate, schedule=settings.schedule,
            warmup_ratio=settings.warmup_ratio, decay_ratio=settings.decay_ratio,
        )  # fmt: skip
        set_learning_rate(optimizer, lr)
        count = max(count_targets(batch), 1.0)
        tokens += batch.pop("num_tokens")
        with autocast_context(card.device, card.half):
            loss, _ = language_model_loss(side.wrapped, to_device(batch, card.device))
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(side.model.parameters(), settings.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps += 1
        losses = [*losses[-9:], loss.detach() / count]
        if steps % 10 == 0:
            synchronize(card.device)  # 不让主机跑在时间前面
    synchronize(card.device)
    return {
        "steps": steps,
        "tokens": tokens,
        "seconds": round(time.perf_counter() - start, 1),
        "loss": float(torch.stack(losses).mean()),
    }


def score(card: Card, side: Side, stage: str, tokenizer: Any) -> dict[str, Any]:
    """留出集的每字节比特数（两边同一种打包的算法），与几条照样写下的回答。"""
    held = "heldout/pretrain_zh.heldout.jsonl" if stage == "pretrain" else "heldout/sft.heldout.jsonl"
    side.model.eval()
    with torch.no_grad(), autocast_context(card.device, card.half):
        found = text_loss(
            side.model, tokenizer, card.text(held), max_length=card.pick(512, 64), max_rows=card.pick(512, 2)
        )
    if stage == "sft":
        turns = [[{"role": "user", "content": text}] for text in CHAT_PROMPTS]
        asked = [one.ids for one in encode_chat_batch(tokenizer, turns, add_generation_prompt=True)]
        shown = CHAT_PROMPTS
    else:
        shown = PLAIN_PROMPTS
        asked = [[tokenizer.bos_token_id, *ids] for ids in encode_plain_batch(tokenizer, list(shown))]
    count = card.pick(4, 1)
    written = generate_batch(
        side.model, asked[:count], max_new_tokens=card.pick(60, 4), eos_ids=stop_ids(side.model, tokenizer)
    )
    answers = {
        shown[index]: tokenizer.decode(one.ids) for index, one in sorted(written, key=lambda pair: pair[0])
    }
    side.model.train()
    return {f"{stage}_bpb": found["bpb"], f"{stage}_answers": answers}


def road(card: Card) -> None:
    """两边轮流：先各预训练，再各微调；每走完一段就记下。"""
    tokenizer = load_tokenizer()
    sides = {name: build(card, name) for name in ("ours", "public")}
    found: dict[str, dict[str, Any]] = {name: {} for name in sides}
    # 两边的数据先备好：谁的分词也不占训练的时间
    sources = {(name, stage): batches(card, name, stage, tokenizer) for stage in SPLIT for name in sides}
    spend = max(card.seconds_left * (1 - OVERHEAD) - 10, 2) / 2
    for stage, share in SPLIT.items():
        for name, side in sides.items():
            done = train_for(card, side, stage, sources[name, stage], spend * share)
            found[name] |= {f"{stage}_{key}": value for key, value in done.items()}
            found[name] |= score(card, side, stage, tokenizer)
            card.note(**found, minutes_each=round(spend / 60, 2))
