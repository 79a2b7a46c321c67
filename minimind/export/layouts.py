"""本项目的配置与 Hugging Face 各结构的配置，两个方向。

稠密 v2 就是 Llama，稠密 v3 就是 Qwen3，v3 的混合专家（没有共享专家）就是 Qwen3-MoE：权重名与计算都相同，一个张量也不用改。
v2 的混合专家有总是参与的共享专家，写成 Qwen2-MoE（:mod:`minimind.export.shared_experts`）。别的组合没有同构的公开结构，
只能带着自己的模型文件走；要它也可以明说（``--layout minimind``）。
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from minimind.errors import UserError
from minimind.model import MiniMindConfig
from minimind.model.model_minimind import rope_frequencies
from minimind.runtime.checkpoint import config_dict

NATIVE = "minimind"  # 带模型文件的目录
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    NATIVE: "MiniMindForCausalLM",
}


def layout_of(config: MiniMindConfig) -> str:
    """这份配置与哪个公开结构逐项相同：``llama``、``qwen3``、``qwen3_moe``、``qwen2_moe``；都不是就是 ``minimind``。"""
    if config.use_moe:
        if config.arch == "v3":
            return NATIVE if config.n_shared_experts else "qwen3_moe"
        # vLLM 的 Qwen2-MoE 不看 head_dim，总是宽度除以头数
        plain_heads = config.head_dim * config.num_attention_heads == config.hidden_size
        return "qwen2_moe" if config.n_shared_experts and plain_heads else NATIVE
    return {"v2": "llama", "v3": "qwen3"}[config.arch]


# ---------------------------------------------------------------- 写出


def hf_config(config: MiniMindConfig, dtype: torch.dtype, layout: str | None = None) -> dict[str, Any]:
    """``config.json`` 的内容；``layout`` 见 :func:`layout_of`，默认由它定。

    新旧两种写法都在：transformers 5 读 ``rope_parameters`` 与 ``dtype``，4.x 与许多别的程序读 ``rope_theta``、
    ``rope_scaling`` 与 ``torch_dtype``。
    """
    layout, precision = layout or layout_of(config), str(dtype).removeprefix("torch.")
    common = {"architectures": [ARCHITECTURES[layout]], "dtype": precision, "torch_dtype": precision}
    if layout == NATIVE:
        classes = {"AutoConfig": "MiniMindConfig", "AutoModelForCausalLM": "MiniMindForCausalLM"}
        auto_map = {auto: f"model_minimind.{name}" for auto, name in classes.items()}
        return {**config_dict(config), **common, "auto_map": auto_map}
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range",
        "rms_norm_eps", "rope_theta", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    scaling = yarn_parameters(config) if config.inference_rope_scaling else None
    raw = {
        **common,
        "model_type": layout,
        **{name: getattr(config, name) for name in names},
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": config.rope_theta, **(scaling or {"rope_type": "default"})},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
    }
    if layout == "llama":
        return raw | {"mlp_bias": False}
    raw |= {
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": config.num_hidden_layers,
    }
    if layout in ("qwen3_moe", "qwen2_moe"):
        raw |= {
            "num_experts": config.n_routed_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "moe_intermediate_size": config.moe_intermediate_size,
            "norm_topk_prob": normalises_experts(config),
            "router_aux_loss_coef": config.aux_loss_alpha,
            "output_router_logits": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    if layout == "qwen2_moe":
        raw |= {
            "qkv_bias": True,  # 写出的偏置是零；有的实现总当它有
            "shared_expert_intermediate_size": config.n_shared_experts * config.moe_intermediate_size,
        }
    return raw


def normalises_experts(config: MiniMindConfig) -> bool:
    """选中的专家的权重归不归一；v2 只选一个时不归（归了就总是 1）。"""
    return bool(config.norm_topk_prob and (config.arch == "v3" or config.num_experts_per_tok > 1))


def yarn_mscale(factor: float) -> float:
    """vLLM、llama.cpp 的 YaRN 自己会乘的注意力系数：1 + 0.1·ln(factor)，factor 不超过 1 时是 1。"""
    return 1.0 if factor <= 1 else 1.0 + 0.1 * math.log(factor)


def yarn_parameters(config: MiniMindConfig) -> dict[str, Any]:
    """YaRN 的标准写法。cos、sin 上乘的系数两家的键不同：transformers 读 ``attention_factor``，乘的就是它；vLLM 读
    ``attn_factor``，乘的是 ``yarn_mscale(factor) · attn_factor``（新版也认 ``attention_factor``，有它就只用它）。两个都写。

    别人的公式把过渡带的上界卡在 D-1，这里卡在 D/2-1，碰到界时频率不同，那就不写。

    Raises:
        UserError: 这组参数在两边算出的频率不同。
    """
    yarn = config.yarn
    theirs = _standard_yarn_frequencies(config)
    if not torch.allclose(rope_frequencies(config), theirs, rtol=1e-5, atol=0):
        raise UserError(
            f"YaRN 参数 {yarn} 的过渡带超出了维数，公开的实现会算出不同的频率",
            fix="不加 --inference_rope_scaling 导出，到推理框架里再设外推",
        )
    keys = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor")
    return {
        "rope_type": "yarn",
        "type": "yarn",
        **{key: yarn[key] for key in keys},
        "attn_factor": yarn["attention_factor"] / yarn_mscale(yarn["factor"]),
    }


def _standard_yarn_frequencies(config: MiniMindConfig) -> torch.Tensor:
    """transformers、vLLM、llama.cpp 共同的 YaRN 频率 [D/2]。"""
    yarn, dim, base = config.yarn, config.head_dim, config.rope_theta
    window = yarn["original_max_position_embeddings"]
    low, high = (
        dim * math.log(window / (turns * 2 * math.pi)) / (2 * math.log(base))
        for turns in (yarn["beta_fast"], yarn["beta_slow"])
    )
    low, high = max(math.floor(low), 0), min(math.ceil(high), dim - 1)
    freq = base ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    ramp = ((torch.arange(dim // 2) - low) / max(high - low, 1e-3)).clamp(0, 1)
    return freq * (1 - ramp) + freq / yarn["factor"] * ramp


# ---------------------------------------------------------------- 读入

# 值不同就算不对的项：本项目没有对应的计算
_MUST_BE = {
    "llama": {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"},
    "qwen3": {"attention_bias": False, "use_sliding_window": False, "hidden_act": "silu"},
    "qwen3_moe": {
        "attention_bias": False, "use_sliding_window": False, "hidden_act": "silu", "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "qwen2_moe": {
        "use_sliding_window": False, "hidden_act": "silu", "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
}  # fmt: skip
_SUPPORTED = "llama、qwen3、qwen3_moe、本项目导出的 qwen2_moe，或 minimind"


def config_from_hf(raw: dict[str, Any], where: Path) -> MiniMindConfig:
    """``config.json`` → 本项目的配置。

    Args:
        raw: 文件内容；``model_type`` 为 ``minimind`` 的（公共项目的目录）要先补好 ``arch``。

    Raises:
        UserError: 结构不认识，或用了这里没有的功能，指出是哪一项。
    """
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise UserError(
            f"model_type 是 {kind!r}", where=str(where), expected=_SUPPORTED, fix="只能导入这几种结构的模型"
        )
    try:
        return MiniMindConfig(**(_native_options(raw) if kind == NATIVE else _options(raw, kind, where)))
    except UserError:
        raise
    except Exception as error:  # transformers 对坏配置抛的类型五花八门
        reason = " ".join(f"{type(error).__name__} {error}".split())[:200]
        raise UserError(
            f"配置不成立（{reason}）", where=str(where), fix="检查这份配置是否被改过，或重新下载"
        ) from error


def _native_options(raw: dict[str, Any]) -> dict[str, Any]:
    skip = ("architectures", "auto_map", "model_type", "transformers_version", "dtype", "torch_dtype")
    return {key: value for key, value in raw.items() if key not in skip and value is not None}


def _options(raw: dict[str, Any], kind: str, where: Path) -> dict[str, Any]:
    from transformers import AutoConfig

    hf = AutoConfig.for_model(**{key: v for key, v in raw.items() if key != "auto_map"})  # 缺的项由它补默认值
    for key, wanted in _MUST_BE[kind].items():
        if getattr(hf, key, wanted) != wanted:
            raise UserError(
                f"{key} 是 {getattr(hf, key)!r}",
                where=str(where),
                expected=repr(wanted),
                fix="本项目的模型没有这个功能，不能导入",
            )
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "initializer_range", "rms_norm_eps",
        "tie_word_embeddings",
    )  # fmt: skip
    options = {name: getattr(hf, name) for name in names} | {"head_dim": getattr(hf, "head_dim", None)}
    options |= _rope_options(hf.rope_parameters, where)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token = getattr(hf, name)
        token = token[0] if isinstance(token, list) else token
        if token is not None or name == "bos_token_id":  # Qwen 没有 bos
            options[name] = token
    options["arch"] = "v2" if kind in ("llama", "qwen2_moe") else "v3"
    if kind in ("qwen3_moe", "qwen2_moe"):
        options |= {
            "use_moe": True,
            "n_routed_experts": hf.num_experts,
            "num_experts_per_tok": hf.num_experts_per_tok,
            "moe_intermediate_size": hf.moe_intermediate_size,
            "norm_topk_prob": hf.norm_topk_prob,
            "n_shared_experts": _shared_count(hf, where) if kind == "qwen2_moe" else 0,
            "aux_loss_alpha": hf.router_aux_loss_coef,
        }
    return options


def _shared_count(hf: Any, where: Path) -> int:
    """Qwen2-MoE 的一个共享专家当作几个与路由专家等宽的。"""
    count, rest = divmod(hf.shared_expert_intermediate_size, hf.moe_intermediate_size)
    if rest or not count:
        raise UserError(
            f"shared_expert_intermediate_size 是 {hf.shared_expert_intermediate_size}",
            where=str(where),
            expected=f"moe_intermediate_size（{hf.moe_intermediate_size}）的整数倍",
            fix="本项目的共享专家与路由专家等宽，不能导入",
        )
    return count


def _rope_options(rope: dict[str, Any], where: Path) -> dict[str, Any]:
    kind, partial = rope.get("rope_type", "default"), rope.get("partial_rotary_factor", 1.0)
    if kind not in ("default", "yarn") or partial != 1.0:
        raise UserError(
            f"rope_scaling 是 {rope}",
            where=str(where),
            expected="不缩放，或 yarn；全部维度都旋转",
            fix="本项目没有别的位置编码，不能导入",
        )
    options: dict[str, Any] = {"rope_theta": rope["rope_theta"]}
    if kind == "yarn":
        yarn = {
            "factor": rope["factor"],
            "original_max_position_embeddings": rope["original_max_position_embeddings"],
            "beta_fast": rope.get("beta_fast") or 32.0,
            "beta_slow": rope.get("beta_slow") or 1.0,
            "attention_factor": rope.get("attention_factor") or 0.1 * math.log(rope["factor"]) + 1.0,
        }
        options |= {"inference_rope_scaling": True, "rope_scaling": yarn}
    return options
