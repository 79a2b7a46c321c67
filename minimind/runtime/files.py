"""原子写入与文件锁：全仓库写“要么完整、要么没有”的文件与目录，都走这里。

同目录里取一个独一无二的临时名字，写完、刷盘，再改名到位；几十个进程同时写同一个文件，最后一个改名的算数，
谁也不会撞上谁。临时文件写着的时候由写它的进程拿着内核的 flock：被 ``kill -9`` 的进程锁立刻放开，下一次写同一个
文件时据此认出残留并清掉，正在写的绝不会被误删。
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import platform
import secrets
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from minimind.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# 别的机器写在共享盘上的临时文件看不见它的锁，放这么久才当作残留
FOREIGN_STALE_SECONDS = 24 * 3600
POLL_SECONDS = 0.2  # 等别人放锁时多久看一眼
_HOST = f"{zlib.crc32(platform.node().encode('utf-8', 'surrogateescape')):08x}"


def unique_tag() -> str:
    """``机器-进程-随机数``：不同机器、进程、线程取到的都不同。"""
    return f"{_HOST}-{os.getpid()}-{secrets.token_hex(4)}"


def atomic_write(
    path: Path, write: Callable[[Any], Any], *, fix: str = "腾出磁盘空间，或换一个可写的位置"
) -> None:
    """同目录临时文件 → 刷盘 → 改名 → 目录刷盘：任何时刻断电或被杀，``path`` 要么是旧的要么是新的。

    Args:
        path: 目标文件；目录不存在就建。
        write: 拿到二进制文件对象，写入内容。
        fix: 写不下时告诉使用者怎么办。

    Raises:
        UserError: 磁盘满、无权限等；此时旧文件完好，临时文件已删。
    """
    watched = None
    try:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            watched = _WatchedFile(file)
            write(watched)
    except BaseException as error:
        cause = error if isinstance(error, OSError) else watched and watched.error
        if not isinstance(cause, OSError):
            raise
        raise UserError(
            f"保存失败（{cause.strerror or cause}），原有文件未动", where=str(path), fix=fix
        ) from error


def write_text(path: Path, text: str) -> None:
    """:func:`atomic_write` 一段 UTF-8 文本，换行原样。"""
    atomic_write(path, lambda file: file.write(text.encode("utf-8")))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """给出同目录的临时文件（空的），正常结束后刷盘并改名到 ``path``；出错就删掉，原有文件不动。

    写的一方按名字打开它来写，不要换掉它（改名覆盖）：锁在这个文件上。

    Raises:
        OSError: 磁盘满、无权限等，原样抛出。
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(path)
    temporary, handle = _claim(path, lambda name: os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        yield temporary
        os.fsync(handle)
        if fcntl is None:  # Windows 不能给打开着的文件改名
            os.close(handle)
            handle = None
        os.replace(temporary, path)
        _sync_directory(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if handle is not None:
            os.close(handle)


@contextlib.contextmanager
def temporary_folder(folder: Path) -> Iterator[Path]:
    """给出与 ``folder`` 同级的空目录，出来时（还在的话）删掉；完整之后由调用的一方改名到位。

    Raises:
        OSError: 建不出来。
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(folder)

    def create(name: Path) -> int | None:
        name.mkdir()
        return None if fcntl is None else os.open(name, os.O_RDONLY)

    temporary, handle = _claim(folder, create)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def check_writable(folder: Path, flag: str) -> None:
    """在 ``folder`` 里写一个小文件再删掉，不留痕迹（目录是为它建的也一并删去）。

    Args:
        flag: 目录是哪个参数给的。

    Raises:
        UserError: 写不了；此时还什么都没有开始。
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, prefix=".probe") as file:
            file.write(b"minimind")
            file.flush()
    except OSError as error:
        raise UserError(
            f"写不了这个目录（{error.strerror or error}）",
            where=f"{flag} {folder}",
            expected="一个可写的目录，没有会建立",
            fix=f"用 {flag} 换一个可写的目录",
        ) from error
    finally:
        for path in missing:
            with contextlib.suppress(OSError):  # 建到一半就失败，或别的进程同时在用
                path.rmdir()


def check_target(path: Path, force: bool) -> None:
    """要写的是一个文件，还没有，或者给了 ``force``（命令行的 ``--force``）；它的文件夹建得出来。

    Raises:
        UserError: 那里是目录，或已有文件而没有 ``force``；上面的哪一层是文件，或没有写的权限。
    """
    if path.is_dir():
        raise UserError("要写的是文件，这里是一个目录", where=str(path), fix="写出文件名")
    if path.exists() and not force:
        raise UserError("文件已存在", where=str(path), fix="换一个名字，或加 --force 覆盖")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise UserError(f"{above} 是文件，不是文件夹", where=str(path), fix="换一个位置")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"没有在 {above} 里写的权限", where=str(path), fix="换一个可写的位置")


