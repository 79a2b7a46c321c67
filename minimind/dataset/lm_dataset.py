"""五个数据集的名字都能从这里取；强化学习提示的一个写在这里，预训练与微调的在 :mod:`minimind.dataset.packed`，
偏好的两个在 :mod:`minimind.dataset.preferences`。
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from minimind.dataset.base import CachedDataset, choose
from minimind.dataset.collate import collate_dpo, collate_rl
from minimind.dataset.conversation import split_prompt
from minimind.dataset.jsonl import short
from minimind.dataset.packed import PretrainDataset, SFTDataset, collate_packed
from minimind.dataset.preferences import DPODataset, KTODataset
from minimind.dataset.token_cache import TokenCache
from minimind.errors import UserError

# 看参考答案的分布抽这么多条：够认出占位的词，不必为它把整个文件再解析一遍
SAMPLED_REFERENCES = 2000
# 少于这么多条相同不算“大多相同”：几行的小文件说明不了什么
MIN_SAME_REFERENCES = 5


class RLAIFDataset(CachedDataset):
    """强化学习的提示 ``{"conversations": […]}``；末尾的助手回合是参考答案，可以为空或没有。

    提示含助手回合的开头，直接可以续写。超过 ``max_length`` 的提示丢弃并计数：从右截掉会丢助手的开头，
    从左截掉会丢系统提示与角色标记，两种都让模型对着残缺的结构作答。

    Args:
        enable_thinking: 生成提示里的思考开关，见 :func:`minimind.tokenizer.encode_chat`。

    Attributes:
        stats: prompts 可用的提示数、dropped 丢弃的提示数。
    """

    kind = "rl"

    def __init__(self, *args, enable_thinking: bool | None = None, **kwargs):
        super().__init__(*args, options={"enable_thinking": enable_thinking}, **kwargs)
        lengths = np.diff(self.cache.offsets)
        docs = choose(self.split, self.cache.split_hash, lengths, self.val_ratio)
        fitting = docs[lengths[docs] <= self.max_length]
        self.docs, shares = self.mixed(fitting) if len(fitting) else (fitting, [])
        if len(docs) and not len(self.docs):
            raise UserError(
                f"{self.cache.source} 的提示都超过 {self.max_length} 个 token（最短 {lengths[docs].min()}）",
                fix=f"用 --max_seq_len {int(np.percentile(lengths[docs], 99))} 可以留下 99 % 的提示",
            )
        self.num_documents = len(self.docs)
        self.stats = {"prompts": len(self.docs), "dropped": len(docs) - len(fitting)}
        self.stats |= {"shares": shares} if shares else {}

    def lost(self) -> str:
        dropped = self.stats["dropped"]
        return f"丢弃 {dropped:,} 个超过 {self.max_length} 个 token 的提示" if dropped else ""

    def reference_warning(self) -> str:
        """一句话：没有参考答案的提示有多少，多数参考答案是不是同一个；没有可说的时为空串。

        一份文件的参考答案大多是同一个词，几乎总是占位：照着它给分，会教模型只说这一个词。
        """
        counts = reference_counts(self.cache, self.docs)
        total, words = counts.total(), []
        if empty := counts.pop("", 0):
            words.append(
                f"{empty / total:.1%} 的提示没有参考答案（空的或占位的），按参考答案判分的奖励用不了它们"
            )
        if counts:
            answer, count = counts.most_common(1)[0]
            if count >= MIN_SAME_REFERENCES and count > total / 2:
                words.append(
                    f"{count / total:.1%} 的参考答案都是 {short(answer)}，若是占位，请换成空的；照着它给分会教模型只说这一句"
                )
        return "；".join(words)

    def __len__(self) -> int:
        return len(self.docs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """``prompt_ids``：``int64 [n]``；``messages`` 提示消息；``reference`` 参考答案，没有时为空串；
        ``record`` 原始记录（可能另有字段）；``line`` 行号，``source`` 哪个文件。"""
        doc = int(self.docs[index])
        record = self.cache.record(doc)
        messages, reference = split_prompt(record["conversations"])
        source, line = self.cache.origin(doc)
        return {
            "prompt_ids": torch.from_numpy(self.cache.document(doc).astype(np.int64)),
            "messages": messages,
            "reference": reference,
            "record": record,
            "line": line,
            "source": str(source),
        }

    def source_docs(self, index: int) -> list[int]:
        return [int(self.docs[index])]

    @property
    def collate(self):
        return collate_rl


def reference_counts(cache: TokenCache, docs: np.ndarray) -> Counter[str]:
    """均匀抽至多 :data:`SAMPLED_REFERENCES` 条提示，数各种参考答案；空的与占位的都记在 ``""`` 下。"""
    picked = docs[np.unique(np.linspace(0, len(docs) - 1, min(SAMPLED_REFERENCES, len(docs))).astype(int))]
    return Counter(split_prompt(cache.record(int(i))["conversations"])[1] for i in picked)


DATASETS: dict[str, type[CachedDataset]] = {
    "pretrain": PretrainDataset,
    "sft": SFTDataset,
    "dpo": DPODataset,
    "kto": KTODataset,
    "rl": RLAIFDataset,
}

__all__: Sequence[str] = (
    "DATASETS",
    "DPODataset",
    "KTODataset",
    "PretrainDataset",
    "RLAIFDataset",
    "SFTDataset",
    "collate_dpo",
    "collate_packed",
    "collate_rl",
)
