"""看训练的页面：几个只读的接口与几个静态文件。请求里没有一处是路径，日志以外的文件拿不到。"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Response
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from minimind.serve.hosts import refusal, unknown_host
from minimind.serve.pages import STATIC as SHARED  # 与聊天页共用样式、语言与明暗
from minimind.serve.pages import STATIC_HEADERS, PageFiles, index
from minimind.trainer.exhibits import EXHIBITS
from minimind.watch.runs import Runs

STATIC = Path(__file__).parent / "static"
Finite = Annotated[float | None, Query(allow_inf_nan=False)]
Axis = Literal["step", "time", "tokens"]


class HostGuard:
    """ASGI 中间件：只认本机的名字，见 :mod:`minimind.serve.hosts`。"""

    def __init__(self, app: ASGIApp, host: str, allowed: tuple[str, ...]):
        self.app, self.host, self.allowed = app, host, allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            name = unknown_host(Headers(scope=scope).get("host"), self.host, self.allowed)
            if name is not None:
                await problem(403, refusal(name))(scope, receive, send)
                return
        await self.app(scope, receive, send)


def reply(value: Any, status: int = 200) -> Response:
    """JSON 的答复，只用 ASCII：日志与请求里可能有编不成 UTF-8 的字。"""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Response(text, status, STATIC_HEADERS, "application/json")


def problem(status: int, message: str) -> Response:
    """错误的答复。"""
    return reply({"error": message}, status)


def create_app(runs: Runs, host: str = "127.0.0.1", allowed_hosts: tuple[str, ...] = ()) -> FastAPI:
    """建服务。

    Args:
        runs: 看哪些训练。
        host: 监听的地址。
        allowed_hosts: 请求的 ``Host`` 另外认哪些名字。
    """
    app = FastAPI(title="MiniMind watch", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(HostGuard, host=host, allowed=allowed_hosts)
    app.mount("/static", PageFiles(directory=STATIC), name="static")
    app.mount("/shared", PageFiles(directory=SHARED), name="shared")

    @app.get("/")
    def page() -> Response:
        return index(STATIC)

    @app.get("/health")
    def health() -> Response:
        return reply({"status": "ok", "folder": str(runs.folder)})

    @app.get("/api/runs")
    def list_runs() -> Response:
        return reply({"runs": runs.list()})

    @app.get("/api/run/{run_id}")
    def detail(
        run_id: str,
        axis: Axis = "step",
        points: Annotated[int, Query(ge=2, le=1000)] = 500,
        low: Finite = None,
        high: Finite = None,
        have: str | None = None,
    ) -> Response:
        found = runs.detail(run_id, axis, points, low, high, have)
        if found is None:
            return problem(404, f"没有这次训练 {run_id[:40]!r}")
        return reply(found)

    @app.get("/api/run/{run_id}/record")
    def record(run_id: str, kind: str, step: Annotated[float, Query(allow_inf_nan=False)]) -> Response:
        if kind not in EXHIBITS:
            return problem(400, f"kind 是 {kind[:40]!r}；期望：{'、'.join(EXHIBITS)}")
        found = runs.record(run_id, kind, step)
        if found is None:
            return problem(404, f"这次训练没有 {kind}")
        return reply(finite(found))

    return app


def finite(value: Any) -> Any:
    """日志里的 NaN 与无穷换成 null：浏览器不认。"""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None
