"""模型：配置、结构、有名字的尺寸。不引用项目里的其他部分。"""

from typing import Any

from minimind.model.kernels import linear_cross_entropy
from minimind.model.model_minimind import IGNORE_INDEX, MiniMindConfig, MiniMindLM, MiniMindOutput
from minimind.model.presets import PRESETS, count_parameters, flops_per_token, preset

__all__ = [
    "IGNORE_INDEX",
    "PRESETS",
    "MiniMindConfig",
    "MiniMindForCausalLM",
    "MiniMindLM",
    "MiniMindOutput",
    "count_parameters",
    "flops_per_token",
    "linear_cross_entropy",
    "preset",
]


def __getattr__(name: str) -> Any:  # 见 model_minimind：用到才读 transformers 的模型基类
    if name == "MiniMindForCausalLM":
        from minimind.model.hf import MiniMindForCausalLM

        return MiniMindForCausalLM
    raise AttributeError(f"{__name__} 里没有 {name}")
