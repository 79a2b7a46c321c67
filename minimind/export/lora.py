"""LoRA 的两种出路：写成 peft 认得的适配器目录，或合并进底座成为普通权重。

peft 的布局（https://huggingface.co/docs/peft/developer_guides/checkpoint）::

    adapter_config.json          r、lora_alpha、target_modules……
    adapter_model.safetensors    base_model.model.{模块名}.lora_A.weight [r, in]、….lora_B.weight [out, r]

我们的 A、B 与它的 lora_A、lora_B 是同样的矩阵，增量同样乘 alpha / r，所以只需改名，logits 相同。
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import nn

from minimind.arguments import arg, parse_args
from minimind.console import say
from minimind.errors import UserError, guard
from minimind.inference.loading import Loaded, load_for_inference
from minimind.model.model_lora import Adapter, load_adapter
from minimind.model_arguments import ModelArguments
from minimind.paths import resolve_path
from minimind.runtime.adapters import FIX, adapter_names, adapter_path, read_adapter
from minimind.runtime.checkpoint import (
    atomic_write,
    config_dict,
    file_stem,
    read_sidecar,
    save_weights,
    weights_path,
)
from minimind.tokenizer import tokenizer_fingerprint

PEFT_PREFIX = "base_model.model."


@dataclass
class _BaseArguments(ModelArguments, group="来源"):
    """底座与 LoRA 在哪里。"""

    weight: str = arg("full_sft", "底座权重的名字", text="name")
    lora_weight: str = arg("lora_identity", "LoRA 的名字或 .pth 路径", text="weights")
    save_dir: str = arg("out", "权重所在的目录", text="path")


@dataclass
class ExportLoRAArguments(_BaseArguments, group="去处"):
    """把一份 LoRA 写成 peft 的适配器目录。"""

    out_dir: str | None = arg(None, "写到哪里；不给则是 {save_dir}/export/{lora 的文件名}", text="path")


@dataclass
class ExportMergeArguments(_BaseArguments, group="去处"):
    """把一份或几份 LoRA（逗号分隔）合并进底座，写成普通权重。"""

    save_weight: str = arg(
        "merged", "新权重的名字，写到 {save_dir}/{save_weight}_{hidden_size}[_moe].pth", text="name"
    )


def peft_state_dict(adapter: Adapter) -> dict[str, Any]:
    """我们的键名 → peft 的键名。"""
    return {
        f"{PEFT_PREFIX}{module}.lora_{part}.weight": adapter.state[
            f"{module}.lora.{part}.weight"
        ].contiguous()
        for module in adapter.modules
        for part in ("A", "B")
    }


def target_names(model: nn.Module, modules: tuple[str, ...]) -> list[str]:
    """peft 的 ``target_modules``：按层名（末段）能恰好选中这些模块就写层名，否则写全名。"""
    last = sorted({name.rpartition(".")[2] for name in modules})
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    chosen = {name for name in linears if name.rpartition(".")[2] in last}
    return last if chosen == set(modules) else sorted(modules)


def write_peft_adapter(model: nn.Module, adapter: Adapter, folder: Path, base: str | None = None) -> Path:
    """写出 peft 的适配器目录。

    Args:
        model: 没加 LoRA 的底座，用来核对形状并决定 ``target_modules``。
        base: 写进 ``base_model_name_or_path``，peft 加载时会提示用它作底座。

    Raises:
        ValueError: 适配器与底座的层或形状不符。
    """
    targets = target_names(model, adapter.modules)
    load_adapter(model, adapter)
    alpha = int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": targets,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    text = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
    weights = save(peft_state_dict(adapter), metadata={"format": "pt"})
    atomic_write(folder / "adapter_model.safetensors", lambda file: file.write(weights))
    atomic_write(folder / "adapter_config.json", lambda file: file.write(text.encode()))
    return folder


def _open(args: _BaseArguments, lora_weight: str) -> Loaded:
    options = {name: getattr(args, name) for name in _BaseArguments.__dataclass_fields__}
    return load_for_inference(**options | {"lora_weight": lora_weight, "device": "cpu", "dtype": "float32"})


def _need_names(args: _BaseArguments) -> list[str]:
    names = adapter_names(args.lora_weight)
    if not names:
        raise UserError("没有写是哪个 LoRA", where="--lora_weight", expected="名字，如 lora_identity")
    return names


@guard
def main_lora(argv: list[str] | None = None) -> None:
    """``minimind export lora``。"""
    args = parse_args(ExportLoRAArguments, argv)
    names = _need_names(args)
    if len(names) > 1:
        raise UserError(
            f"一次导出一份，看到 {len(names)} 份",
            where="--lora_weight",
            fix="分几次导出，或用 minimind export merge 合并",
        )
    loaded = _open(args, "None")
    path = adapter_path(loaded.model.config, names[0], args.save_dir)
    adapter, _ = read_adapter(path)
    folder = resolve_path(args.out_dir or f"{args.save_dir}/export/{path.stem}")
    try:
        write_peft_adapter(loaded.model, adapter, folder, file_stem(loaded.model.config, args.weight))
    except ValueError as error:
        raise UserError(str(error), where=str(path), fix=FIX) from error
    say(f"写在 {folder}；用 peft.PeftModel.from_pretrained(底座, '{folder}') 加载。")


@guard
def main_merge(argv: list[str] | None = None) -> None:
    """``minimind export merge``。"""
    args = parse_args(ExportMergeArguments, argv)
    names = _need_names(args)
    if args.save_weight == args.weight:
        raise UserError(
            f"会盖掉底座 {args.weight}", where="--save_weight", fix="换一个名字，如 --save_weight merged"
        )
    loaded = _open(args, args.lora_weight)
    config = loaded.model.config
    base = read_sidecar(loaded.source) or {}
    sidecar = {
        "config": config_dict(config),
        "tokenizer_hash": tokenizer_fingerprint(loaded.tokenizer),
        "recipe": base.get("recipe", args.weight),
        "step": base.get("step", 0),
        "merged": {"weight": args.weight, "lora": names},
        "metrics": {},
    }
    path = weights_path(config, args.save_weight, args.save_dir)
    save_weights(loaded.model, path, sidecar)
    say(
        f"{args.weight} 与 {'、'.join(names)} 合并（fp16），写在 {path}；对话时用 --weight {args.save_weight}。"
    )
