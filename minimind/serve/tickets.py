"""请求与引擎线程之间来往的东西：一个请求的凭据、它的信箱、写出的词元与分数、全部在途的一本账。

引擎线程只管 :func:`post`，事件循环只管从各自的 :class:`Mailbox` 里取。
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from minimind.inference.engine import Request
from minimind.inference.engine import Sequence as Sample

log = logging.getLogger("minimind.serve")


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


class Increment(NamedTuple):
    """一个样本新写出的词元；``finished`` 为 ``"stop"``、``"length"``、``"cancelled"``，还在写是 ``None``。"""

    index: int
    tokens: list[TokenOut]
    finished: str | None
    cached: int = 0  # 提示里没有重算的词元数
    guessed: int = 0  # 新写出的里有几个是先猜中的


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
    """一个在途的请求；``events`` 里依次是 :class:`Increment`，或引擎出的错。"""

    request: Request
    events: Mailbox
    scored: list[TokenOut] = field(default_factory=list)  # 提示的分数，第一个进展送到时已经齐了
    request_id: int | None = None  # 引擎里的号码
    sent: list[int] = field(init=False)  # 各样本已经送了几个词元
    guessed: list[int] = field(init=False)  # 其中先猜中的
    open: int = field(init=False)  # 还没写完的样本数

    def __post_init__(self):
        self.sent, self.open = [0] * self.request.n, self.request.n
        self.guessed = [0] * self.request.n

    def take(self, sample: Sample) -> Increment | None:
        """``sample`` 新写出的；没有新的是 ``None``。"""
        start, self.sent[sample.index] = self.sent[sample.index], len(sample.ids)
        tokens = [self._token(sample, at) for at in range(start, len(sample.ids))]
        if self.request.score is not None and tokens and not self.scored:
            self.scored = prompt_scores(sample)
        if not tokens and not sample.finished:
            return None
        guessed = sample.guessed - self.guessed[sample.index]
        self.guessed[sample.index] = sample.guessed
        return Increment(sample.index, tokens, sample.finished, sample.cached, guessed)

    def _token(self, sample: Sample, at: int) -> TokenOut:
        if not sample.top:
            return TokenOut(sample.ids[at])
        logprob, top = sample.top[at]
        return TokenOut(sample.ids[at], sample.logprobs[at] if self.request.processed else logprob, top)

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


def prompt_scores(sample: Sample) -> list[TokenOut]:
    """提示里每个词元在前文之下的对数概率（引擎读提示时顺带算的）；第一个没有前文，记 ``nan``。"""
    first, *rest = sample.prompt_ids
    scored = [TokenOut(token, *score) for token, score in zip(rest, sample.scored, strict=True)]
    return [TokenOut(first, float("nan")), *scored]


class Ledger:
    """一本账：在途的请求、答应了还没做的事；哪个线程里都可以叫。

    Args:
        lock: 与引擎线程共用的锁；查限额与记账要一气做完时，外面先拿着它。
    """

    def __init__(self, lock: threading.Condition):
        self._lock = lock
        self._tickets: dict[int, Ticket] = {}  # 提交了还没写完的，按 id()；排着的、引擎里的都在
        self._promised: set[Future] = set()
        self.samples = 0  # 排队与在写的样本数

    def add(self, ticket: Ticket) -> None:
        """提交了。"""
        self._tickets[id(ticket)] = ticket
        self.samples += ticket.open

    def promise(self, result: Future) -> None:
        """答应了一件事。"""
        self._promised.add(result)
        result.add_done_callback(self._promised.discard)

    def close(self, ticket: Ticket, samples: int) -> None:
        """写完了几个样本。"""
        with self._lock:
            samples = min(samples, ticket.open)
            ticket.open -= samples
            self.samples -= samples
            if ticket.open == 0:
                self._tickets.pop(id(ticket), None)

    def disappoint(self, error: Exception, promises: bool = True) -> None:
        """在途的请求都得到这个错误；``promises`` 为真时，答应了的事也是。"""
        with self._lock:
            tickets = list(self._tickets.values())
            self._tickets.clear()
            for ticket in tickets:
                self.samples -= ticket.open
                ticket.open = 0
            promised = list(self._promised) if promises else []
        try:
            post([(ticket, error) for ticket in tickets])
        except Exception as trouble:  # 一起送不成就一个一个送，不因为一个而全都等着
            log.error("送不出错误，逐个再送", exc_info=trouble)
            for ticket in tickets:
                ticket.tell(error)
        for future in promised:
            with suppress(InvalidStateError):  # 恰好做完了
                future.set_exception(error)
