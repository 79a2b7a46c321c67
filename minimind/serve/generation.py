"""一次生成的来龙去脉：排队、计时、客户端走了就取消、超时、用量。"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.requests import Request as HttpRequest

from minimind.errors import UserError
from minimind.inference.engine import Request
from minimind.serve.errors import ApiError
from minimind.serve.metrics import Metrics
from minimind.serve.models import ServedModel
from minimind.serve.tickets import EngineDown, Increment, QueueFull, ShuttingDown, Ticket

log = logging.getLogger("minimind.serve")


@dataclass
class Settings:
    """服务器的限额。

    Args:
        api_key: 要求的密钥；``None`` 不要求。
        request_seconds: 一个请求最多多久。
        max_body: 请求体最多多少字节。
        retry_after: 排满时让客户端过几秒再来。
        reload_dir: 重读权重时读哪个目录；``None`` 没有这个接口。
        host: 监听的地址。
        allowed_hosts: 请求的 ``Host`` 除了本机的名字与 ``host`` 之外还认哪些；有 ``*`` 就都认。
    """

    api_key: str | None = None
    request_seconds: float = 600.0
    max_body: int = 4 << 20
    retry_after: int = 1
    reload_dir: Path | None = None
    host: str = "127.0.0.1"
    allowed_hosts: tuple[str, ...] = ()


@dataclass
class Job:
    """排进引擎的一次生成，与它的计时。"""

    model: ServedModel
    request: Request
    start: float = field(default_factory=time.perf_counter)
    first: float | None = None
    written: int = 0
    cached: int = 0  # 提示里没有重算的词元数


def fit(prompt: list[int], asked: int | None, model: ServedModel, param: str = "messages") -> int:
    """能写多少个词元；没要求就写到上下文用完。``param`` 是提示所在的字段，报错用。

    Raises:
        ApiError: 提示是空的，或已占满上下文（400，写明两个长度）。
    """
    room = model.runner.max_length - len(prompt)
    if not prompt:
        raise ApiError(400, "提示里没有任何词元", param=param)
    if room < 1:
        raise ApiError(
            400,
            f"提示有 {len(prompt)} 个词元，模型的上下文是 {model.runner.max_length} 个，至少要留一个给回答",
            param=param,
            code="context_length_exceeded",
        )
    return room if asked is None else min(asked, room)


def check_ids(ids: Iterable[int], model: ServedModel, param: str = "prompt") -> None:
    """客户端直接给的词元要在词表里；放过去，出错的就是引擎，连累同时在写的所有人。

    Raises:
        ApiError: 有不在词表里的（400）。
    """
    size = model.loaded.model.config.vocab_size
    bad = next((token for token in ids if not 0 <= token < size), None)
    if bad is not None:
        raise ApiError(400, f"词元 {bad} 不在 0 到 {size - 1} 之间", param=param, code="invalid_value")


def submit(job: Job, settings: Settings) -> Ticket:
    """排进引擎。

    Raises:
        ApiError: 排满了（429）或正在停机（503），带 ``Retry-After``。
    """
    runner = job.model.runner
    if (n := job.request.n) > (most := runner.max_slots + runner.max_queue):
        raise ApiError(400, f"一次要 {n} 个样本，服务器至多 {most} 个", param="n")
    try:
        return runner.submit(job.request)
    except QueueFull:
        raise ApiError(
            429, "排队的请求太多，请稍后再试", code="queue_full", retry_after=settings.retry_after
        ) from None
    except ShuttingDown:
        raise stopping(settings) from None
    except EngineDown as error:
        raise engine_error(error) from None


def stopping(settings: Settings) -> ApiError:
    """正在停机的答复。"""
    return ApiError(503, "服务器正在停机", code="shutting_down", retry_after=settings.retry_after)


async def progress_of(
    job: Job, ticket: Ticket, settings: Settings, metrics: Metrics
) -> AsyncIterator[Increment]:
    """依次给出各样本的进展，到全部写完；中途退出（客户端走了、超时、出错）就取消。

    Raises:
        ApiError: 超时（503），或引擎出错（500）。
    """
    model, n, length = job.model, job.request.n, len(job.request.prompt_ids)
    left = n
    metrics.prompt_tokens.inc(length)
    late = ApiError(503, f"超过了 {settings.request_seconds:g} 秒的时限", code="timeout")
    remaining = job.start + settings.request_seconds - time.perf_counter()
    timer = ticket.events.loop.call_later(max(remaining, 0.0), ticket.events.put, late)
    try:
        while left:
            event = await ticket.events.get()
            if isinstance(event, ShuttingDown):
                raise stopping(settings)
            if isinstance(event, Exception):
                raise engine_error(event)
            if event.tokens:
                if job.first is None:
                    job.first = time.perf_counter()
                    metrics.first_token.observe(job.first - job.start)
                    job.cached = event.cached
                    metrics.prompt_reused.inc(event.cached)
                    metrics.prompt_computed.inc(length - event.cached)
                job.written += len(event.tokens)
                metrics.generated_tokens.inc(len(event.tokens))
                metrics.guessed_tokens.inc(event.guessed)
            left -= event.finished is not None
            yield event
    finally:
        timer.cancel()
        if left:
            model.runner.cancel(ticket)
        now = time.perf_counter()
        metrics.duration.observe(now - job.start)
        if job.first is not None and job.written > n:
            metrics.per_token.observe((now - job.first) / (job.written - n) * n)


def engine_error(error: Exception) -> ApiError:
    """引擎里出的错 → 客户端看到的；流式时响应头早已发出，只有 :class:`ApiError` 还能写成一行 ``error``。"""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        return ApiError(400, str(error))
    if isinstance(error, EngineDown):
        return ApiError(503, "引擎坏了，服务器要重启", code="engine_down", retry_after=5)
    log.error("引擎出错", exc_info=error)
    return ApiError(500, "服务器内部错误，详情在服务器的日志里")


@asynccontextmanager
async def until_disconnected(request: HttpRequest) -> AsyncIterator[None]:
    """不流式的请求：客户端走了就取消里面的事（流式的由 Starlette 自己管）。"""
    task = asyncio.current_task()

    async def watch() -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(0.2)
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def usage_of(jobs: Sequence[Job], written: int) -> dict[str, Any]:
    """用量；写出的词元含结束符，没有重算的提示词元另记在 ``cached_tokens``。"""
    prompt_tokens = sum(len(job.request.prompt_ids) for job in jobs)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": written,
        "total_tokens": prompt_tokens + written,
        "prompt_tokens_details": {"cached_tokens": sum(job.cached for job in jobs)},
    }
