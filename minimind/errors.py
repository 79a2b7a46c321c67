"""面向使用者的错误：一句话说清什么错了、在哪里、期望什么、怎么修。"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

from minimind.distribution import warn_other_minimind


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
    """包住命令行入口：:class:`UserError` 打印成一句话并返回 2，Ctrl-C 返回 130。

    环境里另有一份 ``minimind`` 时先说一句。``main`` 自己用 ``sys.exit`` 给出的退出码（例如 SIGTERM 存盘后的 143）原样保留。
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> int:
        warn_other_minimind()
        try:
            return main(*args, **kwargs) or 0
        except UserError as error:
            print(f"错误：{error}", file=sys.stderr)
            return error.exit_code
        except KeyboardInterrupt:
            print("已中断。", file=sys.stderr)
            return 130

    return wrapped
