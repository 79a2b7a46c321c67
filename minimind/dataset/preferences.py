"""偏好的两个数据集：一好一坏的成对回答（DPO 一族、奖励模型），与标了好坏的单个回答（KTO）。"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minimind.console import say
from minimind.dataset.base import CachedDataset, choose, lost_words
from minimind.dataset.collate import IGNORE, collate_dpo, collate_kto
from minimind.dataset.schema import guess_kind
from minimind.dataset.spec import parse_spec


class DPODataset(CachedDataset):
    """偏好对 ``{"chosen": […], "rejected": […]}``；两边由同一个渲染器渲染，到分歧处为止逐 token 相同。

    目标只有第一个不同的回合起的助手回合：共同的历史是上文，不是要比的回答（见
    :func:`minimind.dataset.encode.shared_history_is_context`）。超过 ``max_length`` 的一边从右截断；
    截断后看不到分歧、或有一边一个目标也不剩的对没有偏好可学，丢弃并计数。

    Attributes:
        stats: pairs 可用的对数、truncated 截断的对数、dropped 丢弃的对数。
        cut_tokens: 留下的对里截掉的 token 数。
    """

    kind = "dpo"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        cache = self.cache
        lengths = np.diff(cache.offsets)
        # 每条记录是相邻的两篇；划分按对，不会一边在训练一边在验证
        pairs = choose(self.split, cache.split_hash[::2], lengths[::2] + lengths[1::2], self.val_ratio)
        overlong = np.maximum(lengths[::2], lengths[1::2])[pairs] > self.max_length
        visible = self._has_targets(2 * pairs) & self._has_targets(2 * pairs + 1)
        for k in np.flatnonzero(overlong & visible):
            visible[k] = self._differs_within(int(pairs[k]))
        self.pairs, shares = self.mixed(pairs[visible], unit=2)
        overlong_used = np.isin(self.pairs, pairs[overlong])
        kept = np.concatenate([2 * self.pairs, 2 * self.pairs + 1])
        self.cut_tokens = int(np.maximum(lengths[kept] - self.max_length, 0).sum())
        if len(pairs) and not len(self.pairs):
            raise self.nothing_left(len(pairs))
        self.num_documents = len(self.pairs)
        self.stats = {
            "pairs": len(self.pairs),
            "truncated": int(overlong_used.sum()),
            "truncated_share": float(overlong_used.sum() / max(len(pairs), 1)),
            "dropped": int((~visible).sum()),
        } | ({"shares": shares} if shares else {})

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """``chosen``、``rejected``：``int64 [n]``；``chosen_labels``、``rejected_labels``：未移位，-100 不是目标。"""
        item: dict[str, Any] = {}
        for offset, side in enumerate(("chosen", "rejected")):
            item[side], item[f"{side}_labels"] = self._labelled(2 * int(self.pairs[index]) + offset)
        return item

    def _labelled(self, doc: int) -> tuple[torch.Tensor, torch.Tensor]:
        """一篇的 ``ids`` 与 ``labels``，截到 ``max_length``。"""
        ids = self.cache.document(doc)[: self.max_length].astype(np.int64)
        labels = np.full(len(ids), IGNORE, dtype=np.int64)
        for begin, end in self._spans(doc):
            labels[begin:end] = ids[begin:end]
        return torch.from_numpy(ids), torch.from_numpy(labels)

    def _spans(self, doc: int) -> list[list[int]]:
        """一篇的目标区间 ``[[begin, end], …]``。"""
        return self.cache.spans[self.cache.span_offsets[doc] : self.cache.span_offsets[doc + 1]].tolist()

    def words(self, index: int) -> tuple[str, str, str]:
        """一对的 ``(提问, 好的回答, 坏的回答)``，给人看的：第一个不同的回合与它前面的那个。"""
        record = self.cache.record(2 * int(self.pairs[index]))
        sides = record["chosen"], record["rejected"]
        at = next(i for i, (a, b) in enumerate(zip(*sides, strict=False)) if a != b)
        said = [sides[0][at - 1] if at else {}, sides[0][at], sides[1][at]]
        question, better, worse = (turn.get("content") or "" for turn in said)
        return question, better, worse

    def lost(self) -> str:
        return lost_words(
            self.stats["truncated"], self.cut_tokens, self.stats["dropped"], self.max_length, "对"
        )

    def _has_targets(self, docs: np.ndarray) -> np.ndarray:
        """哪些篇截断后还有目标，``bool [n]``；第一个不同的回合就是第一段目标。"""
        cache = self.cache
        first = cache.span_offsets[docs]
        found = first < cache.span_offsets[docs + 1]
        found[found] = cache.spans[first[found], 0] < self.max_length
        return found

    def _differs_within(self, pair: int) -> bool:
        """截断后两边还看得出不同。"""
        sides = [self.cache.document(2 * pair + k)[: self.max_length] for k in (0, 1)]
        common = min(map(len, sides))
        return bool((sides[0][:common] != sides[1][:common]).any())

    def source_docs(self, index: int) -> list[int]:
        return [2 * int(self.pairs[index])]

    @property
    def collate(self):
        return partial(collate_dpo, pad_id=self.pad_id)


class KTODataset(DPODataset):
    """标了好坏的回答，不必成对：``{"conversations", "label"}`` 的行，或把偏好对拆成好坏各一条。

    每条另配一个“不配对”的回答：自己的提问接上下一条（提问不同的）的回答，用来估计策略离参考模型多远。
    它在打开时就定下，所以参考值可以先算好，批怎么切也不改变结果。

    Attributes:
        stats: 不成对的是 answers 可用的条数、truncated、dropped；成对的同 :class:`DPODataset`。
        cut_tokens: 留下的里截掉的 token 数。
    """

    def __init__(self, data_path: str | Path, *args, **kwargs):
        self.paired = guess_kind(parse_spec(data_path, "--data_path")[0].files[0]) == "dpo"
        if self.paired:
            super().__init__(data_path, *args, **kwargs)
            self.docs = np.concatenate([2 * self.pairs, 2 * self.pairs + 1])
            self.num_documents = len(self.docs)
        else:
            self.kind = "kto"
            CachedDataset.__init__(self, data_path, *args, **kwargs)
            self._choose_rows()
            self._tell_one_sided()
        self.others = mismatched(self.cache.split_hash[self.docs])

    def _choose_rows(self) -> None:
        lengths = np.diff(self.cache.offsets)
        rows = choose(self.split, self.cache.split_hash, lengths, self.val_ratio)
        usable = rows[self._has_targets(rows)]
        if len(rows) and not len(usable):
            raise self.nothing_left(len(rows))
        self.docs, shares = self.mixed(usable)
        self.num_documents = len(self.docs)
        cut = np.maximum(lengths[self.docs] - self.max_length, 0)
        self.cut_tokens = int(cut.sum())
        self.stats = {
            "answers": len(self.docs),
            "truncated": int((cut > 0).sum()),
            "truncated_share": float((cut > 0).mean()) if len(cut) else 0.0,
            "dropped": len(rows) - len(usable),
        } | ({"shares": shares} if shares else {})

    def _tell_one_sided(self) -> None:
        """只有好的或只有坏的：照样训练，但没有另一边可比，多半是标签列弄错了。"""
        if self.split == "val" or not len(self.docs):
            return
        first = bool(self.cache.record(int(self.docs[0]))["label"])
        if all(bool(self.cache.record(int(doc))["label"]) == first for doc in self.docs[1:]):
            have, lack = ("好", "坏") if first else ("坏", "好")
            say(
                f"留意：{self.cache.name} 的 {len(self.docs):,} 条全是{have}的（label 都是 {'true' if first else 'false'}），"
                f"一条{lack}的也没有，没有另一边可比。检查 label 是不是弄错了。"
            )

    @property
    def fingerprint(self) -> str:
        return f"{super().fingerprint}/不成对"

    def __len__(self) -> int:
        return len(self.docs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """``answer``、``mismatched``：``int64 [n]``，各有 ``_labels``；``desirable``：这个回答好不好。"""
        doc, other = int(self.docs[index]), int(self.docs[self.others[index]])
        answer, labels = self._labelled(doc)
        begin, start = self._spans(doc)[0][0], self._spans(other)[0][0]
        ids, other_labels = (value[start:] for value in self._labelled(other))
        prompt = answer[:begin]
        return {
            "answer": answer,
            "answer_labels": labels,
            "mismatched": torch.cat([prompt, ids])[: self.max_length],
            "mismatched_labels": torch.cat([torch.full_like(prompt, IGNORE), other_labels])[
                : self.max_length
            ],
            "desirable": doc % 2 == 0 if self.paired else self.cache.record(doc)["label"],
        }

    def lost(self) -> str:
        if self.paired:
            return super().lost()
        stats = self.stats
        return lost_words(stats["truncated"], self.cut_tokens, stats["dropped"], self.max_length, "条")

    def source_docs(self, index: int) -> list[int]:
        return [int(self.docs[index])]

    @property
    def collate(self):
        return partial(collate_kto, pad_id=self.pad_id)


def mismatched(prompts: np.ndarray) -> np.ndarray:
    """每条配谁的回答，``int64 [n]``：往后数第一条提问不同的；全是同一个提问时就是下一条。

    Args:
        prompts: 提问的哈希 ``[n]``。
    """
    n = len(prompts)
    change = np.flatnonzero(prompts != np.roll(prompts, -1)) + 1  # 在哪里换了提问，首尾相接
    if not len(change):
        return (np.arange(n) + 1) % max(n, 1)
    following = np.searchsorted(change, np.arange(n), side="right")
    return np.where(following < len(change), change[following % len(change)], change[0]) % n
