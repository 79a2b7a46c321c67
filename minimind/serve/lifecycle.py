"""停机：收到信号（SIGTERM、Ctrl-C、SIGHUP）后先不接新的，在写的写完才退出；再来一次信号或过了时限就立刻退出。

uvicorn 自己的做法是收到信号就关掉监听，新来的连不上，而不是得到 503；退出后还把信号再发给自己，退出码就不是 0。
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from minimind.console import say
from minimind.serve.runner import EngineRunner
from minimind.signals import SIGNALS, ignored_by_nohup

log = logging.getLogger("minimind.serve")


class GracefulServer(uvicorn.Server):
    """模型载入好了、开始听了才报地址；第一次信号开始停机，第二次立刻结束。

    Args:
        app: ``create_app`` 建的应用，停机时让它的各个引擎不再接新的。
        limit: 停机最多等多少秒；到了还没写完的就不要了。

    Attributes:
        forced: 没有等在写的写完就退出了，或是引擎坏了。
    """

    def __init__(self, config: uvicorn.Config, app: FastAPI, limit: float):
        super().__init__(config)
        self.app, self.limit = app, limit
        self.forced = False
        self._deadline: float | None = None
        self._announced = False

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn 只接 SIGTERM 与 SIGINT；终端关掉时的 SIGHUP 也照样停机，用 nohup 启动的除外。"""
        with super().capture_signals():
            others = [s for s in SIGNALS if s not in (signal.SIGTERM, signal.SIGINT)]
            others = [s for s in others if not ignored_by_nohup(s)]
            if threading.current_thread() is not threading.main_thread():  # 别的线程里装不了
                others = []
            previous = {signum: signal.signal(signum, self.handle_exit) for signum in others}
            try:
                yield
            finally:
                for signum, handler in previous.items():
                    signal.signal(signum, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """信号处理函数；只改几个标志，其余的事在 :meth:`on_tick` 里做。"""
        if self._deadline is not None:
            self._give_up()
            self.force_exit = self.should_exit  # 已经在等连接送完：那里只看这个标志
            return
        self._deadline = time.monotonic() + self.limit
        self.app.state.stopping = True
        for runner in self._runners:
            runner.refuse()

    async def on_tick(self, counter: int) -> bool:
        """uvicorn 每 0.1 秒叫一次；返回真就关掉监听，等连接送完。"""
        if not self._announced and self.app.state.table is not None:
            self._announced = True
            say(f"服务在 {self.address} ，接口在 /v1；Ctrl-C 停止。")
        if not self.forced and (trouble := next((t for r in self._runners if (t := r.trouble)), None)):
            log.critical("%s；服务退出", trouble)
            self._deadline = time.monotonic()
            self.app.state.stopping = True
            self._give_up()
        if self._deadline is not None:
            left = self._deadline - time.monotonic()
            if left <= 0 and not self.forced:
                log.error("停机等了 %g 秒还没写完，剩下的不要了", self.limit)
                self._give_up()
            if self.forced:
                self.should_exit = True
            elif all(runner.idle for runner in self._runners):
                # 词元都写出来了，还要送完：对方若一直不收，也只等到时限
                self.config.timeout_graceful_shutdown = max(1, int(left))
                self.should_exit = True
        return await super().on_tick(counter)

    @property
    def address(self) -> str:
        """真的在听的地址；端口写 0 时由系统给。"""
        host, port = self.config.host, self.config.port
        if not port and self.servers and self.servers[0].sockets:
            port = self.servers[0].sockets[0].getsockname()[1]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    @property
    def _runners(self) -> list[EngineRunner]:
        return self.app.state.table.runners if self.app.state.table else []

    def _give_up(self) -> None:
        """不等了：在途的请求都答 503；连接若一秒还没送完，也不要了。"""
        self.forced = True
        self.config.timeout_graceful_shutdown = 1
        for runner in self._runners:
            runner.watch()  # 坏了的，在途的得到的是这个错
            runner.abandon()
