"""网页的静态文件：聊天页与看训练的页面共用的规矩，不引用外部资源。"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import Response
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

STATIC = Path(__file__).parent / "static"
# 脚本与样式随版本变：浏览器可以存，每次用之前问一声变了没有（没变是 304）
STATIC_HEADERS = {"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}
# 页面只用自己的脚本与样式；样式里的宽度是逐个设的，所以放行内联样式
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:",
    "Cache-Control": "no-cache",
}


class PageFiles(StaticFiles):
    """网页的脚本与样式，带上缓存的规矩。"""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(STATIC_HEADERS)
        return response


def index(folder: Path) -> Response:
    """``folder`` 里的页面。"""
    return FileResponse(folder / "index.html", headers=PAGE_HEADERS)
