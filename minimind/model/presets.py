"""有名字的尺寸。参数量见每行注释，测试里逐个核对。"""

from __future__ import annotations

from typing import Any

from minimind.model.model_minimind import MiniMindConfig

PRESETS: dict[str, dict[str, Any]] = {
    # 3,590,592：演示与测试，CPU 上几分钟
    "tiny": dict(hidden_size=192, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=2),
    "small": dict(hidden_size=512, num_hidden_layers=8),  # 25,829,888
    "base": dict(hidden_size=768, num_hidden_layers=16),  # 104,030,976
    "moe": dict(hidden_size=640, num_hidden_layers=8, use_moe=True),  # 145,029,760
}


def preset(name: str, **overrides: Any) -> MiniMindConfig:
    """按名字取配置，`overrides` 覆盖其中的项（例如 `arch="v3"`）。

    Raises:
        ValueError: 没有这个名字。
    """
    if name not in PRESETS:
        raise ValueError(f"没有叫 {name!r} 的尺寸，可选：{'、'.join(PRESETS)}")
    return MiniMindConfig(**{**PRESETS[name], **overrides})
