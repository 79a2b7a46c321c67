"""把样本拼成批。每种批都带 ``cu_seqlens`` 与从零起的 ``position_ids``，模型据此把注意力留在各段之内。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.model.kernels import keep_lengths_on_host

IGNORE = -100
# 批里交给模型前向的键；其余（如 num_tokens）是给训练循环看的，传进去会让 torch.compile 反复重编
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", "cu_seqlens", "max_seqlen")


def model_inputs(batch: Mapping[str, Any], *more: str) -> dict[str, Any]:
    """批里模型前向要的那几样；``more`` 是另外也要的（要模型自己算损失时的 ``labels``）。"""
    return {name: batch[name] for name in (*MODEL_INPUTS, *more) if name in batch}


def boundaries(segments: Sequence[int]) -> dict[str, Any]:
    """各段的长度 → 批里的 ``cu_seqlens`` 与 ``max_seqlen``。"""
    cu_seqlens = np.zeros(len(segments) + 1, dtype=np.int32)
    np.cumsum(segments, out=cu_seqlens[1:])
    return {"cu_seqlens": torch.from_numpy(cu_seqlens), "max_seqlen": max(segments)}


def target_mask(labels: Tensor) -> Tensor:
    """``[B, T]`` bool：位置 t 为真当且仅当它要预测的 ``labels[:, t + 1]`` 是目标。"""
    return F.pad(labels[:, 1:] != IGNORE, (0, 1), value=False)


def target_places(batch: Mapping[str, Any]) -> Tensor:
    """``[N]`` int64：展平后 :func:`target_mask` 为真的位置，升序；:func:`to_device` 已在主机上数好的就用它。"""
    places = batch.get("target_places")
    return target_mask(batch["labels"]).flatten().nonzero().squeeze(1) if places is None else places


def to_device(
    batch: dict[str, Any], device: torch.device, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """张量搬到设备上，其余（如 ``max_seqlen``）原样，算的时候不必再从设备读：没有变长内核的设备上（``dtype`` 是 fp32 时哪张卡
    都没有），段界 ``cu_seqlens`` 留在主机；目标的位置 ``target_places`` 趁标签还在主机上数好，在卡上数要等它算完。"""
    stay = {"cu_seqlens"} if keep_lengths_on_host(device, dtype) else set()
    labels = batch.get("labels")
    if device.type != "cpu" and labels is not None and labels.device.type == "cpu":
        batch = {**batch, "target_places": target_places(batch)}
    return {
        k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) and k not in stay else v
        for k, v in batch.items()
    }


def collate_dpo(items: Sequence[dict[str, Any]], pad_id: int = 0) -> dict[str, Any]:
    """偏好对 → 一批 ``[2B, L]``：前 B 行是 chosen，后 B 行是同样次序的 rejected，L 为这批里最长的一条。

    Returns:
        与 :func:`minimind.dataset.packed.collate_packed` 相同的键，另有 ``num_pairs`` = B。
    """
    rows = [(item[side], item[f"{side}_labels"]) for side in ("chosen", "rejected") for item in items]
    return {**collate_rows(rows, pad_id), "num_pairs": len(items)}


def collate_kto(items: Sequence[dict[str, Any]], pad_id: int = 0) -> dict[str, Any]:
    """不成对的回答 → 一批 ``[2B, L]``：前 B 行是各自的回答，后 B 行是同样次序的、不配对的回答。

    Returns:
        与 :func:`minimind.dataset.packed.collate_packed` 相同的键，另有 ``desirable`` bool ``[B]``。
    """
    rows = [(item[side], item[f"{side}_labels"]) for side in ("answer", "mismatched") for item in items]
    desirable = torch.tensor([item["desirable"] for item in items])
    return {**collate_rows(rows, pad_id), "desirable": desirable}


def collate_rows(rows: Sequence[tuple[torch.Tensor, torch.Tensor]], pad_id: int = 0) -> dict[str, Any]:
    """若干 ``(ids, labels)`` 各占一行，右侧补到最长的一条：``[S, L]``，键同 :func:`minimind.dataset.packed.collate_packed`。"""
    length = max(len(ids) for ids, _ in rows)
    input_ids = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    labels = torch.full((len(rows), length), IGNORE, dtype=torch.int64)
    position_ids = torch.arange(length).repeat(len(rows), 1)
    segments: list[int] = []
    for i, (ids, label) in enumerate(rows):
        n = len(ids)
        input_ids[i, :n], labels[i, :n] = ids, label
        segments.append(n)
        if n < length:
            position_ids[i, n:] = torch.arange(length - n)
            segments.append(length - n)
    return {
        "input_ids": input_ids,
        "labels": labels,
        "position_ids": position_ids,
        **boundaries(segments),
        "num_tokens": sum(len(ids) for ids, _ in rows),
    }


def rows_between(batch: Mapping[str, Any], begin: int, end: int) -> dict[str, Any]:
    """:func:`collate_rows` 的一批里第 ``begin`` 到 ``end - 1`` 行，模型与目标要的那几样。"""
    length, edges = batch["labels"].shape[1], batch["cu_seqlens"]
    inside = (edges >= begin * length) & (edges <= end * length)
    part = {name: batch[name][begin:end] for name in ("input_ids", "labels", "position_ids")}
    return {**part, "cu_seqlens": edges[inside] - begin * length, "max_seqlen": batch["max_seqlen"]}


def collate_rl(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """提示 → 打分要的几列，长 B 的列表：``messages``、``references``、``records``、``lines``、``sources``。

    不拼张量：采样按各自的长度走，一个填充也不要。
    """
    columns = {"messages": "messages", "references": "reference", "records": "record", "lines": "line"}
    columns["sources"] = "source"
    return {name: [item[key] for item in items] for name, key in columns.items()}
