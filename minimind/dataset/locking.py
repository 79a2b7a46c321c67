"""文件锁：同一份缓存只由一个进程建，其余的等它建完；不依赖 torch.distributed。

用内核的 flock：持锁的进程哪怕被 kill -9，锁也立刻放开，没有“残留的锁要不要当真”的猜测。
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

POLL_SECONDS = 0.2


@contextmanager
def file_lock(path: Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """持有 ``path`` 上的独占锁；退出时删除锁文件，不留痕迹。

    Args:
        path: 锁文件，父目录会被建出来。
        on_wait: 第一次发现锁被别人拿着时调用一次，用来告诉使用者在等什么。
    """
    waited = False
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # 别人刚好清掉了空目录
            continue
        if _try_lock(handle):
            # 打开与上锁之间，上一个持有者可能已删掉这个文件；锁在删掉的文件上等于没锁
            if fcntl is None or os.fstat(handle).st_nlink > 0:
                break
        elif not waited:
            waited = True
            if on_wait:
                on_wait()
        os.close(handle)
        if waited:
            time.sleep(POLL_SECONDS)
    try:
        yield
    finally:
        if fcntl is not None:
            os.unlink(path)  # 趁还持锁时删，等待者靠上面的 st_nlink 发现
            os.close(handle)
        else:
            msvcrt.locking(handle, msvcrt.LK_UNLCK, 1)
            os.close(handle)


def _try_lock(handle: int) -> bool:
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):
        return False
    return True
