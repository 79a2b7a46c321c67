"""为使用而打开一个模型：本项目的 .pth（尺寸从旁注里认）或 Hugging Face 目录。"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from minimind.console import say
from minimind.errors import UserError
from minimind.inference.arguments import DEFAULT_SAVE_DIR, DEFAULT_WEIGHT
from minimind.inference.int8 import quantize_int8
from minimind.model import MiniMindConfig, count_parameters
from minimind.model.model_lora import Adapter
from minimind.paths import folder_problem, resolve_path
from minimind.runtime.adapters import adapter_names, merge_adapters, open_adapters
from minimind.runtime.checkpoint import BUFFERS, read_state
from minimind.runtime.device import choose_dtype, device_name, resolve_device
from minimind.runtime.shapes import arch_of, check_plain
from minimind.runtime.weights import (
    find_weights,
    missing_weights,
    open_weights,
    tokenizer_beside,
    weights_file,
)
from minimind.tokenizer import load_tokenizer
from minimind.tokenizer.loading import codec_of
from minimind.tokenizer.special import IM_END, IM_START
from minimind.tokenizer.templates import describe_layout, use_template

# --load_from 的这几种写法都指本项目的 .pth（公共项目的默认值是 model）
NATIVE = ("model", "./model", "../model")
# 别的结构的配置里，专家的个数叫这几个名字；稠密的没有或是 0
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass
class Loaded:
    """可以直接生成的模型。

    Args:
        model: 在目标设备上、eval 状态。
        plain: 真为只会续写的预训练权重，假为会对话的权重。
        source: 权重文件或目录，用于显示。
        beside: 打开了、没有合并的 LoRA：文件与内容。
    """

    model: torch.nn.Module
    tokenizer: Any
    plain: bool
    source: Path
    beside: list[tuple[Path, Adapter]] = field(default_factory=list)


def stop_ids(model: torch.nn.Module, tokenizer: Any) -> set[int]:
    """遇到就停的 token：分词器的结束符、对话回合的结束符、模型的 config 与 generation_config 里写的结束符。"""
    ids = {tokenizer.eos_token_id, codec_of(tokenizer).controls.get(IM_END)}
    for config in (model.config, getattr(model, "generation_config", None)):
        configured = getattr(config, "eos_token_id", None)
        ids |= {*configured} if isinstance(configured, (list, tuple)) else {configured}
    return {int(token) for token in ids if token is not None}


def load_for_inference(
    *,
    load_from: str = "model",
    save_dir: str = DEFAULT_SAVE_DIR,
    weight: str = DEFAULT_WEIGHT,
    lora_weight: str = "None",
    hidden_size: int | None = None,
    num_hidden_layers: int | None = None,
    use_moe: int | None = None,
    arch: str | None = None,
    tokenizer_path: str | None = None,
    chat_template: str | None = None,
    inference_rope_scaling: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str = "none",
    beside: str = "None",
) -> Loaded:
    """按 :mod:`eval_llm` 的参数打开模型；尺寸参数为 ``None`` 时由权重旁的 JSON 决定。

    ``quantize="int8"`` 在最后把线性层换成 int8 的（:mod:`minimind.inference.int8`）。
    ``chat_template`` 换一份对话模板（文件，或 ``minimind``）。
    ``lora_weight`` 里的各份 LoRA 在 fp32 下依次合并进权重（W + Δ₁ + Δ₂ + …），之后再转成推理精度，生成时不多花计算。
    ``beside`` 里的只打开、与底座核对，不合并：由 :class:`~minimind.inference.shared.SharedModel` 叠在同一份底座上。

    Raises:
        UserError: 设备不可用、权重不存在、尺寸不符、目录不是模型。
    """
    target = resolve_device(device)
    sizes = {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "use_moe": None if use_moe is None else bool(use_moe),
        "arch": arch,
    }
    if load_from in NATIVE:
        loaded = _load_native(weight, save_dir, sizes, tokenizer_path, inference_rope_scaling)
        merge_adapters(loaded.model, adapter_names(lora_weight), save_dir)
        loaded.beside = open_adapters(loaded.model, adapter_names(beside), save_dir)
    elif names := adapter_names(lora_weight) + adapter_names(beside):
        raise UserError(
            f"--lora_weight {','.join(names)} 只能叠加在本项目的 .pth 权重上",
            where=f"--load_from {load_from}",
            fix="去掉 --load_from，或先用 minimind export merge 把 LoRA 合并进去",
        )
    else:
        loaded = _load_folder(load_from, weight, save_dir, sizes, tokenizer_path, inference_rope_scaling)
    if chat_template:
        use_template(loaded.tokenizer, chat_template)
    if not loaded.plain and (told := describe_layout(loaded.tokenizer)):
        say(f"{told}。")
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
    model, tokenizer, file = open_weights(path, sizes, tokenizer_path or tokenizer_beside(path), **extra)
    plain = file.sidecar.get("recipe", path.stem) == "pretrain" or (
        not file.sidecar and "pretrain" in path.stem
    )
    return Loaded(model, tokenizer, plain, path)


def _load_folder(
    folder: str,
    weight: str,
    save_dir: str,
    sizes: dict,
    tokenizer_path: str | None,
    inference_rope_scaling: bool,
) -> Loaded:
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
    problem = {"where": str(path), "fix": "重新下载或重新导出这个目录"}
    extra = {**_folder_arch(path), **_folder_yarn(path, inference_rope_scaling)}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path, local_files_only=True, dtype=torch.float32, output_loading_info=True, **extra
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"打不开模型（{str(error).splitlines()[0][:160]}）",
            expected="transformers 认识的结构与完整的权重文件",
            **problem,
        ) from error
    # transformers 缺了键就随机初始化，多了键就丢掉，只警告
    for word, keys in (("缺少", info["missing_keys"]), ("多出", info["unexpected_keys"])):
        keys = sorted(key for key in keys if not BUFFERS.fullmatch(key))
        if keys:
            raise UserError(
                f"权重{word} {len(keys)} 个键（如 {keys[0]}）",
                expected="键与 config.json 写的结构一一对应",
                **problem,
            )
    check_plain(dict(model.named_parameters()), path)
    _check_folder_sizes(model.config, sizes, path)
    plain = "pretrain" in weight
    if save_dir != DEFAULT_SAVE_DIR:
        say(f"权重从目录 {path} 读入，--save_dir {save_dir} 没有用上。")
    if weight != DEFAULT_WEIGHT:
        used = "只决定按续写模型提示" if plain else "没有用上"
        say(f"权重从目录 {path} 读入，--weight {weight} {used}。")
    if not (plain or tokenizer.chat_template or IM_START in tokenizer.get_added_vocab()):
        say(f"{path} 没有对话模板，分词器也没有 {IM_START}：当作只会续写的模型。")
        plain = True
    return Loaded(model, tokenizer, plain, path)


def _folder_yarn(folder: Path, wanted: bool) -> dict[str, bool]:
    """``--inference_rope_scaling`` 要改的配置。

    Raises:
        UserError: 目录里是别的结构，它的外推写在自己的配置里。
    """
    if not wanted:
        return {}
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if kind != MiniMindConfig.model_type:
        raise UserError(
            f"目录里的结构是 {kind}",
            where="--inference_rope_scaling 1",
            expected="本项目的结构（model_type 为 minimind）或 .pth 权重",
            fix=f"去掉它；别的结构的外推写在 {folder / 'config.json'} 的 rope_scaling 里",
        )
    return {"inference_rope_scaling": True}


def _check_folder_sizes(config: Any, sizes: dict, folder: Path) -> None:
    """目录里写着尺寸，命令行又给了的要相同：给了而不用，算的就不是使用者以为的那个模型。

    Raises:
        UserError: 不同。
    """
    text = config.get_text_config()  # 多模态的尺寸写在里面一层
    experts = (getattr(text, name, None) for name in EXPERT_COUNTS)
    held = {
        "hidden_size": getattr(text, "hidden_size", None),
        "num_hidden_layers": getattr(text, "num_hidden_layers", None),
        "use_moe": getattr(config, "use_moe", any(experts)),
        "arch": getattr(config, "arch", None),
    }
    for name, value in sizes.items():
        if value is not None and held[name] is None:
            raise UserError(
                f"目录里的结构是 {config.model_type}，没有这一项",
                where=f"--{name} {value}，--load_from {folder}",
                fix=f"去掉 --{name}",
            )
        if value is not None and value != held[name]:
            given, real = (int(one) if isinstance(one, bool) else one for one in (value, held[name]))
            raise UserError(
                f"目录里是 {real}，命令行写的是 {given}",
                where=f"--{name} {given}，--load_from {folder}",
                fix=f"去掉 --{name}：尺寸由目录里的 config.json 决定",
            )


def _folder_arch(folder: Path) -> dict[str, str]:
    """公共项目的目录（``model_type`` 是 minimind）没写 ``arch``，从权重的键看。"""
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not isinstance(raw, dict) or raw.get("model_type") != MiniMindConfig.model_type or "arch" in raw:
        return {}
    weights, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if weights.is_file():
        with safe_open(weights, "pt") as file:
            keys = set(file.keys())
    elif index.is_file():
        keys = set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", ()))
    else:
        bins = sorted(folder.glob("pytorch_model*.bin"))
        keys = {key for path in bins for key in read_state(path)}
    return {"arch": arch_of(dict.fromkeys(keys))}
