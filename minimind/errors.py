"""面向使用者的错误：一句话说清什么错了、在哪里、期望什么、怎么修。"""

from __future__ import annotations

import functools
import os
import select
import signal
import sys
from collections.abc import Callable
from typing import TextIO

from minimind import signals

# 与被 SIGPIPE 结束的程序相同：128 + 13
PIPE_CLOSED = 141


class UserError(Exception):
    """使用者能自己修好的错误；入口处只打印这一句话，不打印调用栈。

    Args:
        what: 什么错了（含实际看到的值）。
        where: 出错的位置，例如 ``data.jsonl:17 字段 text``。
        expected: 期望的是什么。
        fix: 怎么修，尽量是一条可以直接照做的命令。
    """

    exit_code = 2

    def __init__(
        self, what: str, *, where: str | None = None, expected: str | None = None, fix: str | None = None
    ):
        self.what, self.where, self.expected, self.fix = what, where, expected, fix
        parts = [f"{where}：{what}" if where else what]
        if expected:
            parts.append(f"期望：{expected}")
        if fix:
            parts.append(f"修复办法：{fix}")
        super().__init__("；".join(part.rstrip("。；") for part in parts) + "。")


def guard(main: Callable[..., int | None]) -> Callable[..., int]:
    """包住命令行入口：:class:`UserError` 打印成一句话并返回 2；Ctrl-C 返回 130，SIGTERM 143，SIGHUP 129。

    环境里另有一份 ``minimind`` 时先说一句。``main`` 自己用 ``sys.exit`` 给出的退出码（例如 SIGTERM 存盘后的 143）原样保留。
    读我们输出的程序先走了（``minimind --help | head``），安静地返回 141，与别的命令行程序一样。
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> int:
        from minimind.distribution import warn_other_minimind  # 只有入口要查

        warn_other_minimind()
        with signals.watching() as watch:
            try:
                return main(*args, **kwargs) or 0
            except (KeyboardInterrupt, signals.Terminated, Exception) as error:
                signum = watch.signum or (signal.SIGINT if isinstance(error, KeyboardInterrupt) else 0)
                if not signum and isinstance(error, UserError):
                    print(f"错误：{error}", file=sys.stderr)
                    return error.exit_code
                if not signum:
                    raise
                # 收到信号之后的错误多半是它的余波（一起收到信号的子进程先走了，导入到一半），不再另外报
                print("已中断。", file=sys.stderr)
                return 128 + signum

    return _quiet_on_closed_pipe(wrapped)


def _quiet_on_closed_pipe(main: Callable[..., int]) -> Callable[..., int]:
    """输出的读者走了就返回 141；在这里就把缓冲写出去，免得留到解释器退出时才报错。"""

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> int:
        try:
            try:
                return main(*args, **kwargs)
            finally:
                if sys.stdout is not None:  # 标准输出是关着的：没有可写的
                    sys.stdout.flush()
        except BrokenPipeError:
            closed = [stream for stream in (sys.stdout, sys.stderr) if stream and _reader_left(stream)]
            if not closed:  # 断的是别的管道，例如采样服务的连接
                raise
            for stream in closed:  # 没写出去的丢掉
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            return PIPE_CLOSED

    return wrapped


def _reader_left(stream: TextIO) -> bool:
    try:
        stream.flush()
        if not hasattr(select, "poll"):  # Windows
            return False
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except BrokenPipeError:
        return True
    except (OSError, ValueError):  # 不是真的文件（测试里的替身），或已经关了
        return False
