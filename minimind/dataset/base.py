"""数据集的共同部分：打开缓存，划出训练集与验证集，配好一轮用哪些记录。划分只看内容的哈希，与种子、进程数、分词器都无关。"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset

from minimind.dataset.cache import open_cache
from minimind.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPLITS = ("train", "val", "all")

# 验证集不超过这么多 token：够把每字节比特数估到千分之几，26M 的模型在两核 CPU 上也只要一分钟左右
VAL_TOKENS = 200_000
# 少于这么多条时不划分：拿走一条就是百分之几的训练数据
MIN_DOCUMENTS = 20


def val_mask(split_hash: np.ndarray, lengths: np.ndarray, val_ratio: float) -> np.ndarray:
    """哪些文档归验证集，``bool [N]``。

    按哈希从小到大取，取到 ``val_ratio`` 的 token 或 :data:`VAL_TOKENS` 为止。哈希相同的（重复的文本、
    同一个提问的几种回答）要么都取要么都不取；很长的一篇不取，免得一本书就是整个验证集。

    Args:
        split_hash: 内容哈希 ``uint64 [N]``。
        lengths: token 数 ``[N]``。
        val_ratio: 验证集占全部 token 的比例；0 表示不划分。
    """
    none = np.zeros(len(lengths), dtype=bool)
    if val_ratio <= 0 or len(lengths) < MIN_DOCUMENTS:
        return none
    total = int(lengths.sum())
    budget = min(val_ratio * total, VAL_TOKENS)
    allowed = lengths <= max(budget / 4, 2 * total / len(lengths))
    # 只给哈希靠前的一小部分排序：均匀分布下四倍预算绰绰有余
    limit = np.uint64(min(4 * budget / total + 100 / len(lengths), 1) * float(2**64 - 2**12))
    candidates = np.flatnonzero((split_hash <= limit) & allowed)
    candidates = candidates[np.argsort(split_hash[candidates], kind="stable")]
    hashes = split_hash[candidates]
    if not len(hashes):
        return none
    taken = int(np.searchsorted(np.cumsum(lengths[candidates]), budget, side="right"))
    # 至少取一组，免得小数据集没有验证集
    taken = max(taken, int(np.searchsorted(hashes, hashes[0], side="right")))
    if taken == len(hashes):
        return allowed & (split_hash <= hashes[-1])
    return allowed & (split_hash < hashes[taken])


def choose(split: str, split_hash: np.ndarray, lengths: np.ndarray, val_ratio: float) -> np.ndarray:
    """``split`` 包含的文档下标，升序 ``int64``。

    Raises:
        ValueError: ``split`` 不在 :data:`SPLITS` 里。
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r}，应为 {' | '.join(SPLITS)}")
    if split == "all":
        return np.arange(len(lengths))
    mask = val_mask(split_hash, lengths, val_ratio)
    return np.flatnonzero(mask if split == "val" else ~mask)


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
        self.cache = open_cache(data_path, self.kind, tokenizer, cache_dir, num_workers, on_bad_line, options)
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
        if self.split == "val" or not self.cache.weighted:
            return records, []
        return self.cache.mix(records, self.seed, unit)

    def mixture_words(self) -> str:
        """一句话：按权重配出的一轮里各组多少条；没有写权重时为空串。"""
        if not self.stats.get("shares"):
            return ""
        from minimind.dataset.mixture import share_words  # 只有一个文件的不必读它

        return share_words(self.stats["shares"])

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


def source_words(dataset: Any, samples: list[int]) -> str:
    """这些样本在源文件的哪些行；数据由几个文件合成时逐个文件说。"""
    places: dict[str, set[int]] = {}
    for sample in samples:
        lines = dataset.source_lines(sample)
        names = dataset.source_names(sample) if hasattr(dataset, "source_names") else [""] * len(lines)
        for name, line in zip(names, lines, strict=True):
            places.setdefault(name, set()).add(line)
    words = []
    for name, lines in sorted(places.items()):
        shown = "、".join(map(str, sorted(lines)[:16])) + (" 行等" if len(lines) > 16 else " 行")
        words.append(f"{name if len(places) > 1 else '源文件'}第 {shown}")
    return "；".join(words)
