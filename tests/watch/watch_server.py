"""一台开着的页面服务器，端口由系统挑；等到某事成真。"""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager

from minimind.watch.cli import make_server

LIMIT = 120.0


def until(condition, complaint: str) -> None:
    """等到 ``condition()`` 为真；机器再忙两分钟也该够。"""
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.05)


@contextmanager
def serving(folder, port: int = 0, **options):
    """``with serving(目录) as url``。"""
    server = make_server(folder, "127.0.0.1", port, **options)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started, "服务器没有起来")
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)
