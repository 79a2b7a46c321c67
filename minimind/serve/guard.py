"""路由之前的一道门：密钥、Host、请求体大小、HEAD、按状态计数。

写成裸的 ASGI 中间件：Starlette 的 ``BaseHTTPMiddleware`` 会把流式响应再倒一手，客户端断开的消息传不到里面。
"""

from __future__ import annotations

import contextlib
import hmac
from typing import Any

from h11 import LocalProtocolError
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minimind.serve.errors import ApiError
from minimind.serve.generation import Settings
from minimind.serve.hosts import refusal, unknown_host
from minimind.serve.metrics import Metrics

# 不要密钥也能看的：探活与页面（页面里再填密钥）
OPEN_PATHS = ("/health", "/", "/favicon.ico")
OPEN_PREFIX = "/static/"


class Guard:
    """ASGI 中间件。"""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics):
        self.app, self.settings, self.metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, head = 500, scope["method"] == "HEAD"
        if head:  # 与 GET 的应答相同，只是没有正文
            scope = {**scope, "method": "GET"}

        async def counted_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif head:
                message = {**message, "body": b""}
            await send(message)

        try:
            headers = Headers(scope=scope)
            self._check_host(headers)
            self._check_key(scope, headers)
            limited = self._limit_body(headers, receive)
        except ApiError as error:
            # 请求后半截不成样子时，服务器已经自己答了 400、关了连接
            with contextlib.suppress(LocalProtocolError):
                await error.response()(scope, receive, counted_send)
        else:
            await self.app(scope, limited, counted_send)
        finally:
            # 没有匹配到路由的一律记 other，免得随便什么地址都成了一条指标
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(path, str(status)).inc()

    def _check_host(self, headers: Headers) -> None:
        """防 DNS 重绑定；有密钥时别处的网页拿不到密钥，不必查。"""
        if self.settings.api_key is not None:
            return
        name = unknown_host(headers.get("host"), self.settings.host, self.settings.allowed_hosts)
        if name is not None:
            raise ApiError(403, refusal(name), code="host_not_allowed")

    def _check_key(self, scope: Scope, headers: Headers) -> None:
        path = scope["path"]
        if self.settings.api_key is None or scope["method"] == "OPTIONS":
            return
        if path in OPEN_PATHS or path.startswith(OPEN_PREFIX):
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # 头是按 latin-1 解出来的，编回去才是客户端发的字节
        right = hmac.compare_digest(given.strip().encode("latin-1"), self.settings.api_key.encode())
        if scheme.lower() != "bearer" or not right:
            raise ApiError(
                401, "密钥不对或没有给：请带上 Authorization: Bearer <密钥>", code="invalid_api_key"
            )

    def _limit_body(self, headers: Headers, receive: Receive) -> Receive:
        """按写明的长度先拒绝；没写长度（分块传输）的边收边数。"""
        most = self.settings.max_body
        declared = headers.get("content-length", "")
        if declared.isdigit() and int(declared) > most:
            raise self._too_large(int(declared))
        received = 0

        async def limited() -> dict[str, Any]:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > most:
                raise self._too_large(received)
            return message

        return limited

    def _too_large(self, size: int) -> ApiError:
        most = self.settings.max_body
        return ApiError(413, f"请求体至少 {size} 字节，至多 {most} 字节", code="body_too_large")
