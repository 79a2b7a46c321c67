"""两种测试服务器共用：空闲的端口，与等到某事成真。"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

import httpx

# 只为真的卡住时不至于等到天荒地老；机器再忙也该够
LIMIT = 120.0


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def until(condition: Callable[[], bool], complaint: Callable[[], str]) -> None:
    """等到 ``condition`` 成真。

    Raises:
        AssertionError: 一直没有；话由 ``complaint`` 说。
    """
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, complaint()
        time.sleep(0.05)


def is_up(url: str) -> bool:
    """``/health`` 答了 200；还没开始监听也只是没有。"""
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False
