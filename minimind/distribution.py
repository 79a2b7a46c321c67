"""发行名、怎么装可选的库，以及环境里有没有另一份 ``minimind``。只用标准库，入口处每次都查一遍。"""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path

# 公共索引上叫 minimind 的包是别人的，照那个名字装来的是陌生人的代码；所以发行名不同，导入名不变
DISTRIBUTION = "minimind-train"
PACKAGE = Path(__file__).resolve().parent


def install_command(extra: str = "") -> str:
    """在仓库目录里照做就能装上可选库 ``extra`` 的一条命令。"""
    return (
        f"pip install -e '.[{extra}]' -c constraints.txt" if extra else "pip install -e . -c constraints.txt"
    )


def _search_path() -> list[Path]:
    """找得到模块的目录，加上当前目录与正在运行的脚本所在的两层目录，不重复。"""
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    folders = [*sys.path, os.getcwd(), *(Path(main).resolve().parents[:2] if main else [])]
    return list(dict.fromkeys(Path(folder or ".").resolve() for folder in folders))


def _installed_as_minimind(folder: Path) -> str | None:
    """``folder`` 里有没有发行名是 minimind 的安装；有就返回一句话。"""
    for info in (*folder.glob("minimind-*.dist-info"), *folder.glob("minimind-*.egg-info")):
        try:
            origin = json.loads((info / "direct_url.json").read_text("utf-8"))["url"]
        except (OSError, ValueError, KeyError):  # 从索引装的没有这个文件
            origin = "公共索引，是别人的包"
        return f"{folder} 里装着 {info.stem}（来自 {origin}），与 {DISTRIBUTION} 抢同一个导入名 minimind"
    return None


def other_minimind() -> str | None:
    """环境里另有一份 ``minimind`` 时，一句话说清在哪里、怎么办；没有时返回 None。"""
    for folder in _search_path():
        if found := _installed_as_minimind(folder):
            return f"{found}；请先 pip uninstall minimind，再在仓库目录里 {install_command()}。"
        # 只认能导入的；同名的目录（克隆的上一级）与同名的可执行文件（命令本身）不是
        files = [
            file for file in (folder / "minimind" / "__init__.py", folder / "minimind.py") if file.is_file()
        ]
        other = next((file for file in files if file.resolve().parent != PACKAGE), None)
        if other is None:
            continue
        from importlib.metadata import packages_distributions  # 慢，只在真有另一份时才查

        owners = set(packages_distributions().get("minimind", [])) - {DISTRIBUTION}
        remedy = f"请先 pip uninstall {' '.join(sorted(owners))}，再" if owners else "要用哪一份，就"
        return f"正在用的是 {PACKAGE}，而 {other} 是另一份 minimind；{remedy}在它的仓库目录里 {install_command()}。"
    return None


@functools.cache
def warn_other_minimind() -> None:
    """有另一份 ``minimind`` 就往标准错误写一句；一个进程只查一次，多卡时只有第一个进程说。"""
    if os.environ.get("RANK", "0") == "0" and (found := other_minimind()):
        print(f"留意：{found}", file=sys.stderr)
