"""MiniMind：从空目录到能对话的小语言模型，每一行都用纯 PyTorch 写成。"""

import importlib
import os
from collections.abc import Callable, Mapping
from typing import Any

__version__ = "0.1.0"

# oneDNN 给每种形状的矩阵乘留一份编译好的内核，约 1.3 MB，默认留 1,024 份。强化学习每步的行数都不同，不设上限会多占
# 一个多 GB；重编一份只要 0.2 毫秒，留 128 份就够。torch 在头一次用到时才读这两个变量，所以写在最先载入的地方
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
os.environ.setdefault("LRU_CACHE_CAPACITY", "128")


def names_on_use(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """一个包的 ``__getattr__``：名字用到时才导入它所在的文件。

    Args:
        package: 包的 ``__name__``。
        homes: ``{名字: 包里的哪个文件}``；包里这张表叫 ``_HOMES``，scripts/source_imports.py 也读它。
    """

    def take(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"模块 {package} 没有 {name}")
        return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)

    return take
