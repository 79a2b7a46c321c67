"""SIGTERM 与 Ctrl-C：不立刻死，走完当前这一步、存盘，再以约定的退出码离开。"""

from __future__ import annotations

import signal
import threading
from types import FrameType

from minimind.console import say


class StopSignal:
    """``with StopSignal() as stop:`` 期间把退出信号变成 ``stop.requested``；第二次 Ctrl-C 立即中断。

    退出码按惯例是 128 + 信号号：SIGTERM 143，Ctrl-C 130。
    """

    WATCHED = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.signum = 0

    @property
    def requested(self) -> bool:
        return self.signum != 0

    def __enter__(self) -> StopSignal:
        self.previous = {}
        if threading.current_thread() is threading.main_thread():  # 其他线程里不许装信号处理函数
            self.previous = {s: signal.signal(s, self._handle) for s in self.WATCHED}
        return self

    def __exit__(self, *exc_info) -> None:
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.requested and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum
        say("收到退出信号，走完这一步就存盘离开（再按一次 Ctrl-C 立即离开）。")
