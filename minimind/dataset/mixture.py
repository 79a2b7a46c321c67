"""几个文件合成一份数据：首尾相接，或按权重精确地配。

权重是**一轮里的条数之比**。N 是各组可用的条数之和（划走验证集、丢掉没有目标的之后），第 k 组每轮用

    c_k = 最大余数法取整的 w_k · N，Σ c_k = N

条，一条不多一条不少。c_k 小于这一组的条数时取一个随机的子集；大于时整组先用若干遍，余下的再取一个子集，
所以同一组里各条用到的次数至多差一。取哪些只由（种子，第几组，条数）决定，与进程数、续训无关；
训练的每一轮用同一批，次序每轮重排（:func:`minimind.trainer.loader.epoch_order`）。

“条”是记录：预训练与微调的文档（拼行之前）、偏好的对、强化学习的提示。一篇长文切成几块仍算一条。
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from minimind.dataset.token_cache import TokenCache
from minimind.errors import UserError


def exact_counts(weights: Sequence[Fraction], total: int) -> list[int]:
    """``total`` 条按权重（和为 1）分给各组，最大余数法：与 w·total 相差不到一条，和恰好是 total。"""
    exact = [weight * total for weight in weights]
    counts = [int(value) for value in exact]
    order = sorted(range(len(weights)), key=lambda k: (counts[k] - exact[k], k))
    for k in order[: total - sum(counts)]:
        counts[k] += 1
    return counts


def draw(size: int, count: int, seed: int, part: int, epoch: int = 0) -> np.ndarray:
    """第 ``part`` 组的第 ``epoch`` 轮用哪些，``int64 [count]``：无放回地抽，用完一遍再来一遍，各轮接着抽。

    把无穷多遍的排列首尾相接，第 e 轮取其中第 ``e·count`` 到 ``(e + 1)·count`` 个。

    Args:
        size: 这一组有多少条。
        count: 一轮用多少条。
    """
    begin, end = epoch * count, (epoch + 1) * count
    pieces = []
    for turn in range(begin // size, -(-end // size)):
        order = np.random.default_rng([seed % 2**64, part, turn]).permutation(size)
        pieces.append(order[max(begin - turn * size, 0) : end - turn * size])
    return np.concatenate(pieces) if pieces else np.zeros(0, np.int64)


class MixedCache:
    """几份缓存接成一份，用法与 :class:`TokenCache` 相同；文档与 token 的编号是接起来之后的。

    Attributes:
        caches: 各文件的缓存。
        parts: ``(名字, 有几个文件, 权重)``，次序与 ``caches`` 相同。
        offsets: 同 :class:`TokenCache`，``int64 [N + 1]``。
    """

    def __init__(self, caches: list[TokenCache], parts: list[tuple[str, int, Fraction | None]]):
        self.caches, self.parts = caches, parts
        self.meta: dict[str, Any] = {"kind": caches[0].meta["kind"]}
        self.dtype = caches[0].dtype
        # 各文件的第一篇、第一个 token 的编号，末尾再加总数
        self.first_doc = np.cumsum([0] + [len(cache) for cache in caches])
        self.first_token = np.cumsum([0] + [int(cache.offsets[-1]) for cache in caches])
        self.offsets = _joined([cache.offsets for cache in caches], self.first_token)
        identity = [[cache.folder.name for cache in caches], [[n, str(w)] for _, n, w in parts]]
        digest = hashlib.blake2b(json.dumps(identity).encode(), digest_size=12).hexdigest()
        self.folder = caches[0].folder.parent.parent / "mixtures" / digest

    def __reduce__(self):
        return MixedCache, (self.caches, self.parts)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def source(self) -> str:
        return "、".join(str(cache.source) for cache in self.caches)

    @property
    def name(self) -> str:
        """说给人听的名字。"""
        names = [cache.name for cache in self.caches]
        return "、".join(names) if len(names) <= 3 else f"{'、'.join(names[:2])} 等 {len(names)} 个文件"

    @functools.cached_property
    def spans(self) -> np.ndarray:
        return np.concatenate([cache.spans for cache in self.caches])

    @functools.cached_property
    def span_offsets(self) -> np.ndarray:
        return _joined(
            [cache.span_offsets for cache in self.caches],
            np.cumsum([0] + [len(cache.spans) for cache in self.caches]),
        )

    @property
    def split_hash(self) -> np.ndarray:
        return np.concatenate([cache.split_hash for cache in self.caches])

    @property
    def lines(self) -> np.ndarray:
        """各篇在自己的文件里的行号；是哪个文件见 :meth:`origin`。"""
        return np.concatenate([cache.lines for cache in self.caches])

    def _owner(self, i: int) -> tuple[TokenCache, int]:
        k = int(np.searchsorted(self.first_doc, i, side="right")) - 1
        return self.caches[k], i - int(self.first_doc[k])

    def tokens(self, begin: int, end: int) -> np.ndarray:
        """接起来的 ``ids[begin:end]``，要落在同一个文件里。"""
        k = int(np.searchsorted(self.first_token, begin, side="right")) - 1
        start = int(self.first_token[k])
        return self.caches[k].tokens(begin - start, end - start)

    def document(self, i: int) -> np.ndarray:
        """第 i 篇的全部 token。"""
        cache, own = self._owner(i)
        return cache.document(own)

    def record(self, i: int) -> dict[str, Any]:
        """第 i 篇的原始记录。"""
        cache, own = self._owner(i)
        return cache.record(own)

    def origin(self, i: int) -> tuple[Path, int]:
        """第 i 篇来自 ``(哪个文件, 第几行)``。"""
        cache, own = self._owner(i)
        return cache.origin(own)

    @property
    def weighted(self) -> bool:
        """有没有写权重。"""
        return self.parts[0][2] is not None

    def mix(
        self, docs: np.ndarray, seed: int, unit: int = 1
    ) -> tuple[np.ndarray, list[tuple[str, int, int]]]:
        """可用的记录 → 一轮里用哪些（可以重复），升序。

        Args:
            docs: 可用的记录，升序。
            unit: 一条记录有几篇（偏好是 2），``docs`` 是记录的编号。

        Returns:
            ``(一轮的记录 int64, [(组名, 可用的条数, 一轮用的条数), …])``。

        Raises:
            UserError: 有一组没有可用的记录，或份额太小、一条也分不到。
        """
        files = np.cumsum([0] + [n for _, n, _ in self.parts])
        bounds = np.searchsorted(docs, self.first_doc[files] // unit)
        counts = exact_counts([weight for *_, weight in self.parts], len(docs))
        chosen, shares = [], []
        for k, ((name, _, weight), count) in enumerate(zip(self.parts, counts, strict=True)):
            own = docs[bounds[k] : bounds[k + 1]]
            if not len(own):
                raise UserError(
                    f"{name} 里没有可用的记录，配不出 {float(weight):g} 的份额", fix="去掉它，或换一个文件"
                )
            if not count:
                raise UserError(
                    f"权重 {float(weight):g} 太小：一轮 {len(docs):,} 条里分不到一条",
                    where=name,
                    fix="调大权重，或去掉这个文件",
                )
            chosen.append(own[draw(len(own), count, seed, k)])
            shares.append((name, len(own), count))
        return np.sort(np.concatenate(chosen)), shares


def _joined(offsets: list[np.ndarray], starts: np.ndarray) -> np.ndarray:
    """各自从 0 起的边界 → 接起来的边界。"""
    return np.concatenate([starts[:1], *(own[1:] + start for own, start in zip(offsets, starts))])


def share_words(shares: list[tuple[str, int, int]]) -> str:
    """一句话：一轮里各组多少条，是取一部分还是用了几遍。"""
    total, words = sum(count for *_, count in shares), []
    for name, size, count in shares:
        times = f"{count / size:.2f}".rstrip("0").rstrip(".")
        how = (
            "各一次"
            if count == size
            else f"取自 {size:,} 条"
            if count < size
            else f"{size:,} 条各约 {times} 次"
        )
        words.append(f"{Path(name).name} {count:,} 条（{count / total:.2%}，{how}）")
    return f"一轮 {total:,} 条：" + "、".join(words)
