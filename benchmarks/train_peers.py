"""训练速度基准的两边：模型、一步训练，以及公开做法与本项目各自的批次。"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import need_file

from minimind.dataset import collate_packed
from minimind.dataset.collate import model_inputs, to_device
from minimind.export.twin import transformers_twin
from minimind.model import MiniMindConfig, MiniMindForCausalLM
from minimind.runtime.device import autocast_context
from minimind.tokenizer import encode_chat_batch, encode_plain_batch

Batch = dict[str, Any]


# ---------------------------------------------------------------- 两边的模型


def build_ours(config: MiniMindConfig, device: torch.device) -> MiniMindForCausalLM:
    torch.manual_seed(0)
    return MiniMindForCausalLM(config).to(device).train()


def build_peer(config: MiniMindConfig, device: torch.device) -> Any:
    """同尺寸的 ``LlamaForCausalLM``，权重从本项目的模型复制过来：两边算的是同一个函数。"""
    ours = build_ours(config, torch.device("cpu"))
    peer = transformers_twin(ours, attn_implementation="sdpa", use_cache=False)
    return peer.to(device).train()


class Stepper:
    """一步训练：前向、反向、AdamW。"""

    def __init__(
        self, model: Any, device: torch.device, dtype: torch.dtype, ours: bool, compile: bool = False
    ):
        self.device, self.dtype, self.ours = device, dtype, ours
        self.model = torch.compile(model) if compile else model
        # 同一个优化器，两边的差别只在前向与反向
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type in ("cpu", "cuda"))

    def __call__(self, batch: Batch) -> None:
        batch = to_device(batch, self.device)
        batch = model_inputs(batch, "labels")
        with autocast_context(self.device, self.dtype):
            loss = self.model(**batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


# ---------------------------------------------------------------- 批次


def head_of(path: str, lines: int, folder: Path) -> Path:
    """数据的前 ``lines`` 行另存一份：基准只用到这么多，不必等整份分词。"""
    source = need_file(path)
    if not lines:
        return source
    target = folder / f"{source.stem}-{lines}.jsonl"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with source.open(encoding="utf-8") as file:
            target.write_text("".join(line for _, line in zip(range(lines), file)), encoding="utf-8")
    return target


def encode_documents(path: Path, kind: str, tokenizer: Any) -> list[tuple[list[int], list[bool]]]:
    """每篇的 id 与目标掩码，供对照使用；与本项目的数据集同一个分词器、同一种渲染。"""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if kind == "pretrain":
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        encoded = encode_plain_batch(tokenizer, [r["text"] for r in records])
        return [([bos, *ids, eos], [True] * (len(ids) + 2)) for ids in encoded]
    return [(c.ids, c.target) for c in encode_chat_batch(tokenizer, [r["conversations"] for r in records])]


def padded_batches(
    documents: list[tuple[list[int], list[bool]]],
    max_len: int,
    batch_size: int,
    to_longest: bool,
    pad_id: int,
) -> Iterator[Batch]:
    """公开项目的做法：每篇截到 ``max_len``，补齐到最大长度（或本批最长），随机次序。"""
    order = list(range(len(documents)))
    random.Random(0).shuffle(order)
    while True:
        for start in range(0, len(order) - batch_size + 1, batch_size):
            rows = [documents[i] for i in order[start : start + batch_size]]
            lengths = [min(len(ids), max_len) for ids, _ in rows]
            width = max(lengths) if to_longest else max_len
            input_ids = torch.full((batch_size, width), pad_id)
            labels = torch.full((batch_size, width), -100)
            for r, ((ids, target), n) in enumerate(zip(rows, lengths)):
                input_ids[r, :n] = torch.tensor(ids[:n])
                mask = torch.tensor(target[:n])
                labels[r, :n] = torch.where(mask, input_ids[r, :n], -100)
            yield {"input_ids": input_ids, "labels": labels, "num_tokens": sum(lengths)}


def packed_batches(dataset: Any, batch_size: int) -> Iterator[Batch]:
    """本项目的打包行，随机次序。"""
    while True:
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
        for start in range(0, len(order) - batch_size + 1, batch_size):
            rows = [dataset[i] for i in order[start : start + batch_size]]
            yield {**collate_packed(rows), "num_tokens": sum(row["num_tokens"] for row in rows)}


def batch_lengths(
    documents: list[tuple[list[int], list[bool]]], max_len: int, batch_size: int
) -> list[list[int]]:
    """对照一轮里各批的截断后长度；次序与 :func:`padded_batches` 相同。"""
    order = list(range(len(documents)))
    random.Random(0).shuffle(order)
    lengths = [min(len(documents[i][0]), max_len) for i in order]
    return [lengths[s : s + batch_size] for s in range(0, len(lengths) - batch_size + 1, batch_size)]


def fill_share(batches: list[list[int]], max_len: int, to_longest: bool) -> float:
    """对照的非填充位置占比，按整轮算：几步之内的样本长短起伏不带进结果。"""
    positions = sum(len(batch) * (max(batch) if to_longest else max_len) for batch in batches)
    return sum(map(sum, batches)) / positions


def full_rows(vocab: int, batch_size: int, length: int) -> Batch:
    """没有填充的整行随机词元。"""
    ids = torch.randint(3, vocab, (batch_size, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.clone(), "num_tokens": ids.numel()}
