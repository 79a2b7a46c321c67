"""每字节比特数：与分词器无关的语言模型成绩，越低越好。

bpb = Σ 负对数似然(nat) / ln 2 / 文本的 UTF-8 字节数。同一段文字不论切成几个 token，字节数都一样，
所以不同词表的模型可以直接比；每 token 的损失不行。
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from minimind.dataset import PretrainDataset, collate_packed
from minimind.tokenizer import token_byte_lengths
from minimind.trainer.loop import language_model_loss
from minimind.trainer.validation import validate


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
    result = validate(
        model,
        dataset,
        language_model_loss,
        collate_packed,
        batch_size=batch_size,
        device=next(model.parameters()).device,
        byte_lengths=torch.from_numpy(token_byte_lengths(tokenizer)),
        max_rows=max_rows,
    )
    return result["val_bpb"]
