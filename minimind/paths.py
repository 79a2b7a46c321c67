"""路径约定：从仓库根目录还是从 trainer/ 里运行，同一个相对路径都指同一个文件。"""

from __future__ import annotations

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
