"""前缀库：读过的提示与写过的回答的 KV 按块存着，后来的请求开头相同的部分不再算。

一个位置的 K、V 只由它和它之前的 token 决定，所以开头逐个相同的两个请求可以共用。按 ``BLOCK`` 个 token 一块存成
一棵树：从根走到一块，路上的 token 就是它的前文；不同对话的同一个系统提示只存一份。键是 token 本身，不是散列，
不会认错。放不下时先丢最久没用的一块；父块总比子块新，所以丢的总是叶子，留下的块前文都在。
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

# 一块多少个 token：平均浪费半块的重算（26M 单线程约 2 ms），再小则抄写的次数多
BLOCK = 16


class _Node:
    """树上的一块。"""

    __slots__ = ("children", "kv", "parent", "tokens")

    def __init__(self, parent: _Node | None, tokens: tuple[int, ...], kv: Tensor | None):
        self.parent, self.tokens, self.kv = parent, tokens, kv
        self.children: dict[tuple[int, ...], _Node] = {}


class PrefixStore:
    """有上限的前缀库。

    Args:
        max_tokens: 最多存多少个位置，按整块向下取；每个位置占
            ``2 × 层数 × 键值头 × head_dim`` 个数（26M 的 fp32 是 8 KB）。
    """

    def __init__(self, max_tokens: int):
        self.max_blocks = max_tokens // BLOCK
        self._root = _Node(None, (), None)
        self._recent: OrderedDict[_Node, None] = OrderedDict()  # 从最久没用到刚用过

    def __len__(self) -> int:
        """存着多少个位置。"""
        return len(self._recent) * BLOCK

    def match(self, ids: Sequence[int]) -> tuple[int, Tensor | None]:
        """与 ``ids`` 的开头相同的最长一段。

        Returns:
            位置数与它们的 K、V ``[层, 2·键值头, 位置, head_dim]``；一块也没有时是 ``(0, None)``。
        """
        path = self._path(ids)
        self._touch(path)
        if not path:
            return 0, None
        return len(path) * BLOCK, torch.cat([node.kv for node in path], dim=2)

    def reach(self, ids: Sequence[int]) -> int:
        """:meth:`match` 会给出多少个位置；不抄，也不算用过。"""
        return len(self._path(ids)) * BLOCK

    def _path(self, ids: Sequence[int]) -> list[_Node]:
        path, node = [], self._root
        for tokens in _blocks(ids):
            node = node.children.get(tokens)
            if node is None:
                break
            path.append(node)
        return path

    def insert(self, ids: Sequence[int], copy: Callable[[int, int], Tensor]) -> None:
        """存下 ``ids`` 的各个整块，已有的不重存。

        Args:
            copy: 给出位置 ``[start, stop)`` 的 K、V 的一份拷贝。
        """
        path, node = [], self._root
        for index, tokens in enumerate(_blocks(ids)):
            if index == self.max_blocks:
                break
            child = node.children.get(tokens)
            if child is None:
                child = _Node(node, tokens, copy(index * BLOCK, (index + 1) * BLOCK))
                node.children[tokens] = child
            path.append(child)
            node = child
        self._touch(path)
        while len(self._recent) > self.max_blocks:
            oldest, _ = self._recent.popitem(last=False)
            del oldest.parent.children[oldest.tokens]

    def clear(self) -> None:
        """全部丢掉。"""
        self._root.children.clear()
        self._recent.clear()

    def _touch(self, path: list[_Node]) -> None:
        """刚用过；从深到浅，父块就比子块新。"""
        for node in reversed(path):
            self._recent[node] = None
            self._recent.move_to_end(node)


def _blocks(ids: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """各个整块。"""
    for start in range(0, len(ids) - BLOCK + 1, BLOCK):
        yield tuple(ids[start : start + BLOCK])
