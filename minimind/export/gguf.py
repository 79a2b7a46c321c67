"""导出成 GGUF：llama.cpp、Ollama 直接能跑的单个文件。

llama 与 bailingmoe 结构的两个投影要换行序：llama.cpp 对它们把相邻两维当作一对来旋转，我们（与 Hugging Face）把前半与后半配对。
同一个头里第 i 与第 i+D/2 行挪到 2i 与 2i+1 行，q 与 k 同样换，点积不变。qwen3、qwen3moe 在 llama.cpp 里就是
前后半配对，不用换。

v2 的混合专家写成 bailingmoe：SwiGLU 专家、softmax 路由、选中的权重归不归一由元数据定、没有门的共享专家、没有 QK-norm，
逐项相同。llama.cpp 的 qwen2moe 不行：它从不归一，而且把 sigmoid(x) 算成 silu(x) / x，门为零时是 0/0。
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minimind.distribution import install_command
from minimind.errors import UserError
from minimind.export.files import whole_file
from minimind.export.gguf_tokenizer import write_tokenizer
from minimind.export.layouts import layout_of, normalises_experts, yarn_mscale, yarn_parameters
from minimind.export.shared_experts import PARTS, joined_shared
from minimind.export.source import Source, cast
from minimind.runtime.files import check_target

TYPES = {"f32": torch.float32, "f16": torch.float16, "q8_0": torch.float32}
ARCHES = {"llama": "llama", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"}
SHARED = "bailingmoe"  # 有共享专家的
SHARED_EXPERT = re.compile(r"model\.layers\.\d+\.mlp\.shared_experts\.\d+\.\w+\.weight")
EXPERT = re.compile(r"(model\.layers\.(\d+)\.mlp\.experts)\.(\d+)\.(\w+)\.weight")


def import_gguf() -> Any:
    """可选依赖，用到才导入。"""
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise UserError(
            "没有安装 gguf 包",
            expected="写 GGUF 要用它",
            fix=f"{install_command('export')}（或 pip install gguf）",
        ) from error


def export_gguf(source: Source, path: Path, kind: str = "f16", force: bool = False) -> str:
    """写出一个 GGUF 文件，返回它的结构名。

    Args:
        kind: ``f32``、``f16``，或 ``q8_0``（每 32 个数一组，共用一个 fp16 缩放，矩阵约 1.06 字节一个数）。
            一维的归一化权重与路由器总是 f32。

    Raises:
        UserError: 这种结构 llama.cpp 没有，文件已存在，没装 gguf，或分词器的预切分 llama.cpp 没有。
    """
    arch = _arch_of(source)
    check_target(path, force)
    gguf = import_gguf()
    with whole_file(path) as temporary:
        writer = gguf.GGUFWriter(str(temporary), arch)
        try:
            _write_metadata(writer, gguf, source, kind)
            write_tokenizer(writer, gguf, source)
            for name, value in _tensors(source, arch, gguf, TYPES[kind]):
                data, raw_dtype = _encode(name, value, kind, gguf)
                writer.add_tensor(name, data, raw_dtype=raw_dtype)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    return arch


def _arch_of(source: Source) -> str:
    config, layout = source.config, layout_of(source.config)
    if config.use_moe and config.arch == "v2" and config.n_shared_experts:
        return SHARED
    if layout not in ARCHES:
        raise UserError(
            f"llama.cpp 没有这种混合专家（{config.arch}，{config.n_shared_experts} 个共享专家）的结构",
            where=str(source.path),
            expected="稠密模型，有共享专家的 v2 混合专家，或没有共享专家的 v3 混合专家",
            fix="用 minimind export hf 导出带模型文件的目录",
        )
    if layout == "qwen3_moe" and not config.norm_topk_prob:
        raise UserError(
            "norm_topk_prob=False，而 llama.cpp 的 qwen3moe 总是把选中专家的权重归一，输出会不同",
            where=str(source.path),
            fix="用 minimind export hf 导出",
        )
    return ARCHES[layout]


def _write_metadata(writer: Any, gguf: Any, source: Source, kind: str) -> None:
    config = source.config
    writer.add_type("model")
    writer.add_name(source.path.stem)
    count = sum(value.numel() for value in source.state.values())
    writer.add_size_label(f"{count / 1e6:.0f}M")
    file_type = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}[kind]
    writer.add_file_type(getattr(gguf.LlamaFileType, file_type))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    if config.use_moe:
        writer.add_expert_count(config.n_routed_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        if config.n_shared_experts:
            writer.add_leading_dense_block_count(0)
            writer.add_expert_shared_count(config.n_shared_experts)
            writer.add_expert_weights_norm(normalises_experts(config))
            writer.add_expert_weights_scale(1.0)
    if config.inference_rope_scaling:
        scaling = yarn_parameters(config)
        factor = scaling["factor"]
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(factor)
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(scaling["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(scaling["beta_slow"])
        # llama.cpp 乘的是 attn_factor · yarn_mscale(factor)，先除掉后一项
        writer.add_rope_scaling_attn_factors(scaling["attention_factor"] / yarn_mscale(factor))


def _tensors(source: Source, arch: str, gguf: Any, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """依次给出（GGUF 的名字，张量）；专家的各个矩阵叠成 [E, 出, 入]。"""
    config = source.config
    model_arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(model_arch, config.num_hidden_layers)

    def gguf_name(key: str) -> str:
        name = names.get_name(key, try_suffixes=(".weight",))
        if name is None:
            raise UserError(f"llama.cpp 的 {arch} 没有与 {key} 对应的张量", where=str(source.path))
        return name

    stacks: dict[str, list[Tensor]] = {}
    state = cast(source.state, dtype, str(source.path))
    if arch == SHARED:
        for layer in range(config.num_hidden_layers):
            for part in PARTS:
                whole = f"model.layers.{layer}.mlp.shared_experts.{part}.weight"
                state[whole] = joined_shared(state, layer, part, config.n_shared_experts)
        state = {key: value for key, value in state.items() if not SHARED_EXPERT.fullmatch(key)}
        state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])  # 这种结构不认共享的输出头
    for key, value in state.items():
        match = EXPERT.fullmatch(key)
        if match:
            whole = f"{match[1]}.{match[4]}.weight"
            stacks.setdefault(whole, []).append(value)
            if len(stacks[whole]) == config.n_routed_experts:
                yield gguf_name(whole), torch.stack(stacks.pop(whole))
            continue
        if arch in ("llama", SHARED) and key.endswith(("q_proj.weight", "k_proj.weight")):
            value = interleave_rope_rows(value, config.head_dim)
        yield gguf_name(key), value


def interleave_rope_rows(weight: Tensor, head_dim: int) -> Tensor:
    """[heads·D, H]：每个头里前半与后半的行交错，第 i 与 i+D/2 行成为第 2i 与 2i+1 行。"""
    return (
        weight.view(-1, 2, head_dim // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape).contiguous()
    )


def _encode(name: str, value: Tensor, kind: str, gguf: Any) -> tuple[np.ndarray, Any]:
    """张量 → 要写的数组与它的类型。"""
    if value.ndim == 1 or name.endswith("ffn_gate_inp.weight"):
        return value.float().numpy(), None
    data = value.numpy()
    if kind != "q8_0":
        return data, None
    if data.shape[-1] % 32:  # 一组 32 个数凑不齐，退回 f16
        return data.astype(np.float16), None
    quantized = gguf.GGMLQuantizationType.Q8_0
    return gguf.quants.quantize(data, quantized), quantized
