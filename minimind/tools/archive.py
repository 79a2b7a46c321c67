"""查资料：只有这道题自己带着的几条，别处没有，所以非查不可，背不下来。

题的记录里写着 ``lookup``：``{查什么: {结果}}``；结果里有 ``error`` 的是查得到而要换个查法的（按它说的再查）。
"""

from __future__ import annotations

from functools import partial
from typing import Any

from minimind.tools.base import Tool, ToolError


def search(query: str, pages: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """查一条。

    Raises:
        ToolError: 没有这一条，或它说要换个查法。
    """
    found = pages.get(query.strip())
    if found is None:
        raise ToolError(f"没有 {query.strip()[:20]}")
    if "error" in found:
        raise ToolError(str(found["error"]))
    return dict(found)


def archive(pages: dict[str, dict[str, Any]]) -> Tool:
    """这道题的资料做成的工具。"""
    return Tool("search", "查资料", {"query": {"type": "string"}}, partial(search, pages=pages))
