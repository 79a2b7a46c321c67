"""每字节比特数：与分词器无关的语言模型成绩，越低越好。

bpb = Σ 负对数似然(nat) / ln 2 / 文本的 UTF-8 字节数。同一段文字不论切成几个 token，字节数都一样，
所以不同词表的模型可以直接比；每 token 的损失不行。
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from minimind.console import progress
from minimind.dataset import PretrainDataset, SFTDataset, collate_packed
from minimind.dataset.schema import detect_kind
from minimind.dataset.sources import is_data_name
from minimind.errors import UserError
from minimind.tokenizer import token_byte_lengths
from minimind.trainer.recipe import LossResult, count_targets, language_model_loss
from minimind.trainer.validation import count_bytes, validate


def bits_per_byte(
    model: torch.nn.Module,
    tokenizer: Any,
    data_path: str | Path,
    *,
    max_length: int = 512,
    batch_size: int = 16,
    max_rows: int = 0,
) -> float:
    """一个预训练 jsonl（``{"text": …}``）的每字节比特数。

    Args:
        max_length: 每行的 token 数；比训练时长会让模型外推。
        max_rows: 至多用多少行（固定的随机子集）；0 表示全部。
    """
    dataset = PretrainDataset(str(data_path), tokenizer, max_length=max_length, split="all")
    return _measure(model, tokenizer, dataset, batch_size, max_rows)["bpb"]


def text_loss(
    model: torch.nn.Module,
    tokenizer: Any,
    data_path: str | Path,
    *,
    max_length: int = 512,
    batch_size: int = 16,
    max_rows: int = 0,
) -> dict[str, float | int]:
    """任一种文件：``{"text"}`` 数全文，``{"conversations"}`` 只数助手的话，名字不像数据文件的按一整篇纯文本。

    Returns:
        ``{"bpb", "loss"（每 token，nat）, "tokens", "bytes"}``。

    Raises:
        UserError: 文件是空的、不是 UTF-8，或是偏好数据。
    """
    path, options = Path(data_path), {"max_length": max_length, "split": "all"}
    with tempfile.TemporaryDirectory() as folder:
        if not is_data_name(path.name):
            # 纯文本写成一行 jsonl，与别的文件走同一条路；连缓存一起放进临时目录，用完就删
            path = _as_jsonl(path, Path(folder))
            options["cache_dir"] = folder
        kind = detect_kind(path)
        if kind == "dpo":
            raise UserError(
                "偏好数据没有单一的文本可量", where=str(data_path), fix="换一个 text 或 conversations 文件"
            )
        dataset_type = PretrainDataset if kind == "pretrain" else SFTDataset
        dataset = dataset_type(str(path), tokenizer, **options)
        rows = min(len(dataset), max_rows or len(dataset))
        with progress("每字节比特数", total=rows, unit="行") as bar:
            return _measure(model, tokenizer, dataset, batch_size, max_rows, bar.advance)


def _as_jsonl(path: Path, folder: Path) -> Path:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(
            "不是 UTF-8 编码的文本", where=str(path), fix="iconv -f GBK -t UTF-8 原文件 > 新文件"
        ) from None
    if not text.strip():
        raise UserError("文件是空的", where=str(path), expected="一些文字", fix="换一个文件")
    target = folder / "text.jsonl"
    target.write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    return target


def _measure(
    model,
    tokenizer,
    dataset,
    batch_size: int,
    max_rows: int,
    advance: Callable[[int], None] = lambda rows: None,
) -> dict[str, float | int]:
    byte_lengths = torch.from_numpy(token_byte_lengths(tokenizer))
    counted = {"tokens": 0, "bytes": 0}

    def collate(rows):
        advance(len(rows))
        batch = collate_packed(rows)
        counted["tokens"] += int(count_targets(batch))
        counted["bytes"] += int(count_bytes(batch, byte_lengths))
        return batch

    ours = model.config.model_type == "minimind"
    result = validate(
        model,
        dataset,
        language_model_loss if ours else packed_loss,
        collate,
        batch_size=batch_size,
        device=next(model.parameters()).device,
        byte_lengths=byte_lengths,
        max_rows=max_rows,
    )
    return {"bpb": result["val_bpb"], "loss": result["val_loss"], **counted}


def packed_loss(model: torch.nn.Module, batch: dict[str, Any]) -> LossResult:
    """别家结构在打包的批上的损失：它们不认 ``cu_seqlens``，就把“注意力不出文档”写成 4 维掩码。

    Returns:
        目标词元上的负对数似然之和与空的 metrics；与 ``language_model_loss`` 同形。
    """
    ids, labels = batch["input_ids"], batch["labels"]
    places = torch.arange(ids.numel(), device=ids.device)
    document = torch.bucketize(places, batch["cu_seqlens"][1:].long().to(ids.device), right=True).view_as(ids)
    visible = (document.unsqueeze(2) == document.unsqueeze(1)).tril().unsqueeze(1)
    bias = torch.zeros(visible.shape, dtype=model.dtype, device=ids.device)
    bias.masked_fill_(~visible, torch.finfo(model.dtype).min)
    logits = model(
        input_ids=ids, position_ids=batch["position_ids"], attention_mask=bias, use_cache=False
    ).logits
    targets = labels[:, 1:].flatten()
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, reduction="sum", ignore_index=-100)
    return loss, {}
