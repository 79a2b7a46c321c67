"""看一份权重：是不是真的权重（凡从磁盘来的都过这里，坏的在装进模型之前就说）；公共项目的 ``.pth`` 没有旁注，
尺寸只能从键与形状认。
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minimind.errors import UserError
from minimind.model import MiniMindConfig

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LAYER_KEY = re.compile(r"model\.layers\.(\d+)\.")
# 看得出来、命令行上也能写的几项
VISIBLE = ("arch", "hidden_size", "num_hidden_layers", "use_moe")


# ---------------------------------------------------------------- 是不是真的权重


def check_plain(state: Any, where: Path | str, fix: str = "续训存档请用 --from_resume 1 读取") -> None:
    """``state`` 是普通的权重字典：键是文字，值是浮点张量，每个数都有限。

    Args:
        fix: 里面是别的东西时怎么办。

    Raises:
        UserError: 指出文件、键、看到什么。
    """
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError("里面不是普通的权重字典", where=str(where), expected="参数名 → 张量", fix=fix)
    for key, value in state.items():
        if not isinstance(key, str):
            raise UserError(
                f"有一个键是 {key!r}（{type(key).__name__}）",
                where=str(where),
                expected="键都是参数名，例如 model.norm.weight",
                fix="这不是模型的 state_dict()，换一个文件",
            )
        if value.dtype not in DTYPES or value.layout != torch.strided:
            raise UserError(
                f"{key} {tuple(value.shape)} 的类型是 {_name(value.dtype)}（{_name(value.layout)}）",
                where=str(where),
                expected="、".join(map(_name, DTYPES)) + "，稠密的（strided）",
                fix="量化过的权重要先还原成浮点；推理时量化用 --quantize int8",
            )
        if not torch.isfinite(value).all():
            bad = value[~torch.isfinite(value)]
            raise UserError(
                f"{key} {tuple(value.shape)} 里有 {bad.numel():,} 个数是 NaN 或无穷",
                where=str(where),
                expected="每个数都有限",
                fix="训练已经发散，或文件坏了：换一份权重，或减小 --learning_rate 重新训练",
            )


def check_tied(model: nn.Module, state: Mapping[str, Tensor], where: Path) -> None:
    """模型共享的两份权重，文件里若都有就必须相等：绑上会丢掉一份。

    Raises:
        UserError: 指出文件、两个键。
    """
    for head, embedding in getattr(model, "tied_keys", {}).items():
        if head not in state or embedding not in state or torch.equal(state[head], state[embedding]):
            continue
        raise UserError(
            f"{head} {tuple(state[head].shape)} 与 {embedding} {tuple(state[embedding].shape)} 不相等",
            where=str(where),
            expected="两者相同（tie_word_embeddings=true：输出头与词嵌入是同一份权重）",
            fix=f"这份权重没有共享：先运行 minimind import {where}，它从内容认出来，旁注里写上 tie_word_embeddings=false",
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------- 键与形状


def arch_of(state: Mapping[str, Tensor]) -> str:
    """有 QK-norm 的是 v3。"""
    return "v3" if any(key.endswith("q_norm.weight") for key in state) else "v2"


def layer_count(state: Mapping[str, Tensor]) -> int:
    return len({match[1] for key in state if (match := LAYER_KEY.match(key))})


def is_tied(state: Mapping[str, Tensor]) -> bool:
    """输出头与词嵌入是不是同一份：文件里没有输出头，或两者逐位相同。"""
    head, embed = state.get("lm_head.weight"), state.get("model.embed_tokens.weight")
    return head is None or (embed is not None and torch.equal(head, embed))


def visible_sizes(state: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """键与形状里看得见的：:data:`VISIBLE` 各项与词表大小。

    Raises:
        UserError: 不是 MiniMind 的权重。
    """
    embed = _shape(state, "model.embed_tokens.weight", path)
    if len(embed) != 2:
        raise UserError(f"model.embed_tokens.weight 的形状是 {embed}", where=str(path), expected="[词表, 宽]")
    return {
        "arch": arch_of(state),
        "hidden_size": embed[1],
        "num_hidden_layers": layer_count(state),
        "use_moe": any(".mlp.experts." in key for key in state),
        "vocab_size": embed[0],
    }


def check_visible(
    state: Mapping[str, Tensor], given: Mapping[str, Any], path: Path, prefix: str = ""
) -> None:
    """命令行写明的尺寸与权重里看得见的必须一致，免得报出一串形状。

    Args:
        given: 配置项 → 写明的值，``None`` 是没写。
        prefix: 参数名的前缀，例如 ``teacher_``。

    Raises:
        UserError: 说出每一个不符的参数与权重里的值。
    """
    seen = visible_sizes(state, path)
    wrong = [name for name in VISIBLE if given.get(name) is not None and given[name] != seen[name]]
    if wrong:
        raise UserError(
            "，".join(f"{name} 权重里是 {seen[name]!r}、要的是 {given[name]!r}" for name in wrong),
            where=str(path),
            expected="尺寸与权重一致",
            fix="写成 "
            + " ".join(
                f"--{prefix}{name} {int(seen[name]) if name == 'use_moe' else seen[name]}" for name in wrong
            )
            + "，或换一份权重",
        )


def _shape(state: Mapping[str, Tensor], key: str, path: Path) -> tuple[int, ...]:
    if key not in state:
        raise UserError(
            f"没有 {key}（第一个键是 {next(iter(state), '空')}）",
            where=str(path),
            expected="MiniMind2 及以后的权重名",
            fix="更早的版本结构不同，打不开；LoRA 文件放进 out/lora/ 直接用 --lora_weight",
        )
    return tuple(state[key].shape)


def config_of_state(
    state: Mapping[str, Tensor], path: Path, options: Mapping[str, Any], notes: list[str]
) -> MiniMindConfig:
    """形状 → 配置。结构、层数、宽度、词表、专家数都看得出来；v2 的头数与每词元专家数看不出来。

    Args:
        options: 写明的配置项，``None`` 是没写；看得见的必须与权重一致。
        notes: 靠默认值定下的事记在这里。

    Raises:
        UserError: 不是 MiniMind 的权重，或写明的与看见的不符。
    """

    def shape(key: str) -> tuple[int, ...]:
        return _shape(state, key, path)

    given = {key: value for key, value in options.items() if value is not None}
    for key, value in given.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value <= 0:
            raise UserError(f"--{key}={value} 应当大于 0", fix="写出训练时的值，或不写")
    check_visible(state, given, path)
    layer = "model.layers.0."
    q_width, kv_width = (shape(f"{layer}self_attn.{name}_proj.weight")[0] for name in "qk")
    fields = visible_sizes(state, path)
    if fields["arch"] == "v3":
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
    fields |= {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_width // head_dim,
        "head_dim": head_dim,
        "tie_word_embeddings": is_tied(state),
    }
    if fields["use_moe"]:
        shared = {m[1] for key in state if (m := re.match(rf"{layer}mlp\.shared_experts\.(\d+)\.", key))}
        fields |= {
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
