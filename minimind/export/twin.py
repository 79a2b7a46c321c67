"""transformers 里同构的模型：同一份配置、同一份权重，两边逐项核对、比速度时用。"""

from __future__ import annotations

from typing import Any

import torch

from minimind.export.layouts import hf_config
from minimind.model import MiniMindLM


def transformers_twin(model: MiniMindLM, **changes: Any) -> torch.nn.Module:
    """``LlamaForCausalLM`` 或 ``Qwen3ForCausalLM``，权重抄自 ``model``；只收稠密模型（专家的存法两边不同）。

    Args:
        changes: 换掉的配置项，例如 ``attn_implementation="sdpa"``。
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    # 不设补齐词元：设了它，transformers 就不给那一行嵌入求梯度
    options = {**hf_config(model.config, torch.float32), "pad_token_id": None, **changes}
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    twin = AutoModelForCausalLM.from_config(config)
    twin.load_state_dict(model.state_dict())
    return twin
