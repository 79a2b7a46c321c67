"""路径约定：从仓库根目录还是从 trainer/ 里运行，同一个相对路径都指同一个文件。"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

# 公共项目的使用者习惯先 cd 到这些目录再运行脚本
ENTRY_DIRS = ("trainer", "scripts")


def base_dir() -> Path:
    """相对路径的起点：当前目录是本仓库的 ``trainer/`` 或 ``scripts/`` 时取仓库根，否则取当前目录。"""
    cwd = Path.cwd()
    if cwd.name in ENTRY_DIRS and (cwd.parent / "minimind" / "errors.py").is_file():
        return cwd.parent
    return cwd


def resolve_path(path: str | Path) -> Path:
    """把命令行上的路径变成绝对路径。

    绝对路径与 ``~`` 照旧；以 ``..`` 开头的相对当前目录（旧命令 ``--data_path ../dataset/x.jsonl``
    的意思不变）；其余相对 :func:`base_dir`。
    """
    path = Path(path).expanduser()
    if path.is_absolute():
        return path
    if path.parts[:1] == ("..",):
        return (Path.cwd() / path).resolve()
    return base_dir() / path


def printable(name: str) -> str:
    """文件名里不成 UTF-8 的字节换成 �，好写进 JSON、报告与图。"""
    return os.fsencode(name).decode("utf-8", "replace")


# 文件夹里的文件至多列出几个
LISTED = 8


def file_problem(path: Path, suffix: str = ".jsonl") -> str | None:
    """不能当文件读的原因，说出那里有什么；能读返回 None。

    Args:
        suffix: 想要的文件的后缀：是文件夹时列出其中的，不存在时从同一目录里找名字最像的。
    """
    try:
        if path.is_dir():
            names = sorted(entry.name for entry in path.iterdir() if entry.name.endswith(suffix))
            if not names:
                return f"是文件夹，里面没有 {suffix} 文件"
            more = f"等 {len(names)} 个" if len(names) > LISTED else ""
            return f"是文件夹，里面有 {'、'.join(names[:LISTED])}{more}"
        if path.is_file():
            return None if os.access(path, os.R_OK) else "没有权限读"
        if path.exists():
            return "不是普通文件"
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    except OSError as error:
        return "没有权限读" if isinstance(error, PermissionError) else f"打不开（{error.strerror}）"
    near = difflib.get_close_matches(path.name, siblings, n=1)
    return f"不存在；同一目录里有 {near[0]}" if near else "不存在"


def folder_problem(path: Path) -> str | None:
    """不能当文件夹用的原因；能用返回 None。"""
    try:
        if path.is_dir():
            return None if os.access(path, os.R_OK | os.X_OK) else "没有权限读"
        return "是文件，不是文件夹" if path.exists() else "不存在"
    except OSError as error:
        return "没有权限读" if isinstance(error, PermissionError) else f"打不开（{error.strerror}）"
