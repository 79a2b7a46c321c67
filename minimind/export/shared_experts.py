"""v2 混合专家与 Qwen2-MoE：两边的共享专家写法不同，权重一一对应。

Qwen2-MoE 的共享专家只有一个，输出乘 sigmoid(gate · x)。门写成零，sigmoid(0) = 1/2，down_proj 写成两倍，乘积就是原来的：
乘除 2 在二进制里是精确的，来回一位不差。几个共享专家的宽度首尾相接就是一个（SwiGLU 逐维独立，down_proj 对各维求和）。
Qwen2-MoE 的 q、k、v 有偏置，写成零。
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from minimind.errors import UserError
from minimind.model import MiniMindConfig

PARTS = ("gate_proj", "up_proj", "down_proj")
_BIAS = re.compile(r"model\.layers\.\d+\.self_attn\.[qkv]_proj\.bias")


def joined_shared(state: dict[str, Tensor], layer: int, part: str, count: int) -> Tensor:
    """一层的几个共享专家接成一个：gate、up ``[count·宽, H]``，down ``[H, count·宽]``。"""
    weights = [state[f"model.layers.{layer}.mlp.shared_experts.{i}.{part}.weight"] for i in range(count)]
    return torch.cat(weights, dim=1 if part == "down_proj" else 0)


def to_qwen2_moe(state: dict[str, Tensor], config: MiniMindConfig) -> dict[str, Tensor]:
    """本项目的权重 → Qwen2-MoE 的。"""
    result = {key: value for key, value in state.items() if ".mlp.shared_experts." not in key}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for part in PARTS:
            value = joined_shared(state, layer, part, config.n_shared_experts)
            result[f"{prefix}mlp.shared_expert.{part}.weight"] = value * 2 if part == "down_proj" else value
        result[f"{prefix}mlp.shared_expert_gate.weight"] = value.new_zeros(1, config.hidden_size)
        for name in "qkv":
            weight = state[f"{prefix}self_attn.{name}_proj.weight"]
            result[f"{prefix}self_attn.{name}_proj.bias"] = weight.new_zeros(len(weight))
    return result


def from_qwen2_moe(state: dict[str, Tensor], config: MiniMindConfig, where: Path) -> dict[str, Tensor]:
    """:func:`to_qwen2_moe` 的逆；键与形状由调用的人接着核对。

    Raises:
        UserError: 共享专家的门或 q、k、v 的偏置不是零：本项目的模型没有这两样。
    """
    result = {}
    for key, value in state.items():
        if _BIAS.fullmatch(key) or key.endswith(".mlp.shared_expert_gate.weight"):
            if value.any():
                raise UserError(
                    f"{key} 不是零",
                    where=str(where),
                    expected="共享专家的门与 q、k、v 的偏置都是零（本项目导出的目录）",
                    fix="本项目的模型没有这个功能，不能导入",
                )
            continue
        head, shared, part = key.rpartition(".mlp.shared_expert.")
        if not shared:
            result[key] = value
            continue
        down = part.startswith("down_proj")
        pieces = value.chunk(config.n_shared_experts, dim=1 if down else 0)
        for i, piece in enumerate(pieces):
            result[f"{head}.mlp.shared_experts.{i}.{part}"] = (piece / 2 if down else piece).contiguous()
    return result
