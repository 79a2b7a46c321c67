"""训练集与验证集的划分：只看内容的哈希，与种子、进程数、分词器都无关。"""

from __future__ import annotations

import numpy as np

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
