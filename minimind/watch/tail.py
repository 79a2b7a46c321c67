"""跟着一个还在长的文件读：记住读到第几个字节，每次只读新长出来的整行。

文件被换掉（重新训练、续训都先写临时文件再改名）、截短、原地重写，都认得出来，从头读过；写到一半的末行等它写完。
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

HEAD, LAST = 256, 64  # 开头与已读处之前各记住这么多字节：inode 会被重复使用，只看它不够
LONGEST_LINE = 8 << 20  # 更长的一行不是训练日志，跳过，免得每次都重读


@dataclass
class Piece:
    """一次读到的。

    Attributes:
        restarted: 文件换过了，之前读到的不作数。
        lines: ``(在文件里的位置, 不含换行的一行)``。
        complete: 已经读到文件末尾（写到一半的末行除外）。
    """

    restarted: bool = False
    lines: list[tuple[int, bytes]] = field(default_factory=list)
    complete: bool = True


class Tail:
    """一个文件读到了哪里。"""

    def __init__(self, path: Path):
        self.path, self.offset, self.generation = path, 0, 0
        self._identity: tuple[int, int] | None = None
        self._head = self._last = b""
        self._skipping = False

    @property
    def inode(self) -> int:
        """读的是哪个文件；还没读过为 0。"""
        return self._identity[1] if self._identity else 0

    def read(self, budget: int) -> Piece:
        """读新的整行，至多约 ``budget`` 字节；文件没了、读不了就什么也没有。"""
        try:
            with open_regular(self.path) as file:
                return self._read(file, budget)
        except OSError:  # 正在被换掉，或没有权限：下次再看
            return Piece()

    def line(self, offset: int, length: int) -> bytes:
        """已读过的一行的原文；文件换过了就可能不是原来那行，由调用者核对。"""
        with open_regular(self.path) as file:
            file.seek(offset)
            return file.read(length)

    def _read(self, file, budget: int) -> Piece:
        status = os.fstat(file.fileno())
        identity = (status.st_dev, status.st_ino)
        piece = Piece()
        if self._identity is not None and (identity != self._identity or self._changed(file, status.st_size)):
            piece.restarted = True
            self.offset, self._head, self._last, self._skipping = 0, b"", b"", False
            self.generation += 1
        self._identity = identity
        file.seek(self.offset)
        chunk = file.read(min(budget, status.st_size - self.offset))
        if b"\n" not in chunk and len(chunk) == budget:  # 一行就比这次要读的还长
            chunk += file.read(LONGEST_LINE)
        end = chunk.rfind(b"\n") + 1
        if not end and len(chunk) > LONGEST_LINE:
            self._skipping, end = True, len(chunk)
            self._advance(chunk)
        elif end:
            self._split(chunk[:end], piece)
        piece.complete = self.offset + len(chunk) - end >= status.st_size
        return piece

    def _split(self, chunk: bytes, piece: Piece) -> None:
        position = self.offset
        for line in chunk[:-1].split(b"\n"):
            if not self._skipping:
                piece.lines.append((position, line))
            self._skipping = False
            position += len(line) + 1
        self._advance(chunk)

    def _advance(self, chunk: bytes) -> None:
        if self.offset < HEAD:
            self._head = (self._head + chunk)[:HEAD]
        self._last = (self._last + chunk)[-LAST:] if len(chunk) < LAST else chunk[-LAST:]
        self.offset += len(chunk)

    def _changed(self, file, size: int) -> bool:
        """同一个 inode，但读过的部分已经不是原来的。"""
        if size < self.offset:
            return True
        file.seek(0)
        if file.read(len(self._head)) != self._head:
            return True
        file.seek(self.offset - len(self._last))
        return file.read(len(self._last)) != self._last


def open_regular(path: Path):
    """以二进制打开一个普通文件；管道、设备之类打开就会卡住的，不打开。

    Raises:
        OSError: 不是普通文件，不存在，没有权限。
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # 先看再包成文件：目录包不成，描述符就没人关了
        os.close(descriptor)
        raise OSError(f"{path} 不是普通文件")
    return os.fdopen(descriptor, "rb")
