"""工具调用的测试共用：一次读完标签之间的全文。"""

from __future__ import annotations

from minimind.inference.tool_calls import CallScanner, ToolCall


def read_call(raw: str) -> ToolCall:
    """整段喂给扫描器，读出这次调用。"""
    scanner = CallScanner()
    scanner.feed(raw)
    return scanner.finish()
