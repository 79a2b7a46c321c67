"""请求与引擎线程之间来往的东西：一个请求的凭据、它的信箱、写出的词元。

引擎线程只管 :func:`post`，事件循环只管从各自的 :class:`Mailbox` 里取。
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from minimind.inference.engine import LogitsHook
from minimind.inference.sampling import SamplingParams


class QueueFull(Exception):
    """排队的样本太多。"""


class ShuttingDown(Exception):
    """正在停机，不再接新的。"""


class EngineDown(Exception):
    """引擎坏了：卡住了，或出错之后没能重建。"""


class TokenOut(NamedTuple):
    """写出的一个词元。

    Args:
        logprob: 模型自己的分布下的对数概率（温度 1，惩罚与约束之前）；没要就是 0，没有前文是 nan。
        top: 概率最高的几个 ``(id, 对数概率)``，没要就是空的。
    """

    id: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


class Progress(NamedTuple):
    """一个样本新写出的词元；``finished`` 为 ``"stop"``、``"length"``、``"cancelled"``，还在写是 ``None``。"""

    index: int
    tokens: list[TokenOut]
    finished: str | None
    cached: int = 0  # 提示里没有重算的词元数


class Mailbox:
    """一个请求的信箱：只在事件循环里用，只有一个人取。比 ``asyncio.Queue`` 加 ``wait_for`` 省一个任务与一个定时器。"""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop = loop
        self._items: deque[Any] = deque()
        self._waiter: asyncio.Future | None = None

    def put(self, item: Any) -> None:
        self._items.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> Any:
        """取一件，没有就等。"""
        while not self._items:
            self._waiter = self.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._items.popleft()


@dataclass
class Ticket:
    """一个在途的请求；``events`` 里依次是 :class:`Progress`，或引擎出的错。"""

    prompt: list[int]
    params: SamplingParams
    limit: int
    n: int
    hook: Callable[[], LogitsHook] | None
    top_logprobs: int | None
    events: Mailbox
    processed: bool = False
    score: int | None = None  # 给提示也打分，要几个候选
    scored: list[TokenOut] = field(default_factory=list)  # 第一个进展送到时已经齐了
    request_id: int | None = None
    sent: list[int] = field(default_factory=list)
    open: int = 0  # 还没写完的样本数

    def tell(self, event: Any) -> None:
        """从别的线程送一件；事件循环已经关了就没人要了。"""
        with suppress(RuntimeError):  # 只有循环关了才抛
            self.events.loop.call_soon_threadsafe(self.events.put, event)


def post(events: list[tuple[Ticket, Any]]) -> None:
    """从引擎线程送到各自的事件循环。

    一步的全部事件一次送过去：``call_soon_threadsafe`` 每次都要写一回唤醒管道，32 路就是每步 32 次系统调用。
    """

    def open_all(batch: list[tuple[Ticket, Any]]) -> None:
        for ticket, event in batch:
            ticket.events.put(event)

    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, Any]]] = {}
    for one in events:
        by_loop.setdefault(one[0].events.loop, []).append(one)
    for loop, batch in by_loop.items():
        with suppress(RuntimeError):  # 只有循环关了才抛，那就没人要了
            loop.call_soon_threadsafe(open_all, batch)
