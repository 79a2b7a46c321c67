"""停止串：跨词元也认得出；可能是停止串开头的几个字先扣着，不先漏给客户端。"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """逐段放入文字，返回可以给出去的部分。

    Args:
        stops: 停止串；命中时它自己与之后的文字都不给。
        include: 命中的停止串自己也给。

    Attributes:
        matched: 命中的停止串，还没有是 ``None``。
    """

    def __init__(self, stops: Sequence[str], include: bool = False):
        self.stops, self.include = [stop for stop in stops if stop], include
        self.matched: str | None = None
        self._held = ""

    def push(self, text: str) -> str:
        """放入新文字；命中之后一律返回空串。"""
        if self.matched is not None:
            return ""
        if not self.stops:
            return text
        text = self._held + text
        # 最先写完的那个；同时写完的取最长的。按写完的先后，怎么切开放进来结果才都一样
        found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in self.stops if stop in text]
        if found:
            end, _, self.matched = min(found)
            self._held = ""
            return text[:end] if self.include else text[: end - len(self.matched)]
        keep = max(self._overlap(text, stop) for stop in self.stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """写完了，扣着的文字不是停止串，还给客户端。"""
        held, self._held = self._held, ""
        return "" if self.matched is not None else held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """``text`` 的末尾与 ``stop`` 的开头最多重合几个字（不是整个 ``stop``）。"""
        for size in range(min(len(text), len(stop) - 1), 0, -1):
            if stop.startswith(text[-size:]):
                return size
        return 0
