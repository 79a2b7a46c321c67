"""API 的错误：形状与 OpenAI 的相同，``{"error": {"message", "type", "param", "code"}}``。"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from minimind.errors import UserError

# 状态码 → OpenAI 的错误类别
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class ApiError(HTTPException):
    """一次请求的错误；``param`` 是出错的字段，``code`` 给程序看。

    是 ``HTTPException`` 的一种：读请求体时抛出的，FastAPI 才不会改成笼统的 400。

    Args:
        retry_after: 秒；写进 ``Retry-After`` 头。
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        # 引用客户端的话时可能带着不成对的代理字符，编不成 UTF-8，答复就发不出去
        message, param = (text and text.encode("utf-8", "replace").decode() for text in (message, param))
        super().__init__(status, message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        headers = {"Retry-After": str(self.retry_after)} if self.retry_after else None
        if self.status == 401:
            headers = {"WWW-Authenticate": "Bearer"}
        return JSONResponse(self.body(), self.status, headers)


def install_handlers(app: FastAPI, log: Any) -> None:
    """各种异常都变成同一种形状；内部错误只写日志，不把细节给客户端。"""

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(UserError)
    async def user_error(request: Request, error: UserError) -> JSONResponse:
        return ApiError(400, str(error)).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return from_validation(error).response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        words = {404: f"没有这个地址：{request.url.path}", 405: f"这个地址不支持 {request.method}"}
        message = words.get(error.status_code, str(error.detail))
        response = ApiError(error.status_code, message).response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        log.error("处理 %s %s 时出错", request.method, request.url.path, exc_info=error)
        return ApiError(500, "服务器内部错误，详情在服务器的日志里").response()


def from_validation(error: RequestValidationError) -> ApiError:
    """pydantic 的第一处错误：哪个字段、要求是什么、给的是什么。"""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"] if part != "body"]
    name = ".".join(path) or None
    message = first["msg"].removeprefix("Value error, ")
    found = first.get("input")
    if first["type"] == "json_invalid":
        name, message = None, "请求体不是合法的 JSON"
    elif not path and first["type"] in ("model_attributes_type", "missing"):  # 不是对象，或 curl -d 没写类型
        message = "请求体应当是一个 JSON 对象，并带上 Content-Type: application/json"
    elif first["type"] != "missing" and isinstance(found, str | int | float | bool):
        message += f"；给的是 {str(found)[:80]!r}"
    return ApiError(400, f"{name}：{message}" if name else message, param=name, code="invalid_value")
