"""数据：校验、分词缓存、打包、五个数据集。

名字用到时才导入：分词子进程只需要其中几个模块，不该为此载入 torch。
"""

from __future__ import annotations

from minimind import names_on_use

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
__getattr__ = names_on_use(__name__, _HOMES)
