"""数据：校验、分词缓存、打包、五个数据集。

名字用到时才导入：分词子进程只需要其中几个模块，不该为此载入 torch。
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "DataError": "jsonl",
    "TokenCache": "token_cache",
    "build_cache": "cache",
    "cache_root": "cache",
    "DATASETS": "lm_dataset",
    "DPODataset": "preferences",
    "KTODataset": "preferences",
    "PretrainDataset": "packed",
    "RLAIFDataset": "lm_dataset",
    "SFTDataset": "packed",
    "collate_dpo": "collate",
    "collate_packed": "packed",
    "collate_rl": "collate",
    "detect_kind": "schema",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"模块 {__name__} 没有 {name}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
