"""引擎线程：独占一个 :class:`Engine`，把异步的请求排进去，把写出的词元送回各自的请求。

torch 的计算不能放在事件循环里（一步几毫秒到几十毫秒，期间谁也得不到响应），所以引擎在自己的线程里不停地 ``step``；
两边只通过命令队列与 ``call_soon_threadsafe`` 说话。客户端走了就取消，槽位在下一步之前空出来。
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from torch import nn

from minimind.inference.admission import default_chunk
from minimind.inference.engine import Engine, LogitsHook
from minimind.inference.engine import Sequence as Sample
from minimind.inference.sampling import SamplingParams
from minimind.serve.tickets import Mailbox, Progress, QueueFull, ShuttingDown, Ticket, TokenOut, post


def deferred(work: Callable[[], Any]) -> tuple[Callable[[], None], Future]:
    """把一件事变成（在别处执行的函数，取结果的期物）；等的人先走了就不做。"""
    future: Future = Future()

    def run() -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)

    return run, future


class EngineRunner:
    """引擎线程。

    Args:
        model: 已在目标设备上的模型。
        max_slots: 同时写多少个样本。
        max_queue: 另外最多排多少个样本，再多就 :class:`QueueFull`。
        max_length: 提示加回答的上限。
        prefill_chunk: 一步最多读多少个提示位置；0 由设备定。
        prefix_cache_tokens: 前缀库最多存多少个位置；0 不用。
        cuda_graphs: 卡上把一步解码录成图。
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
        cuda_graphs: bool = False,
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
        )
        self.engine = self._new_engine()
        self.max_length = self.engine.max_length
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._tickets: dict[int, Ticket] = {}
        self._when_idle: list[Callable[[], None]] = []  # 等空闲时做的事
        self._held: list[Ticket] = []  # 有这样的事时，新来的先等着
        self._refusing = self._closing = False
        self.in_flight = 0  # 排队与在写的样本数
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    # ---------------------------------------------------------------- 事件循环一侧

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        limit: int,
        *,
        n: int = 1,
        hook: Callable[[], LogitsHook] | None = None,
        top_logprobs: int | None = None,
        processed: bool = False,
    ) -> Ticket:
        """排进队里。

        Args:
            hook: 每个样本一份的干预（约束、偏置、惩罚）。
            top_logprobs: 每个词元要几个候选；``None`` 表示连它自己的对数概率也不要。
            processed: 词元自己的对数概率按抽样时的分布报（温度、惩罚、截断之后），候选的不变。

        Raises:
            QueueFull: 排满了。
            ShuttingDown: 正在停机。
        """
        events = Mailbox(asyncio.get_running_loop())
        ticket = Ticket(list(prompt), params, limit, n, hook, top_logprobs, events, processed)
        ticket.sent, ticket.open = [0] * n, n
        with self._wake:
            if self._refusing or self._closing:
                raise ShuttingDown
            if self.in_flight + n > self.max_slots + self.max_queue:
                raise QueueFull
            self.in_flight += n
            self._commands.append(lambda: self._start(ticket))
            self._wake.notify()
        return ticket

    def cancel(self, ticket: Ticket, index: int | None = None) -> None:
        """不要了：整个请求，或其中第 ``index`` 个样本。"""
        self._command(lambda: self._cancel(ticket, index))

    async def call(self, work: Callable[[], Any]) -> Any:
        """在引擎线程里做一件事（例如给一段提示逐词元打分），不与 ``step`` 抢计算。"""
        run, result = deferred(work)
        self._command(run)
        return await asyncio.wrap_future(result)

    async def when_idle(self, work: Callable[[], Any]) -> Any:
        """等在写的写完，在引擎线程里做一件事（例如换权重），其间新来的等着。"""
        run, result = deferred(work)
        self._command(lambda: self._when_idle.append(run))
        return await asyncio.wrap_future(result)

    def refuse(self) -> None:
        """不再接新的；在写的照写，给提示打分之类的事也照做。"""
        self._refusing = True

    def close(self) -> None:
        """不再接新的，等在写的写完，线程随之结束。"""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def abandon(self) -> None:
        """在写的与排队的都不要了，各得到一个 :class:`ShuttingDown`；信号处理函数里也可以叫。"""
        self._command(lambda: self._drop_all(ShuttingDown()))

    @property
    def idle(self) -> bool:
        return self.in_flight == 0

    def _command(self, work: Callable[[], None]) -> None:
        with self._wake:
            self._commands.append(work)
            self._wake.notify()

    # ---------------------------------------------------------------- 引擎线程一侧

    def _loop(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._commands or self._busy or self._closing)
                commands = list(self._commands)
                self._commands.clear()
                if self._closing and not commands and not self._busy:
                    return
            for command in commands:
                command()
            if self._when_idle and not self.engine.has_unfinished:
                self._run_idle_work()
            if not self.engine.has_unfinished:
                continue
            try:
                done = self.engine.step()
            except Exception as error:
                self._fail(error)
                continue
            self._deliver(done)

    @property
    def _busy(self) -> bool:
        return self.engine.has_unfinished or bool(self._when_idle)

    def _start(self, ticket: Ticket) -> None:
        if ticket.open == 0:  # 还没开始就不要了
            return
        if self._when_idle:
            self._held.append(ticket)
            return
        try:
            ticket.request_id = self.engine.add_request(
                ticket.prompt,
                ticket.params,
                ticket.limit,
                n=ticket.n,
                hook=ticket.hook,
                top_logprobs=ticket.top_logprobs,
            )
        except Exception as error:
            self._finish(ticket, ticket.open)
            post([(ticket, error)])
            return
        self._tickets[ticket.request_id] = ticket

    def _run_idle_work(self) -> None:
        work, self._when_idle = self._when_idle, []
        for run in work:
            run()
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
            start, ticket.sent[sample.index] = ticket.sent[sample.index], len(sample.ids)
            tokens = [self._token(sample, at, ticket.processed) for at in range(start, len(sample.ids))]
            if tokens or sample.finished:
                events.append((ticket, Progress(sample.index, tokens, sample.finished, sample.cached)))
            if sample.finished:
                self._finish(ticket, 1)
        post(events)

    @staticmethod
    def _token(sample: Sample, at: int, processed: bool) -> TokenOut:
        if not sample.top:
            return TokenOut(sample.ids[at])
        logprob, top = sample.top[at]
        return TokenOut(sample.ids[at], sample.logprobs[at] if processed else logprob, top)

    def _finish(self, ticket: Ticket, samples: int) -> None:
        ticket.open -= samples
        with self._wake:
            self.in_flight -= samples
        if ticket.open == 0 and ticket.request_id is not None:
            self._tickets.pop(ticket.request_id, None)

    def _fail(self, error: Exception) -> None:
        """引擎出错：在途的请求都得到这个错误，引擎重新来过，别的请求不受牵连。"""
        self.engine = self._new_engine()
        self._drop_all(error)

    def _drop_all(self, error: Exception) -> None:
        tickets = [*self._tickets.values(), *(ticket for ticket in self._held if ticket.open)]
        for ticket in tickets:
            if ticket.request_id is not None:
                self.engine.cancel(ticket.request_id)
            self._finish(ticket, ticket.open)
        post([(ticket, error) for ticket in tickets])
