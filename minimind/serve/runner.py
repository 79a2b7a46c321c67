"""引擎线程：独占一个 :class:`Engine`，把异步的请求排进去，把写出的词元送回各自的请求。

torch 的计算不能放在事件循环里（一步几毫秒到几十毫秒，期间谁也得不到响应），所以引擎在自己的线程里不停地 ``step``；
两边只通过命令队列与 ``call_soon_threadsafe`` 说话。客户端走了就取消，槽位在下一步之前空出来。

哪一处出错（取消、一步、干预、送词元）都一样收场：在途的请求立刻得到这个错误，旧引擎放掉，建一个新的，别的请求不受牵连。
建不起来，或一步过了 ``step_seconds`` 还没走完，就是 :attr:`EngineRunner.trouble`：``/health`` 答 503，
``minimind serve`` 随之退出（退出码 1），由看着它的人重启。
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import Any

from torch import nn

from minimind.inference.admission import default_chunk
from minimind.inference.engine import Engine, Request
from minimind.inference.engine import Sequence as Sample
from minimind.inference.speculative import Drafter
from minimind.serve.recovery import Vacant, deferred, let_go
from minimind.serve.tickets import EngineDown, Ledger, Mailbox, QueueFull, ShuttingDown, Ticket, post

log = logging.getLogger("minimind.serve")

# 一步最多多少秒：正常的一步在一秒之内，慢机器上也只有几秒；卡住的计算打断不了，只能认作坏了
STEP_SECONDS = 120.0


class EngineRunner:
    """引擎线程。

    Args:
        model: 已在目标设备上的模型。
        max_slots: 同时写多少个样本。
        max_queue: 另外最多排多少个样本，再多就 :class:`QueueFull`。
        max_length: 提示加回答的上限。
        prefill_chunk: 一步最多读多少个提示位置；0 由设备定。
        prefix_cache_tokens: 前缀库最多存多少个位置；0 不用。
        cuda_graphs: 卡上把一步解码录成图，核对过才用。
        draft: 造一个猜后面几个词元的人（:mod:`minimind.inference.speculative`）；``None`` 不猜。
        step_seconds: 一步过了这么久还没走完就当它卡住了。
        clock: 看一步走了多久的钟，秒。
    """

    def __init__(
        self,
        model: nn.Module,
        eos_ids: set[int],
        *,
        max_slots: int,
        max_queue: int,
        max_length: int,
        prefill_chunk: int = 0,
        prefix_cache_tokens: int = 16384,
        cuda_graphs: bool = True,
        draft: Callable[[], Drafter] | None = None,
        step_seconds: float = STEP_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.model, self.max_slots, self.max_queue = model, max_slots, max_queue
        self._new_engine = lambda: Engine(
            model,
            eos_ids=eos_ids,
            max_slots=max_slots,
            max_length=max_length,
            prefill_chunk=prefill_chunk or default_chunk(next(model.parameters()).device),
            prefix_cache_tokens=prefix_cache_tokens,
            cuda_graphs=cuda_graphs,
            draft=draft() if draft else None,
        )
        self.engine: Engine | Vacant = self._new_engine()
        self.max_length = self.engine.max_length
        self.step_seconds, self._clock = step_seconds, clock
        self._began: float | None = None  # 这一轮从什么时候开始；闲着是 None
        self._stuck, self._failure = False, None  # 卡住了；或坏在哪里
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._ledger = Ledger(self._wake)
        self._tickets: dict[int, Ticket] = {}  # 引擎里的，按请求号
        self._when_idle: list[Callable[[], None]] = []  # 等空闲时做的事
        self._held: list[Ticket] = []  # 有这样的事时，新来的先等着
        self._pauses: set[object] = set()  # 停着的缘由，见 paused
        self._refusing = self._closing = False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    # ---------------------------------------------------------------- 事件循环一侧

    def submit(self, request: Request) -> Ticket:
        """排进队里。

        Raises:
            QueueFull: 排满了。
            ShuttingDown: 正在停机。
            EngineDown: 引擎坏了。
        """
        ticket = Ticket(request, Mailbox(asyncio.get_running_loop()))
        with self._wake:
            if self._refusing or self._closing:
                raise ShuttingDown
            if trouble := self.trouble:
                raise EngineDown(trouble)
            if self.in_flight + request.n > self.max_slots + self.max_queue:
                raise QueueFull
            self._ledger.add(ticket)
            self._commands.append(lambda: self._start(ticket))
            self._wake.notify()
        return ticket

    def cancel(self, ticket: Ticket, index: int | None = None) -> None:
        """不要了：整个请求，或其中第 ``index`` 个样本。"""
        self._command(lambda: self._cancel(ticket, index))

    async def call(self, work: Callable[[], Any]) -> Any:
        """在引擎线程里做一件事，不与 ``step`` 抢计算。"""
        run, result = deferred(work)
        return await self._promise(run, result)

    async def when_idle(self, work: Callable[[], Any]) -> Any:
        """等在写的写完，在引擎线程里做一件事（例如换权重），其间新来的等着。"""
        run, result = deferred(work)
        return await self._promise(lambda: self._when_idle.append(run), result)

    @contextlib.asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """等在写的写完，停下，直到离开；其间新来的等着。几个引擎共用的权重要换时用。"""
        reason = object()
        try:
            await self.when_idle(lambda: self._pauses.add(reason))
            yield
        finally:
            self._command(lambda: self._go_on(reason))

    async def _promise(self, command: Callable[[], None], result: Future) -> Any:
        with self._wake:
            if trouble := self.trouble:
                raise EngineDown(trouble)
            self._ledger.promise(result)
            self._commands.append(command)
            self._wake.notify()
        return await asyncio.wrap_future(result)

    def refuse(self) -> None:
        """不再接新的；在写的照写，答应了的事也照做。"""
        self._refusing = True

    def close(self) -> None:
        """不再接新的，等在写的写完，线程随之结束。"""
        with self._wake:
            self._closing = True
            self._wake.notify()
        while self._thread.is_alive() and not self.trouble:  # 卡住的等不来；线程是守护的，不妨碍退出
            self._thread.join(0.2)

    def abandon(self) -> None:
        """在写的与排队的都不要了，各得到一个 :class:`ShuttingDown`；信号处理函数里也可以叫。"""
        self._command(lambda: self._drop_all(ShuttingDown()))

    @property
    def in_flight(self) -> int:
        """排队与在写的样本数。"""
        return self._ledger.samples

    @property
    def idle(self) -> bool:
        return self.in_flight == 0

    @property
    def trouble(self) -> str | None:
        """引擎坏在哪里；好好的就是 ``None``。卡住的一步后来走完了，引擎换新，也就好了。"""
        if self._failure is not None:
            return self._failure
        began = self._began
        if self._stuck or (began is not None and self._clock() - began > self.step_seconds):
            return f"引擎的一步过了 {self.step_seconds:g} 秒还没走完"
        if not self._thread.is_alive() and not self._closing:
            return "引擎线程没了"
        return None

    def watch(self) -> None:
        """隔一会儿叫一次：坏了就让在途的请求立刻得到错误，不必等到各自的时限。"""
        trouble = self.trouble
        if trouble is None:
            return
        with self._wake:
            if self._failure is None and not self._stuck:
                log.error("%s", trouble)
                self._stuck = self._thread.is_alive()
                self._failure = None if self._stuck else trouble
                self._wake.notify()  # 若恰好走完了，线程在等
        self._ledger.disappoint(EngineDown(trouble))

    def _command(self, work: Callable[[], None]) -> None:
        with self._wake:
            self._commands.append(work)
            self._wake.notify()

    # ---------------------------------------------------------------- 引擎线程一侧

    def _loop(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as error:  # 收场的时候又出了错：建不起新引擎
            self._failure = f"引擎出错之后没能重建（{type(error).__name__}: {error}）"
            log.critical("%s", self._failure, exc_info=error)
            let_go(error)
            self._ledger.disappoint(EngineDown(self._failure))

    def _turn(self) -> bool:
        """做完排着的命令，再走一步；要停了返回假。"""
        with self._wake:
            self._began = None
            self._wake.wait_for(lambda: self._commands or self._busy or self._ending or self._stuck)
            if self._ending and not self._commands and not self._busy:
                return False
            commands, self._commands = self._commands, deque()
            self._began = self._clock()
        try:
            while commands:
                commands.popleft()()
            if self._when_idle and not self.engine.has_unfinished:
                self._run_idle_work()
            if self.engine.has_unfinished:
                self._deliver(self.engine.step())
        except BaseException as error:  # 也接 SystemExit 之类：线程没了，谁都得不到答复
            self._fail(error, commands)
            return True
        if self._stuck:  # 走是走完了，在途的都已经答了错误
            self._fail(EngineDown("引擎的一步太久"), commands)
        return True

    @property
    def _busy(self) -> bool:
        return self.engine.has_unfinished or bool(self._when_idle)

    @property
    def _ending(self) -> bool:
        return self._closing and not self._held

    def _start(self, ticket: Ticket) -> None:
        if ticket.open == 0:  # 还没开始就不要了
            return
        if self._when_idle or self._pauses:
            self._held.append(ticket)
            return
        try:
            ticket.request_id = self.engine.add(ticket.request)
        except Exception as error:
            self._finish(ticket, ticket.open)
            post([(ticket, error)])
            return
        self._tickets[ticket.request_id] = ticket

    def _run_idle_work(self) -> None:
        work, self._when_idle = self._when_idle, []
        for run in work:
            run()
        self._release_held()

    def _go_on(self, reason: object) -> None:
        self._pauses.discard(reason)
        self._release_held()

    def _release_held(self) -> None:
        if self._when_idle or self._pauses:
            return
        held, self._held = self._held, []
        for ticket in held:
            self._start(ticket)

    def _cancel(self, ticket: Ticket, index: int | None) -> None:
        if ticket.request_id is None:
            if index is None:
                self._finish(ticket, ticket.open)
        elif self._tickets.get(ticket.request_id) is ticket:  # 引擎换新之后号码会重来
            self.engine.cancel(ticket.request_id, index)

    def _deliver(self, done: list[Sample]) -> None:
        """新写出的词元送给各自的请求。"""
        events: list[tuple[Ticket, Any]] = []
        for sample in [*done, *self.engine.running]:
            ticket = self._tickets.get(sample.request_id)
            if ticket is None:
                continue
            if progress := ticket.take(sample):
                events.append((ticket, progress))
            if sample.finished:
                self._finish(ticket, 1)
        post(events)

    def _finish(self, ticket: Ticket, samples: int) -> None:
        self._ledger.close(ticket, samples)
        if ticket.open == 0 and ticket.request_id is not None:
            self._tickets.pop(ticket.request_id, None)

    def _fail(self, error: BaseException, rest: deque[Callable[[], None]]) -> None:
        """引擎出错：在途的请求都得到这个错误，引擎重新来过，别的请求不受牵连。

        先放掉旧的再建新的：缘由是内存不够时，两个一起放不下。``rest`` 是这一轮还没做的命令，照做。
        """
        log.error("引擎出错，重新来过", exc_info=error)
        let_go(error)
        self.engine = Vacant()
        shown = error if isinstance(error, Exception) else EngineDown(repr(error))
        self._ledger.disappoint(shown, promises=False)
        self._tickets.clear()
        self._held.clear()
        gc.collect()  # 前缀库的树是环
        self.engine = self._new_engine()
        self._stuck = False
        with self._wake:
            self._commands.extendleft(reversed(rest))

    def _drop_all(self, error: Exception) -> None:
        """在途的都不要了；引擎里的也停掉。"""
        for ticket in list(self._tickets.values()):
            self.engine.cancel(ticket.request_id)
        self._ledger.disappoint(error, promises=False)
