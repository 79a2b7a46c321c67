"""打包的数据集：若干文档拼成一行，预训练与监督微调都用它；``ds[i]`` 是一行。

取样本只切缓存，不分词、不查找；拼行方案、掩码、划分都在打开时按数组算好。
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minimind.dataset.base import CachedDataset, choose, lost_words
from minimind.dataset.collate import IGNORE, boundaries
from minimind.dataset.packing import Packing, pack_documents, trim_to_turns
from minimind.dataset.token_cache import read_plan, write_plan
from minimind.errors import UserError
from minimind.runtime.files import file_lock

# 拼行、截断或划分的规则变了就加一，存着的方案随之作废
PLAN_VERSION = 2
# 文档多于此的方案存进缓存：少的现算只要几十毫秒，不值得占文件
STORED_DOCUMENTS = 100_000


def collate_packed(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """打包行 → 一批。

    Returns:
        ``input_ids``、``labels``、``position_ids``：``int64 [B, T]``；labels 未移位，-100 不是目标，
        每段的第一个 token 总是 -100，所以没有目标跨文档。
        ``cu_seqlens``：``int32 [n + 1]``，各段在展平的 ``B·T`` 个位置里的边界，末尾的填充自成一段。
        ``max_seqlen``：最长的一段（Python int）。
        ``num_tokens``：非填充位置数（Python int），算有效吞吐用。
    """
    segments = [length for row in rows for length in row["seg_lens"]]
    batch = {
        name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels", "position_ids")
    }
    batch.update(boundaries(segments), num_tokens=sum(row["num_tokens"] for row in rows))
    return batch


class PackedDataset(CachedDataset):
    """若干文档拼成一行的数据集；``ds[i]`` 是一行。

    Attributes:
        num_documents: 用到的文档数。
        stats: documents 文档数、rows 行数、tokens 装进行里的 token 数、targets 目标数、
            padding_share 填充占比、truncated 截断的文档数、truncated_share 其占比、
            dropped 没有目标（全被截掉，或都标着不学）而丢弃的文档数、cut_tokens 截断处之后的 token 数、
            split_documents 被切成几块的文档数。
    """

    splittable: bool

    def __init__(self, *args, row_length: int | None = None, **kwargs):
        """
        Args:
            row_length: 行长 R，默认等于 ``max_length``。对话切不开，长度都略过半行时填充可达 7 %（例如
                reason 数据在 340）；行长取几倍、批大小除以同样的倍数，位置数不变而填充不到 2 %
                （:func:`minimind.recipes.entry.fill_rows` 自动这样做）。
        """
        super().__init__(*args, **kwargs)
        self.row_length = row_length or self.max_length
        if self.row_length < self.max_length:
            raise UserError(f"行长 {self.row_length} 小于样本的最大长度 {self.max_length}")
        self.packing, self.stats = self._load_or_make_plan()
        self.num_documents: int = self.stats["documents"]
        self._positions = np.arange(self.row_length)

    def __len__(self) -> int:
        return len(self.packing.row_offsets) - 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        """一行：``input_ids``、``labels``、``position_ids`` 各 ``int64 [R]``，``seg_lens`` 各段长度之和为 R
        （末尾的填充自成一段），``num_tokens`` 非填充的位置数。"""
        first, last = self._segments(index)
        ids = np.full(self.row_length, self.pad_id, dtype=np.int64)
        labels = np.full(self.row_length, IGNORE, dtype=np.int64)
        positions = np.empty(self.row_length, dtype=np.int64)
        at, seg_lens = 0, []
        for s in range(first, last):
            doc, begin = int(self.packing.doc[s]), int(self.packing.begin[s])
            n = int(self.packing.length[s])
            start = int(self.cache.offsets[doc]) + begin
            ids[at : at + n] = self.cache.tokens(start, start + n)
            self._label(labels[at : at + n], ids[at : at + n], doc)
            positions[at : at + n] = self._positions[:n]
            seg_lens.append(n)
            at += n
        if at < self.row_length:
            positions[at:] = self._positions[: self.row_length - at]
            seg_lens.append(self.row_length - at)
        return {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(positions),
            "seg_lens": seg_lens,
            "num_tokens": at,
        }

    def _segments(self, index: int) -> tuple[int, int]:
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"第 {index} 行，共 {len(self)} 行")
        return int(self.packing.row_offsets[index]), int(self.packing.row_offsets[index + 1])

    def _label(self, labels: np.ndarray, ids: np.ndarray, doc: int) -> None:
        """把一段里的目标写进 ``labels``（原来全是 -100）；第一个 token 没有上文，永远不是目标。"""
        raise NotImplementedError

    def source_docs(self, index: int) -> list[int]:
        first, last = self._segments(index)
        return self.packing.doc[first:last].tolist()

    collate = staticmethod(collate_packed)

    def _kept_lengths(self, docs: np.ndarray) -> np.ndarray:
        """每篇装进行里的 token 数；0 表示丢弃。``docs`` 升序、不重复。"""
        raise NotImplementedError

    def _count_targets(self, docs: np.ndarray, kept: np.ndarray) -> int:
        """这些篇的目标数；按权重配的数据里，同一篇可以出现几次。"""
        raise NotImplementedError

    def _make_plan(self) -> tuple[Packing, dict[str, Any]]:
        cache = self.cache
        lengths = np.diff(cache.offsets)
        docs = choose(self.split, cache.split_hash, lengths, self.val_ratio)
        kept = self._kept_lengths(docs)
        dropped = int((kept == 0).sum())
        if len(docs) and dropped == len(docs):
            raise self.nothing_left(len(docs))
        usable = docs[kept > 0]
        drawn, shares = self.mixed(usable)
        if shares:  # 份额按可用的文档算，丢弃的不占
            docs, kept = drawn, kept[kept > 0][np.searchsorted(usable, drawn)]
        packing = pack_documents(kept, self.max_length, self.seed, self.splittable, self.row_length)
        pieces = np.bincount(packing.doc)
        packing = packing._replace(doc=docs[packing.doc])
        used = kept > 0
        overlong = (lengths[docs] > self.max_length) & used
        tokens = int(packing.length.sum())
        stats = {
            "documents": int(used.sum()),
            "rows": len(packing.row_offsets) - 1,
            "tokens": tokens,
            "targets": self._count_targets(docs, kept),
            "padding_share": packing.padding_share(self.row_length),
            "truncated": 0 if self.splittable else int(overlong.sum()),
            "truncated_share": 0.0 if self.splittable else float(overlong.sum() / max(len(docs), 1)),
            "dropped": dropped,
            "cut_tokens": 0 if self.splittable else int((lengths[docs] - kept)[overlong].sum()),
            "split_documents": int((pieces > 1).sum()),
        }
        if shares:
            stats["shares"] = shares
        return packing, stats

    def summary(self) -> str:
        """一行中文，说清样本数、填充与截断。"""
        s = self.stats
        text = (
            f"{s['documents']:,} 条 → {s['rows']:,} 行 × {self.row_length}，"
            f"{s['targets'] / 1e6:.2f} M 个目标，填充 {s['padding_share']:.2%}"
        )
        if s["truncated"]:
            text += f"，截断 {s['truncated_share']:.1%}"
        if s["dropped"]:
            text += f"，丢弃 {s['dropped']:,} 条（没有目标，或目标全在截断之后）"
        return text

    def lost(self) -> str:
        s = self.stats
        return lost_words(s["truncated"], s["cut_tokens"], s["dropped"], self.max_length, "条")

    # ---- 方案存在缓存旁边：语料再大，第二次启动也不用重算 ----

    def _load_or_make_plan(self) -> tuple[Packing, dict[str, Any]]:
        if len(self.cache) < STORED_DOCUMENTS:
            return self._make_plan()
        with suppress(OSError):  # 几个文件合成的没有自己的缓存文件夹；建不了就现算
            self.cache.folder.mkdir(parents=True, exist_ok=True)
        folder = self._plan_folder()
        plan = read_plan(folder)
        if plan is not None:
            return plan
        # 同一台机器上的进程只算一次：一千万篇要十几秒、1 GB 内存，八个进程一起算会撑爆
        lock = folder.with_name(f"{folder.name}.lock")
        writable = os.access(self.cache.folder, os.W_OK)
        with file_lock(lock) if writable else nullcontext():
            plan = read_plan(folder)
            if plan is None:
                plan = self._make_plan()
                write_plan(folder, *plan)
        return plan

    def _plan_folder(self) -> Path:
        name = (
            f"v{PLAN_VERSION}-{self.max_length}-{self.row_length}-{self.split}-{self.val_ratio:g}-{self.seed}"
        )
        return self.cache.folder / "plans" / name


class PretrainDataset(PackedDataset):
    """预训练文本 ``{"text": …}``。长文档切块而不是截断：相邻块重叠一个 token，每个 token 恰好当一次目标。"""

    kind, splittable = "pretrain", True

    def _label(self, labels, ids, doc):
        labels[1:] = ids[1:]

    def _kept_lengths(self, docs):
        return np.diff(self.cache.offsets)[docs]

    def _count_targets(self, docs, kept):
        return int((kept - 1).sum())


class SFTDataset(PackedDataset):
    """对话 ``{"conversations": […]}``；只学助手的回合（含结束符）。

    超长的对话留下完整的前几个回合；第一个回答就放不下时截断它，结束符不在其中。
    """

    kind, splittable = "sft", False

    def _label(self, labels, ids, doc):
        spans = self.cache.spans[self.cache.span_offsets[doc] : self.cache.span_offsets[doc + 1]]
        for begin, end in spans.tolist():
            labels[begin:end] = ids[begin:end]  # 超出截断处的部分，切片自然为空

    def _kept_lengths(self, docs):
        cache = self.cache
        kept = trim_to_turns(np.diff(cache.offsets), cache.spans, cache.span_offsets, self.max_length)
        return kept[docs]

    def _count_targets(self, docs, kept):
        cache = self.cache
        limit = np.zeros(len(cache), dtype=np.int64)
        limit[docs] = kept
        doc = np.repeat(np.arange(len(cache)), np.diff(cache.span_offsets))
        ends = np.minimum(cache.spans[:, 1], limit[doc])
        times = np.bincount(docs, minlength=len(cache))[doc]
        return int((np.maximum(ends - cache.spans[:, 0], 0) * times).sum())
