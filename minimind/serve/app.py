"""OpenAI 兼容的服务：路由、鉴权、限额、生命周期。"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from minimind.errors import UserError
from minimind.serve.chat import ChatAnswer, encode_messages
from minimind.serve.completions import TextAnswer
from minimind.serve.errors import ApiError, install_handlers
from minimind.serve.generation import Settings, check_ids, submit, until_disconnected
from minimind.serve.guard import Guard
from minimind.serve.metrics import Metrics
from minimind.serve.models import ModelTable, ServedModel
from minimind.serve.pages import STATIC, PageFiles, index
from minimind.serve.reload import add_reload
from minimind.serve.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    ignored_fields,
)
from minimind.tokenizer import document_start, encode_plain

log = logging.getLogger("minimind.serve")

IGNORED_HEADER = "X-MiniMind-Ignored-Fields"
MAX_NAMES = 20  # 头里最多列几个不起作用的字段；日志里记过的最多记几百个
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def create_app(
    load: Callable[[], ModelTable], settings: Settings | None = None, cors: list[str] | None = None
) -> FastAPI:
    """建服务。

    Args:
        load: 载入模型的函数，启动后在别的线程里调用：载入期间 ``/health`` 已经能答 503。失败时错误放在
            ``app.state.failure``，服务器随之退出。
        settings: 限额与密钥。
        cors: 允许的来源；不给就不放行跨源请求。
    """
    settings = settings or Settings()
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(fill_table(app, load))
        watching = asyncio.create_task(watch_engines(app))
        yield
        await loading
        watching.cancel()
        for runner in app.state.table.runners if app.state.table else ():
            await run_in_threadpool(runner.close)

    app = FastAPI(
        title="MiniMind", version="1", lifespan=lifespan, docs_url=None, redoc_url=None
    )  # 它们要 CDN
    app.state.table, app.state.settings, app.state.metrics = None, settings, metrics
    app.state.stopping = False
    install_handlers(app, log)
    app.add_middleware(Guard, settings=settings, metrics=metrics)
    if cors:
        app.add_middleware(CORSMiddleware, allow_origins=cors, allow_methods=["*"], allow_headers=["*"])
    add_generation(app, settings, metrics)
    add_models(app)
    add_tokens(app)
    add_status(app, metrics)
    add_page(app)
    if settings.reload_dir is not None:
        add_reload(app, settings.reload_dir, table_of)
    return app


async def fill_table(app: FastAPI, load: Callable[[], ModelTable]) -> None:
    """载入模型；不成就请服务器退出（给自己发 SIGTERM，uvicorn 照常收尾）。"""
    try:
        table = await run_in_threadpool(load)
        for runner in table.runners if app.state.stopping else ():
            runner.refuse()
        app.state.table = table
    except Exception as error:  # 什么错都要退出：不然 /health 一直说正在载入
        app.state.failure = error
        if not isinstance(error, UserError):  # 使用者能修的由命令行入口说，只说一遍
            log.error("载入模型时出错", exc_info=error)
        signal.raise_signal(signal.SIGTERM)


async def watch_engines(app: FastAPI) -> None:
    """每半秒看一眼各个引擎：坏了的，在途的请求立刻得到错误。"""
    while True:
        for runner in app.state.table.runners if app.state.table else ():
            runner.watch()
        await asyncio.sleep(0.5)


def table_of(app: FastAPI) -> ModelTable:
    """
    Raises:
        ApiError: 模型还在载入（503）。
    """
    if app.state.table is None:
        raise ApiError(503, "模型还在载入，请稍后再试", code="loading", retry_after=2)
    return app.state.table


class IgnoredFields:
    """请求里不起作用的字段：每个名字在日志里说一次，每次写进应答的头。"""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def headers(self, body: BaseModel) -> dict[str, str]:
        names = ignored_fields(body)[:MAX_NAMES]
        fresh = [name for name in names if name not in self._told and len(self._told) < 256]
        self._told.update(fresh)
        if fresh:
            log.warning("请求里的这些字段不起作用：%s", "、".join(repr(name[:80])[1:-1] for name in fresh))
        shown = ", ".join(quote(name[:80].encode("utf-8", "replace")) for name in names)
        return {IGNORED_HEADER: shown} if shown else {}


def add_generation(app: FastAPI, settings: Settings, metrics: Metrics) -> None:
    """聊天与续写。"""

    ignored = IgnoredFields()

    async def answer(request: Request, made: Any, tickets: Any) -> Response:
        headers = ignored.headers(made.request)
        if made.request.stream:
            lines = made.stream(tickets, settings, metrics)
            return StreamingResponse(lines, media_type="text/event-stream", headers=STREAM_HEADERS | headers)
        async with until_disconnected(request):
            return JSONResponse(await made.whole(tickets, settings, metrics), headers=headers)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        model = table_of(app).find(body.model)
        # 渲染、分词与编译文法都可能要几十毫秒，不占事件循环
        made = await run_in_threadpool(ChatAnswer, model, body)
        return await answer(request, made, submit(made.job, settings))

    @app.post("/v1/completions")
    async def complete(body: CompletionRequest, request: Request) -> Response:
        model = table_of(app).find(body.model)
        made = await run_in_threadpool(TextAnswer, model, body)
        return await answer(request, made, made.submit(settings))


def add_models(app: FastAPI) -> None:
    """模型表。"""
    reload_dir = app.state.settings.reload_dir

    def card(table: ModelTable, model: ServedModel) -> dict[str, Any]:
        root = {"root": str(reload_dir)} if reload_dir is not None and model is table.default else {}
        return model.card() | root

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        table = table_of(app)
        return {"object": "list", "data": [card(table, model) for model in table.models.values()]}

    @app.get("/v1/models/{name:path}")
    async def one(name: str) -> dict[str, Any]:
        table = table_of(app)
        return card(table, table.find(name))


def add_tokens(app: FastAPI) -> None:
    """分词与还原，字段与 vLLM 的相同。"""

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Response:
        model = table_of(app).find(body.model)

        def encode() -> list[int]:
            if body.messages is None:
                ids = encode_plain(model.tokenizer, body.prompt)
                return [*document_start(model.tokenizer), *ids] if body.add_special_tokens else ids
            tools = [tool.model_dump(exclude_none=True) for tool in body.tools] if body.tools else None
            return encode_messages(model, body, tools, body.thinking).ids

        def reply() -> Response:
            ids = encode()
            texts = [model.vocabulary.text_of(token) for token in ids]
            room = model.runner.max_length
            return JSONResponse(
                {"count": len(ids), "max_model_len": room, "tokens": ids, "token_strs": texts}
            )

        return await run_in_threadpool(reply)  # 几兆的文字，查词元与写成 JSON 也要半秒

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Response:
        model = table_of(app).find(body.model)

        def reply() -> Response:
            check_ids(body.tokens, model)
            return JSONResponse({"prompt": model.tokenizer.decode(body.tokens, skip_special_tokens=False)})

        return await run_in_threadpool(reply)


def add_status(app: FastAPI, metrics: Metrics) -> None:
    """健康与指标。"""

    @app.get("/health")
    async def health() -> Response:
        if app.state.stopping:
            status = "stopping"
        else:
            status = "loading" if app.state.table is None else "ok"
        runners = app.state.table.runners if app.state.table else ()
        if reason := next((trouble for runner in runners if (trouble := runner.trouble)), None):
            return JSONResponse({"status": "failed", "reason": reason}, 503)
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    @app.get("/metrics")
    async def show_metrics() -> Response:
        table = app.state.table
        metrics.in_flight.set(sum(runner.in_flight for runner in table.runners) if table else 0)
        return Response(metrics.render(), media_type=metrics.content_type)


def add_page(app: FastAPI) -> None:
    """网页：几个静态文件，不用外部资源。"""
    app.mount("/static", PageFiles(directory=STATIC), name="static")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return index(STATIC)
