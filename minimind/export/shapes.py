"""从权重的键与形状认出配置：公共项目的 ``.pth`` 没有旁注，尺寸只能从这里看。"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minimind.errors import UserError
from minimind.model import MiniMindConfig


def arch_of(state: dict[str, Tensor]) -> str:
    """有 QK-norm 的是 v3。"""
    return "v3" if any(key.endswith("q_norm.weight") for key in state) else "v2"


def config_of_state(
    state: dict[str, Tensor], path: Path, options: dict[str, Any], notes: list[str]
) -> MiniMindConfig:
    """形状 → 配置。层数、宽度、词表、专家数都看得出来；v2 的头数与每词元专家数看不出来。"""

    def shape(key: str) -> tuple[int, ...]:
        if key not in state:
            raise UserError(
                f"没有 {key}（第一个键是 {next(iter(state), '空')}）",
                where=str(path),
                expected="MiniMind2 及以后的权重名",
                fix="更早的版本结构不同，不能导入；LoRA 文件放进 out/lora/ 直接用 --lora_weight",
            )
        return tuple(state[key].shape)

    layer = "model.layers.0."
    vocab_size, hidden_size = shape("model.embed_tokens.weight")
    q_width, kv_width = (shape(f"{layer}self_attn.{name}_proj.weight")[0] for name in "qk")
    arch = arch_of(state)
    given = {key: value for key, value in options.items() if value is not None}
    for key, value in given.items():
        if value <= 0:
            raise UserError(f"--{key}={value} 应当大于 0", fix="写出训练时的值，或不写")
    if arch == "v3":
        head_dim = shape(f"{layer}self_attn.q_norm.weight")[0]
        heads = q_width // head_dim
    else:
        heads = given.get("num_attention_heads", 8)
        head_dim = q_width // heads
        if "num_attention_heads" not in given:
            notes.append(f"注意力头数按公共项目的 {heads} 个；不是的话加 --num_attention_heads")
    if heads * head_dim != q_width or kv_width % head_dim:
        raise UserError(
            f"q_proj 有 {q_width} 行、k_proj 有 {kv_width} 行，分不成 {heads} 个头",
            where=str(path),
            fix="用 --num_attention_heads 写出训练时的头数",
        )
    layers = {int(m[1]) for key in state if (m := re.match(r"model\.layers\.(\d+)\.", key))}
    fields = {
        "arch": arch,
        "hidden_size": hidden_size,
        "vocab_size": vocab_size,
        "num_hidden_layers": max(layers) + 1,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_width // head_dim,
        "head_dim": head_dim,
        "tie_word_embeddings": is_tied(state),
    }
    if f"{layer}mlp.gate.weight" in state:
        shared = {m[1] for key in state if (m := re.match(rf"{layer}mlp\.shared_experts\.(\d+)\.", key))}
        fields |= {
            "use_moe": True,
            "n_routed_experts": shape(f"{layer}mlp.gate.weight")[0],
            "n_shared_experts": len(shared),
            "moe_intermediate_size": shape(f"{layer}mlp.experts.0.gate_proj.weight")[0],
        }
    else:
        fields["intermediate_size"] = shape(f"{layer}mlp.gate_proj.weight")[0]
    try:
        config = MiniMindConfig(**{**fields, **given})
    except ValueError as error:
        raise UserError(str(error), where=str(path), fix="检查 --num_attention_heads") from error
    if config.use_moe and "num_experts_per_tok" not in given:
        notes.append(f"每词元专家数按默认的 {config.num_experts_per_tok}；不是的话加 --num_experts_per_tok")
    if "rope_theta" not in given:
        notes.append(f"rope_theta 按公共项目的 {config.rope_theta:g}；不是的话加 --rope_theta")
    return config


def is_tied(state: dict[str, Tensor]) -> bool:
    """输出头与词嵌入是不是同一份：文件里没有输出头，或两者逐位相同。"""
    head, embed = state.get("lm_head.weight"), state.get("model.embed_tokens.weight")
    return head is None or (embed is not None and torch.equal(head, embed))
