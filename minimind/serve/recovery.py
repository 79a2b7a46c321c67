"""引擎出错之后收场用的几样：放开旧引擎，占着它的位置，答应了的事总有个结果。"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Any

from minimind.inference.engine import Sequence as Sample
from minimind.serve.tickets import EngineDown


class Vacant:
    """旧引擎已经放掉、新的还没建起来时占着位置的：没有在写的，也不认得谁。"""

    has_unfinished = False
    running: tuple[Sample, ...] = ()
    prompt_tokens = (0, 0)

    def cancel(self, request_id: int, index: int | None = None) -> None:
        """没有可停的。"""


def let_go(error: BaseException) -> None:
    """放开错误里各层栈帧的局部变量（引擎、KV、激活都在里面）；哪个文件哪一行还在。"""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def deferred(work: Callable[[], Any]) -> tuple[Callable[[], None], Future]:
    """把一件事变成（在别处执行的函数，取结果的期物）；等的人先走了就不做。"""
    future: Future = Future()

    def run() -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            done, value = future.set_result, work()
        except BaseException as error:
            done, value = (
                future.set_exception,
                error if isinstance(error, Exception) else EngineDown(repr(error)),
            )
        with contextlib.suppress(InvalidStateError):  # 卡得太久，等的人已经得到错误了
            done(value)

    return run, future
