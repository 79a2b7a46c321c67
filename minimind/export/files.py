"""写出去的文件与目录：要么完整，要么没有；已有的东西不加 --force 不动。"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from minimind.errors import UserError
from minimind.runtime.files import replacing, temporary_folder


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """给出同目录的临时路径，正常结束后刷盘并改名到 ``path``；出错就删掉，原有文件不动。"""
    try:
        with replacing(path) as temporary:
            yield temporary
    except OSError as error:
        raise _failed(path, error) from error


def check_folder(folder: Path, force: bool, own: frozenset[str]) -> None:
    """目标目录能不能写。

    Args:
        own: 命令自己会写的文件名；``--force`` 只替换全由这些文件组成的目录，别的东西绝不删除。

    Raises:
        UserError: 目录已有内容而没有 ``--force``，或目录里有别的文件。
    """
    if folder.is_file():
        raise UserError("要写的是目录，这里是一个文件", where=str(folder), fix="换一个目录名")
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    others = [name for name in names if name not in own]
    if others:
        raise UserError(
            f"目录里有不是这个命令写的文件（如 {others[0]}），覆盖会丢掉它们",
            where=str(folder),
            fix="换一个目录，或自己先移走它们",
        )
    if names and not force:
        raise UserError(
            f"目录已存在且不是空的（{len(names)} 个文件）",
            where=str(folder),
            fix="换一个目录，或加 --force 覆盖",
        )


@contextlib.contextmanager
def whole_folder(folder: Path, force: bool, own: frozenset[str]) -> Iterator[Path]:
    """给出同级的临时目录，正常结束后改名成 ``folder``；出错就删掉，原有目录不动。参数见 :func:`check_folder`。

    Raises:
        UserError: 不能写到这里，或磁盘写不下。
    """
    check_folder(folder, force, own)
    try:
        with temporary_folder(folder) as temporary:
            yield temporary
            for file in temporary.iterdir():
                with open(file, "rb+") as handle:
                    os.fsync(handle.fileno())
            # 旧目录先挪进自己独有的位置：改名不成还能放回去
            with temporary_folder(folder) as aside:
                old = aside / "old"
                if folder.exists():
                    os.replace(folder, old)
                try:
                    os.replace(temporary, folder)
                except OSError:
                    if old.exists() and not folder.exists():
                        os.replace(old, folder)
                    raise
    except OSError as error:
        raise _failed(folder, error) from error


def _failed(path: Path, error: OSError) -> UserError:
    return UserError(
        f"写不进去（{error.strerror or error}），原有的内容未动",
        where=str(path),
        fix="腾出磁盘空间，或换一个可写的位置",
    )
