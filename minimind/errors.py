"""面向使用者的错误：一句话说清什么错了、在哪里、期望什么、怎么修。"""

from __future__ import annotations

import errno
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
    读我们输出的程序先走了（``minimind --help | head``），安静地返回 141，与别的命令行程序一样；输出写进的磁盘满了，也是一句话。
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> int:
        from minimind.distribution import warn_other_minimind  # 只有入口要查

        _never_unwritable()
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


def _never_unwritable() -> None:
    """标准输出的编码写不出的字（GBK 的控制台遇上表情符号，非 UTF-8 的文件名）写成转义，与 stderr 一样，不中途报错。"""
    if getattr(sys.stdout, "errors", None) == "strict" and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def _quiet_on_closed_pipe(main: Callable[..., int]) -> Callable[..., int]:
    """输出的读者走了就返回 141，写进的磁盘满了返回 2；在这里就把缓冲写出去，免得留到解释器退出时才报错。"""

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
            _discard(closed)
            return PIPE_CLOSED
        except OSError as error:
            if not _stdout_full(error):
                raise
            _discard([sys.stdout])
            fix = "腾出磁盘空间，或换一个地方写"
            full = UserError(f"写不出去（{error.strerror}）", where="标准输出", fix=fix)
            print(f"错误：{full}", file=sys.stderr)
            return full.exit_code

    return wrapped


def _discard(streams: list[TextIO]) -> None:
    """没写出去的丢掉。"""
    for stream in streams:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _stdout_full(error: OSError) -> bool:
    """磁盘满了，满的正是标准输出写进的那个：再写一个字节还是写不出。"""
    if error.errno not in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)) or sys.stdout is None:
        return False
    try:
        os.write(sys.stdout.fileno(), b"\n")
    except OSError as again:
        return again.errno == error.errno
    except ValueError:  # 已经关了，或是测试里的替身
        return False
    return False


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
