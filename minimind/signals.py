"""退出信号：Ctrl-C、SIGTERM、SIGHUP 到了，每个命令都走得掉，走得干净，退出码按惯例是 128 + 信号号。

Python 的信号处理函数只在主线程的两条字节码之间执行，而编译、采样、一次大矩阵乘都可能几分钟不回来。所以另有一个
看守线程，信号一到就由内核写进管道叫醒它（``signal.set_wakeup_fd``）：

- 第一次：主线程照常处理。训练由 :class:`minimind.runtime.interrupt.StopSignal` 接手，走完这一步、存盘再走；别的命令
  抛 KeyboardInterrupt 或 :class:`Terminated`，各处的 ``finally`` 收拾干净，入口说一句话。
- :data:`PATIENCE` 秒还没走掉：看守让接手的人放弃手上的事；没有接手的人就直接结束进程。
- 第二次：立刻结束。

用 nohup 启动的进程，SIGHUP 一开始就是被忽略的，照旧忽略。
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn, Protocol

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
# 主线程这么多秒还没走掉，就不再等它
PATIENCE = 4.0
# timeout(1) 先后给子进程与整个进程组各发一次，相隔几微秒；torchrun 收到终端的 Ctrl-C 还要再转发一次：都不是“第二次”
ECHO, ECHO_TORCHRUN = 0.005, 3.0


def ignored_by_nohup(signum: int) -> bool:
    """启动时 SIGHUP 就是被忽略的：使用者要它在终端关掉之后接着跑。"""
    return signum == getattr(signal, "SIGHUP", None) and signal.getsignal(signum) is signal.SIG_IGN


class Terminated(SystemExit):
    """SIGTERM 或 SIGHUP 在主线程里变成的异常；同 SystemExit，``except Exception`` 拦不住它。"""


class Taker(Protocol):
    """接手信号的人：主线程里记下，收拾好了自己走。"""

    def signalled(self, signum: int) -> None:
        """在主线程里，信号到了。"""

    def overdue(self, signum: int) -> None:
        """在另一个线程里，等得太久了；结束进程，或者返回（主线程马上就走）。"""


class Watch:
    """处理函数与看守线程；整个进程同时只有一个，用 :func:`watching` 打开。

    Attributes:
        signum: 收到的第一个信号，还没有时为 0。
        taker: 谁接手；``None`` 时变成主线程里的异常。
        at_once: 现在什么也没开始（正在导入），收到就走，不必收拾。
    """

    def __init__(self):
        self.signum, self.since, self.arrived, self.handled = 0, 0.0, 0, False
        self.taker: Taker | None = None
        self.at_once = False

    def start(self) -> None:
        self.receiver, self.sender = socket.socketpair()
        self.sender.setblocking(False)
        self.previous_fd = signal.set_wakeup_fd(self.sender.fileno(), warn_on_full_buffer=False)
        usable = [s for s in SIGNALS if not ignored_by_nohup(s)]
        self.previous = {s: signal.signal(s, self.handle) for s in usable}
        self.thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        for signum, handler in self.previous.items():
            if signal.getsignal(signum) == self.handle and handler is not None:
                signal.signal(signum, handler)
        signal.set_wakeup_fd(self.previous_fd)
        self.sender.send(b"\0")
        self.thread.join()
        self.receiver.close()
        self.sender.close()

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """主线程里的处理函数：只管第一次；立刻就走的几种由看守来做，免得两个线程抢着走。"""
        self._note(signum)
        if self.at_once or self.handled:
            return
        self.handled = True
        if self.taker is not None:
            self.taker.signalled(signum)
        elif signum == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise Terminated(128 + signum)

    def _note(self, signum: int) -> None:
        if not self.signum:
            self.signum, self.since = signum, time.monotonic()

    def _watch(self) -> None:
        waiting = True  # 还没有因为等得太久而催过
        while True:
            left = max(0.0, self.since + PATIENCE - time.monotonic()) if self.signum and waiting else None
            if not select.select([self.receiver], [], [], left)[0]:
                waiting = False
                # 另开线程：放弃手上的事要存盘，其间第二次信号照样管用
                threading.Thread(target=self._overdue, daemon=True).start()
                continue
            for signum in self.receiver.recv(64):
                if not signum:
                    return
                # 服务用的 uvicorn 另装了自己的处理函数，那就不归这里管
                if signum in SIGNALS and signal.getsignal(signum) == self.handle:
                    self._arrive(signum)

    def _arrive(self, signum: int) -> None:
        self._note(signum)
        self.arrived += 1
        if self.at_once:
            leave_now(signum, "已中断。")
        echo = ECHO_TORCHRUN if "TORCHELASTIC_RUN_ID" in os.environ else ECHO
        if self.arrived > 1 and time.monotonic() - self.since > echo:
            leave_now(signum, "第二次收到退出信号，立即离开。")

    def _overdue(self) -> None:
        if self.taker is not None:
            self.taker.overdue(self.signum)
        else:
            leave_now(self.signum, "等不到手上的事做完，直接离开。")


_current: Watch | None = None


@contextlib.contextmanager
def watching() -> Iterator[Watch]:
    """期间由这里管退出信号；里层沿用外层的。不在主线程里时装不了处理函数，什么也不做。"""
    global _current
    if _current is not None or threading.current_thread() is not threading.main_thread():
        yield _current or Watch()
        return
    _current = watch = Watch()
    watch.start()
    try:
        yield watch
    finally:
        watch.stop()
        _current = None


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
    """里面还没有什么要收拾：导入 torch 要几秒，其间的中断会被库换成别的异常，不如直接走。"""
    with watching() as watch:
        before, watch.at_once = watch.at_once, True
        try:
            yield
        finally:
            watch.at_once = before


@contextlib.contextmanager
def taken_by(taker: Taker) -> Iterator[None]:
    """期间由 ``taker`` 接手。"""
    with watching() as watch:
        before, watch.taker = watch.taker, taker
        try:
            yield
        finally:
            watch.taker = before


def _forget_in_child() -> None:
    """fork 出来的子进程：管道是父进程的，往里写会被当成父进程收到了信号。"""
    global _current
    if _current is not None:
        signal.set_wakeup_fd(-1)
        for signum in _current.previous:
            signal.signal(signum, signal.SIG_DFL)
        _current = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


# ---------------------------------------------------------------- 离开


def leave_now(signum: int, message: str = "") -> NoReturn:
    """结束进程：说一句话，带走所有子进程，不做别的收尾。任何线程都可以调用。"""
    if message:
        tell(message)
    leave(128 + signum)


def leave(code: int) -> NoReturn:
    """带走所有子进程，以 ``code`` 退出，不经过解释器的收尾。"""
    if sys.stderr is not None and sys.stderr.isatty():
        _write("\x1b[?25h")  # 进度条藏起来的光标
    kill_descendants()
    os._exit(code)


def tell(message: str) -> None:
    """主进程说一句话；处理函数与任何线程里都可以用。"""
    if int(os.environ.get("RANK", "0")) == 0:
        _write(f"{message}\n")


def _write(text: str) -> None:
    """绕过缓冲：sys.stderr 的锁可能正在别的线程、或被打断的主线程手里。终端已经关掉时写不进去，也没有人看。"""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


def kill_descendants() -> None:
    """杀掉自己的所有子孙进程：读数据的、分词的、编译的。"""
    for _ in range(3):  # 杀的同时可能又生出来
        found = descendants(os.getpid())
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if not found:
            return


def descendants(root: int) -> list[int]:
    """``root`` 的子孙进程号，不含已经死了的；Windows 上为空（那里子进程随管道关闭而退出）。"""
    children: dict[int, list[int]] = {}
    for pid, parent in _processes():
        children.setdefault(parent, []).append(pid)
    found, queue = [], [root]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def _processes() -> Iterator[tuple[int, int]]:
    """活着的进程：（进程号，父进程号）。"""
    if os.path.isdir("/proc/self"):
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                    state, parent = file.read().rpartition(")")[2].split()[:2]
            except OSError:  # 刚好退出了
                continue
            if state != "Z":
                yield int(name), int(parent)
    elif os.name != "nt":
        done = subprocess.run(["ps", "-axo", "pid=,ppid=,stat="], capture_output=True, text=True)
        for line in done.stdout.splitlines():
            pid, parent, state = line.split()[:3]
            if not state.startswith("Z"):
                yield int(pid), int(parent)
