"""为使用而打开一个模型：本项目的 .pth（尺寸从旁注里认）或 Hugging Face 目录。"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minimind.console import say
from minimind.errors import UserError
from minimind.inference.int8 import quantize_int8
from minimind.model import MiniMindConfig, count_parameters
from minimind.paths import folder_problem, resolve_path
from minimind.runtime.adapters import adapter_names, merge_adapters
from minimind.runtime.device import choose_dtype, device_name, resolve_device
from minimind.runtime.weights import find_weights, missing_weights, open_weights, weights_file
from minimind.runtime.weights_check import check_plain
from minimind.tokenizer import load_tokenizer
from minimind.tokenizer.loading import codec_of
from minimind.tokenizer.special import IM_END

# --load_from 的这几种写法都指本项目的 .pth（公共项目的默认值是 model）
NATIVE = ("model", "./model", "../model")


@dataclass
class Loaded:
    """可以直接生成的模型。

    Args:
        model: 在目标设备上、eval 状态。
        plain: 真为只会续写的预训练权重，假为会对话的权重。
        source: 权重文件或目录，用于显示。
    """

    model: torch.nn.Module
    tokenizer: Any
    plain: bool
    source: Path


def stop_ids(model: torch.nn.Module, tokenizer: Any) -> set[int]:
    """遇到就停的 token：分词器的结束符、对话回合的结束符、模型配置里写的结束符。"""
    configured = getattr(model.config, "eos_token_id", None)
    ids = configured if isinstance(configured, (list, tuple)) else [configured]
    ids = {*ids, tokenizer.eos_token_id, codec_of(tokenizer).controls.get(IM_END)}
    return {int(token) for token in ids if token is not None}


def load_for_inference(
    *,
    load_from: str = "model",
    save_dir: str = "out",
    weight: str = "full_sft",
    lora_weight: str = "None",
    hidden_size: int | None = None,
    num_hidden_layers: int | None = None,
    use_moe: int | None = None,
    arch: str | None = None,
    tokenizer_path: str | None = None,
    inference_rope_scaling: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str = "none",
) -> Loaded:
    """按 :mod:`eval_llm` 的参数打开模型；尺寸参数为 ``None`` 时由权重旁的 JSON 决定。

    ``quantize="int8"`` 在最后把线性层换成 int8 的（:mod:`minimind.inference.int8`）。
    ``lora_weight`` 里的各份 LoRA 在 fp32 下依次合并进权重（W + Δ₁ + Δ₂ + …），之后再转成推理精度，生成时不多花计算。

    Raises:
        UserError: 设备不可用、权重不存在、尺寸不符、目录不是模型。
    """
    target = resolve_device(device)
    if load_from in NATIVE:
        sizes = {
            "hidden_size": hidden_size,
            "num_hidden_layers": num_hidden_layers,
            "use_moe": None if use_moe is None else bool(use_moe),
            "arch": arch,
        }
        loaded = _load_native(weight, save_dir, sizes, tokenizer_path, inference_rope_scaling)
        merge_adapters(loaded.model, adapter_names(lora_weight), save_dir)
    elif adapter_names(lora_weight):
        raise UserError(
            f"--lora_weight {lora_weight} 只能叠加在本项目的 .pth 权重上",
            where=f"--load_from {load_from}",
            fix="去掉 --load_from，或先用 minimind export merge 把 LoRA 合并进去",
        )
    else:
        loaded = _load_folder(load_from, weight, tokenizer_path)
    precision = choose_dtype(dtype, target)
    loaded.model.to(target, precision).eval().requires_grad_(False)
    parameters, label = count_parameters(loaded.model), str(precision).removeprefix("torch.")
    if quantize == "int8":
        quantize_int8(loaded.model)
        label = f"int8 权重，其余 {label}"
    say(f"{loaded.source}：{parameters / 1e6:.2f}M 参数，{device_name(target)}，{label}")
    return loaded


def _load_native(weight, save_dir, sizes, tokenizer_path, inference_rope_scaling) -> Loaded:
    if weight.endswith(".pth"):
        path = weights_file(weight)
    else:
        path = find_weights(weight, save_dir, sizes["hidden_size"], sizes["use_moe"])
    if path is None:
        wanted = {name: value for name, value in sizes.items() if value is not None}
        try:
            raise missing_weights(MiniMindConfig(**wanted), weight, save_dir)
        except ValueError as error:
            raise UserError(str(error), where="模型尺寸") from error
    extra = {"inference_rope_scaling": True} if inference_rope_scaling else {}
    model, tokenizer, file = open_weights(path, sizes, tokenizer_path, **extra)
    plain = file.sidecar.get("recipe", path.stem) == "pretrain" or (
        not file.sidecar and "pretrain" in path.stem
    )
    return Loaded(model, tokenizer, plain, path)


def _load_folder(folder: str, weight: str, tokenizer_path: str | None) -> Loaded:
    """Hugging Face 目录；不执行目录里自带的代码。"""
    from transformers import AutoModelForCausalLM

    import minimind.model.hf  # noqa: F401  登记本项目自己的结构

    path = resolve_path(folder)
    if not (path / "config.json").is_file():
        problem = folder_problem(path)
        found = f"目录{problem}" if problem else "目录里没有 config.json"
        raise UserError(
            found,
            where=str(path),
            expected="Hugging Face 格式的模型目录（config.json、权重、分词器）",
            fix="改 --load_from，或去掉它用 --weight 指定本项目训练的权重",
        )
    tokenizer = load_tokenizer(tokenizer_path or str(path))
    try:
        model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"打不开模型（{str(error).splitlines()[0][:160]}）",
            where=str(path),
            expected="transformers 认识的结构与完整的权重文件",
            fix="重新下载或重新导出这个目录",
        ) from error
    check_plain(dict(model.named_parameters()), path)
    return Loaded(model, tokenizer, "pretrain" in weight, path)
