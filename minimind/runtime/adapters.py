"""LoRA 权重文件：在哪里、怎么认、怎么合并进底座。

文件 ``{save_dir}/lora/{名字}_{hidden_size}[_moe].pth`` 只有 A 与 B；旁边的 JSON 里 ``config.lora`` 记着秩、alpha、
加在哪些层上，以及训练时底座的名字与指纹。公共项目的文件没有这个 JSON，按 alpha = r 读。
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minimind.console import say
from minimind.errors import UserError
from minimind.model.model_lora import MARK, Adapter, check_adapter, merge_adapter, parse_adapter
from minimind.paths import file_problem, resolve_path
from minimind.runtime.checkpoint import read_sidecar, read_state, weights_path

FOLDER = "lora"
FIX = "让 --hidden_size、--num_hidden_layers、--use_moe、--arch 与训练这个 LoRA 时一致"


def adapter_path(config: Any, name: str, save_dir: str | Path = "out") -> Path:
    """LoRA 权重的位置；名字以 ``.pth`` 结尾时就是文件路径。"""
    return (
        resolve_path(name) if name.endswith(".pth") else weights_path(config, name, Path(save_dir) / FOLDER)
    )


def adapter_names(lora_weight: str | None) -> list[str]:
    """``--lora_weight`` 的写法 → 名字列表：``a,b`` 是两份，``None`` 是没有。"""
    names = [name.strip() for name in (lora_weight or "").split(",")]
    return [name for name in names if name and name.lower() != "none"]


def base_fingerprint(model: nn.Module) -> str:
    """底座权重（fp16）的指纹：LoRA 的增量只对它训练时的那个底座有意义。"""
    digest = hashlib.blake2b(digest_size=8)
    for key, value in sorted(model.state_dict().items()):
        if MARK not in key:
            digest.update(key.encode())
            digest.update(value.detach().half().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def read_adapter(path: Path) -> tuple[Adapter, dict[str, Any]]:
    """读一份 LoRA 权重，返回 ``(权重, 旁注里的 lora 一节)``；没有旁注时后者为空。

    Raises:
        UserError: 文件不存在、损坏，或里面不是 LoRA 权重，指出键与形状。
    """
    if problem := file_problem(path, ".pth"):
        others = sorted(p.name for p in path.parent.glob("*.pth"))
        hint = f"；目录里有 {'、'.join(others)}" if others else ""
        name = path.stem.removesuffix("_moe").rpartition("_")[0] or path.stem
        raise UserError(
            f"没有 LoRA 权重 {path.name}（{problem}）",
            where=str(path),
            fix=f"先运行 python trainer/train_lora.py --lora_name {name}，或改 --lora_weight{hint}",
        )
    state = read_state(path)
    info = ((read_sidecar(path) or {}).get("config") or {}).get("lora") or {}
    try:
        adapter = parse_adapter(state, info.get("alpha"))
    except ValueError as error:
        raise UserError(
            str(error), where=str(path), expected="只含 ….lora.A.weight 与 ….lora.B.weight 的文件"
        ) from error
    if info and info.get("rank") != adapter.rank:
        raise UserError(
            f"旁注写着秩 {info.get('rank')}，权重的秩是 {adapter.rank}",
            where=str(path),
            expected="成对的 .pth 与 .json",
            fix="两个文件来自不同的训练，重新复制或重新训练",
        )
    return adapter, info


def open_adapters(
    model: nn.Module, names: list[str], save_dir: str | Path = "out"
) -> list[tuple[Path, Adapter]]:
    """读几份 LoRA 并与底座核对；训练时的底座与现在的不同就说一句。模型不动。

    Args:
        model: 底座，精度与训练后存下的相同（指纹按它算）。

    Raises:
        UserError: 文件不对，或与模型的层、形状不符。
    """
    current = base_fingerprint(model) if names else None
    opened = []
    for path in [adapter_path(model.config, name, save_dir) for name in names]:
        adapter, info = read_adapter(path)
        base = info.get("base", {})
        if base and base.get("fingerprint") != current:
            say(f"注意：{path.name} 是在 {base.get('weight')} 上训练的，现在的底座与那时不同，效果可能变差。")
        try:
            check_adapter(model, adapter)
        except ValueError as error:
            raise UserError(str(error), where=str(path), fix=FIX) from error
        scale = f"，alpha {adapter.alpha:g}" if info else "，没有旁注，按不缩放读"
        say(f"叠加 LoRA {path}（秩 {adapter.rank}{scale}，{len(adapter.modules)} 层）。")
        opened.append((path, adapter))
    return opened


def merge_adapters(model: nn.Module, names: list[str], save_dir: str | Path = "out") -> list[Path]:
    """把几份 LoRA 依次合并进底座，得到 W + Δ₁ + Δ₂ + …；返回各文件的位置。

    Raises:
        UserError: 文件不对，或与模型的层、形状不符。
    """
    opened = open_adapters(model, names, save_dir)
    for _, adapter in opened:
        merge_adapter(model, adapter)
    return [path for path, _ in opened]
