"""只靠公开的 ``forward`` 接口的解码器：慢，但什么结构都能跑。"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class ForwardDecoder:
    """只靠 ``forward(input_ids, 缓存, use_cache)`` 的解码器（缓存叫什么随 transformers 的版本）：每行一个 transformers 自己的缓存，逐行算。"""

    shareable = False  # 缓存里是什么由模型定（滑动窗口、状态空间），未必能截取

    def __init__(self, model: nn.Module, max_slots: int):
        self.model = model
        self.device = next(model.parameters()).device
        self.caches: list[Any] = [None] * max_slots

    def refresh(self) -> None:
        """每步都直接用模型的权重，没有要更新的。"""

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        slots: list[int],
        starts: list[int] | None = None,
        watch: dict[int, Callable[[Tensor], None]] | None = None,
    ) -> Tensor:
        """见 :meth:`minimind.inference.decoder.FusedDecoder.prefill`。"""
        last = []
        for i, (ids, slot, start) in enumerate(zip(prompts, slots, starts or [0] * len(prompts))):
            logits = self._forward(list(ids), self.caches[slot] if start else None, slot)
            if watch and i in watch:
                watch[i](logits[0])
            last.append(logits[:, -1])
        return torch.cat(last)

    def decode(self, tokens: Tensor, positions: Tensor, lengths: Sequence[int]) -> Tensor:
        """见 :meth:`minimind.inference.decoder.FusedDecoder.decode`。"""
        ids = tokens.tolist()
        rows = [self._forward([token], self.caches[slot], slot) for slot, token in enumerate(ids)]
        return torch.cat(rows)[:, -1]

    def open(self, slot: int, length: int, alone: bool = False) -> None:
        """缓存由模型自己长。"""

    def free(self, slots: list[int]) -> None:
        """见 :meth:`minimind.inference.decoder.FusedDecoder.free`。"""
        for slot in slots:
            self.caches[slot] = None

    def copy(self, source: list[int], target: list[int], length: int) -> None:
        for a, b in zip(source, target):
            self.caches[b] = copy.deepcopy(self.caches[a])

    def move(self, source: list[int], target: list[int], length: int) -> None:
        for a, b in zip(source, target):
            self.caches[b], self.caches[a] = self.caches[a], None

    def keep(self, slot: int, length: int) -> Any:
        return copy.deepcopy(self.caches[slot])

    def restore(self, kept: Any, slots: list[int]) -> None:
        for slot in slots:
            self.caches[slot] = copy.deepcopy(kept)

    def _forward(self, ids: list[int], cache: Any, slot: int) -> Tensor:
        from minimind.model.hf import step_with_cache  # 别家的模型来了才用到

        input_ids = torch.tensor([ids], device=self.device)
        logits, self.caches[slot] = step_with_cache(self.model, input_ids, cache)
        return logits
