"""数据集的共同部分：打开缓存、划分、拼行，以及拼行方案的存取。"""

from __future__ import annotations

import json
import os
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from minimind.dataset.collate import IGNORE, collate_packed
from minimind.dataset.mixture import MixedCache, open_cache, share_words
from minimind.dataset.packing import Packing, pack_documents
from minimind.dataset.splits import choose
from minimind.dataset.token_cache import TokenCache
from minimind.errors import UserError
from minimind.runtime.files import file_lock, temporary_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# 拼行、截断或划分的规则变了就加一，存着的方案随之作废
PLAN_VERSION = 2
# 文档多于此的方案存进缓存：少的现算只要几十毫秒，不值得占文件
STORED_DOCUMENTS = 100_000


class CachedDataset(Dataset):
    """共同的开头：检查参数、打开缓存、选出这一划分的文档。"""

    kind: str

    def __init__(
        self,
        data_path: str | Path,
        tokenizer: PreTrainedTokenizerFast,
        max_length: int = 512,
        *,
        split: str = "all",
        val_ratio: float = 0.01,
        seed: int = 42,
        on_bad_line: str = "error",
        cache_dir: str | Path | None = None,
        num_workers: int | None = None,
        options: dict[str, Any] | None = None,
    ):
        """
        Args:
            data_path: 数据：一个文件，或几个文件与权重，写法见 :mod:`minimind.dataset.spec`。
            tokenizer: 分词器。
            max_length: 行长（预训练、微调）或样本的最大长度。
            split: ``train``、``val`` 或 ``all``（不划分）。
            val_ratio: 验证集占的比例，另有 20 万 token 的上限；划分只看内容的哈希。
            seed: 拼行的种子。
            on_bad_line: ``error`` 或 ``skip``。
            cache_dir, num_workers, options: 见 :func:`minimind.dataset.cache.build_cache`。
        """
        if max_length < 2:
            raise UserError(
                f"max_seq_len = {max_length}", expected="至少 2", fix="用 --max_seq_len 512 之类的值"
            )
        self.max_length, self.split, self.val_ratio, self.seed = max_length, split, val_ratio, seed
        self.cache: TokenCache | MixedCache = open_cache(
            data_path, self.kind, tokenizer, cache_dir, num_workers, on_bad_line, options
        )
        pad_id = tokenizer.pad_token_id
        self.pad_id: int = tokenizer.eos_token_id if pad_id is None else pad_id

    @property
    def fingerprint(self) -> str:
        """数据的身份：内容、分词器与选行方式都相同，第 i 行才是同一行；续训据此核对。"""
        return f"{self.cache.folder.name}/{self.split}/{self.max_length}/{self.seed}/{self.val_ratio}"

    def mixed(self, records: np.ndarray, unit: int = 1) -> tuple[np.ndarray, list[tuple[str, int, int]]]:
        """可用的记录 → 一轮里用哪些与各组的条数；没有写权重、或是划出的验证集时原样返回，条数为空。

        见 :meth:`minimind.dataset.mixture.MixedCache.mix`。
        """
        if self.split == "val" or not isinstance(self.cache, MixedCache) or not self.cache.weighted:
            return records, []
        return self.cache.mix(records, self.seed, unit)

    def mixture_words(self) -> str:
        """一句话：按权重配出的一轮里各组多少条；没有写权重时为空串。"""
        return share_words(self.stats["shares"]) if self.stats.get("shares") else ""

    def source_names(self, index: int) -> list[str]:
        """第 ``index`` 个样本各来自哪个文件，与 :meth:`source_lines` 一一对应。"""
        return [str(self.cache.origin(doc)[0]) for doc in self.source_docs(index)]

    def source_lines(self, index: int) -> list[int]:
        """第 ``index`` 个样本由源文件的哪几行得来（行号从 1 起），出现 NaN 时报给使用者。"""
        return [self.cache.origin(doc)[1] for doc in self.source_docs(index)]

    def source_docs(self, index: int) -> list[int]:
        """第 ``index`` 个样本由缓存里的哪几篇得来。"""
        raise NotImplementedError

    def lost(self) -> str:
        """一句话：哪些样本丢弃、截断了，各多少；一条也没有时为空串。训练开头说出来，不让内容悄悄不见。"""
        raise NotImplementedError

    def nothing_left(self, dropped: int) -> UserError:
        return UserError(
            f"{self.cache.source} 里没有可用的样本（{dropped:,} 条没有目标，或目标都在第 {self.max_length} 个 token 之后）",
            fix="调大 --max_seq_len",
        )


def lost_words(truncated: int, cut_tokens: int, dropped: int, max_length: int, unit: str) -> str:
    """:meth:`CachedDataset.lost` 的说法，对话与偏好对共用。"""
    words = []
    if truncated:
        words.append(f"{truncated:,} {unit}截到 {max_length} 个 token（后面的 {cut_tokens:,} 个不学）")
    if dropped:
        words.append(f"丢弃 {dropped:,} {unit}（没有目标，或截断后没有目标可学）")
    return "，".join(words)


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
                （:func:`minimind.recipes.data.fill_rows` 自动这样做）。
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
        plan = self._stored_plan()
        if plan is not None:
            return plan
        # 同一台机器上的进程只算一次：一千万篇要十几秒、1 GB 内存，八个进程一起算会撑爆
        lock = self._plan_folder().with_name(f"{self._plan_folder().name}.lock")
        writable = os.access(self.cache.folder, os.W_OK)
        with file_lock(lock) if writable else nullcontext():
            plan = self._stored_plan()
            if plan is None:
                plan = self._make_plan()
                self._store_plan(*plan)
        return plan

    def _plan_folder(self) -> Path:
        name = (
            f"v{PLAN_VERSION}-{self.max_length}-{self.row_length}-{self.split}-{self.val_ratio:g}-{self.seed}"
        )
        return self.cache.folder / "plans" / name

    def _stored_plan(self) -> tuple[Packing, dict[str, Any]] | None:
        folder = self._plan_folder()
        try:
            stats = json.loads((folder / "stats.json").read_text("utf-8"))
            arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in Packing._fields]
        except (OSError, ValueError):
            return None
        return Packing(*(array.view(np.ndarray) for array in arrays)), stats

    def _store_plan(self, packing: Packing, stats: dict[str, Any]) -> None:
        folder = self._plan_folder()
        # 别的进程先存好了，或目录只读、磁盘满：方案可以重算，不存也能训练
        with suppress(OSError), temporary_folder(folder) as temporary:
            for name, array in zip(Packing._fields, packing, strict=True):
                np.save(temporary / f"{name}.npy", array)
            (temporary / "stats.json").write_text(json.dumps(stats), "utf-8")
            os.rename(temporary, folder)
