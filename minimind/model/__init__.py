"""模型：配置、结构、有名字的尺寸。不引用项目里的其他部分。"""

from minimind.model.model_minimind import (
    IGNORE_INDEX,
    MiniMindConfig,
    MiniMindForCausalLM,
    MiniMindOutput,
    linear_cross_entropy,
)
from minimind.model.presets import PRESETS, count_parameters, flops_per_token, preset

__all__ = [
    "IGNORE_INDEX",
    "PRESETS",
    "MiniMindConfig",
    "MiniMindForCausalLM",
    "MiniMindOutput",
    "count_parameters",
    "flops_per_token",
    "linear_cross_entropy",
    "preset",
]