def remove_stale(path: Path) -> None:
    """清掉被杀的进程为 ``path`` 留下的临时文件与目录；正在写的留着。"""
    for other in path.parent.glob(f"{glob.escape(_prefix(path))}*.tmp"):
        with contextlib.suppress(OSError):  # 别人刚清掉，或没有权限：只是残留，不妨碍写
            _remove_if_abandoned(other)


class _WatchedFile:
    """转发写入并记住第一个系统错误：torch.save 会把磁盘写满之类的 OSError 换成含糊的 RuntimeError。"""

    def __init__(self, file):
        self.file, self.error = file, None

    def write(self, data) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def __getattr__(self, name: str):
        return getattr(self.file, name)


def _prefix(path: Path) -> str:
    # 文件名最长 255 字节，一个汉字三个；截短的名字不会撞：后面还有独一无二的一截
    return f".{path.name[:40]}."


def _claim(path: Path, create: Callable[[Path], int | None]) -> tuple[Path, int | None]:
    """建出临时文件或目录并锁住；建好与上锁之间被别人当残留清掉时换个名字再来。"""
    while True:
        temporary = path.parent / f"{_prefix(path)}{unique_tag()}.tmp"
        try:
            handle = create(temporary)
        except FileNotFoundError:
            if path.parent.is_dir():  # 目录刚建好就被当作残留清掉了
                continue
            raise
        if fcntl is None or handle is None:
            return temporary, handle
        with contextlib.suppress(OSError):  # 有的网络盘不支持锁；那里的残留按时间清
            fcntl.flock(handle, fcntl.LOCK_EX)
        if temporary.exists():
            return temporary, handle
        os.close(handle)


def _remove_if_abandoned(temporary: Path) -> None:
    """没有进程在写它就删掉：本机的看锁（拿着锁删，别人才不会在这中间接着写它），别的机器的看放了多久。"""
    same_host = temporary.name.rsplit(".", 2)[-2].startswith(f"{_HOST}-")
    handle = None
    if fcntl is not None and same_host:
        handle = os.open(temporary, os.O_RDONLY)
    elif time.time() - temporary.stat().st_mtime <= FOREIGN_STALE_SECONDS:
        return
    try:
        if handle is not None:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # 有人在写：BlockingIOError 也是 OSError
        shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()
    finally:
        if handle is not None:
            os.close(handle)


def _sync_directory(folder: Path) -> None:
    if os.name == "nt":  # Windows 不能打开目录
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def file_lock(path: Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """持有 ``path`` 上的独占锁：同一份缓存只由一个进程建，其余的等它建完；退出时删除锁文件，不留痕迹。

    用内核的 flock：持锁的进程哪怕被 ``kill -9``，锁也立刻放开，没有“残留的锁要不要当真”的猜测。

    Args:
        path: 锁文件，父目录会被建出来。
        on_wait: 第一次发现锁被别人拿着时调用一次，用来告诉使用者在等什么。
    """
    lock, waited, missed = FileLock(path, poll_interval=POLL_SECONDS), False, 0
    while not lock.is_locked:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(blocking=waited)
        except (FileNotFoundError, FileExistsError):  # 别人刚好清掉了空目录；总是这样就是真的建不成
            missed += 1
            if missed == 100:
                raise
        except Timeout:
            waited = True
            if on_wait:
                on_wait()
    try:
        yield
    finally:
        if fcntl is not None:  # Windows 上由 filelock 删
            os.unlink(path)  # 趁还持锁时删：等待者锁上之后发现文件已不在，会重来
        lock.release()


# ---------------------------------------------------------------- 内容


def content_hash(path: Path) -> str:
    """文件、或目录里全部文件（隐藏的除外）的内容指纹，与放在哪里无关。"""
    digest = hashlib.blake2b(digest_size=12)
    found = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    names = {p.relative_to(path) if path.is_dir() else Path(): p for p in found}
    for name, file in sorted(names.items()):
        if any(part.startswith(".") or part == "__pycache__" for part in name.parts):
            continue
        digest.update(f"{name.as_posix()}\0".encode())
        with open(file, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
