"""存档：原子写入；权重（fp16，给人用）、旁注 JSON（给程序认尺寸）、续训存档（fp32，逐位续训）。"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from minimind.errors import UserError
from minimind.paths import resolve_path
from minimind.runtime import files
from minimind.runtime.distributed import world_size

FORMAT_VERSION = 1
# 包装层（compile、DDP）加在键名前的前缀；存档里不许有，读旧文件时去掉
WRAPPER_PREFIXES = ("_orig_mod.", "module.")


# ---------------------------------------------------------------- 原子写入


def atomic_write(path: Path, write: Callable[[Any], Any], flag: str = "--save_dir") -> None:
    """:func:`minimind.runtime.files.atomic_write`，写不下时告诉使用者怎么接着训；``flag`` 是目录由哪个参数给的。"""
    files.atomic_write(path, write, fix=f"腾出磁盘空间或换 {flag} 后加 --from_resume 1 继续")


def load_file(path: Path) -> Any:
    """``torch.load(weights_only=True)``，坏文件报人话。"""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch 对坏文件抛的类型五花八门（RuntimeError、UnpicklingError、EOFError…）
        reason = f"{type(error).__name__} {error}".splitlines()[0][:120].strip()
        raise UserError(
            f"读不了这个文件（{reason}）",
            where=str(path),
            expected="torch.save 存的权重或续训存档",
            fix="文件可能下载不全或不是权重，重新下载或重新训练得到它",
        ) from error


# ---------------------------------------------------------------- 名字与配置


def unwrap(model: nn.Module) -> nn.Module:
    """去掉 DDP 与 compile 的外壳。"""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def strip_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """去掉包装层加的键名前缀。"""

    def clean(key: str) -> str:
        while key.startswith(WRAPPER_PREFIXES):
            key = key.split(".", 1)[1]
        return key

    return {clean(key): value for key, value in state.items()}


def file_stem(lm_config: Any, weight: str) -> str:
    """``{weight}_{hidden_size}[_moe]``。"""
    return f"{weight}_{lm_config.hidden_size}{'_moe' if lm_config.use_moe else ''}"


def weights_path(lm_config: Any, weight: str, save_dir: str | Path = "out") -> Path:
    return resolve_path(save_dir) / f"{file_stem(lm_config, weight)}.pth"


def parse_stem(path: Path) -> tuple[str, int, bool] | None:
    """:func:`file_stem` 的逆：文件名 → ``(weight, hidden_size, use_moe)``；不合规矩返回 None。"""
    match = re.fullmatch(r"(.+)_(\d+)(_moe)?", path.stem)
    return (match[1], int(match[2]), bool(match[3])) if match else None


def resume_path(lm_config: Any, weight: str, save_dir: str | Path = "checkpoints") -> Path:
    return resolve_path(save_dir) / f"{file_stem(lm_config, weight)}_resume.pth"


def sidecar_path(weights: Path) -> Path:
    return weights.with_suffix(".json")


def config_dict(lm_config: Any) -> dict[str, Any]:
    """配置变成只含基本类型的字典，足以重建模型；transformers 基类里那些没动过的通用项不写。"""
    raw, generic = lm_config.to_dict(), PretrainedConfig().to_dict()
    raw = {
        k: v for k, v in raw.items() if k != "transformers_version" and (k not in generic or v != generic[k])
    }
    return json.loads(json.dumps(raw, default=str))


# ---------------------------------------------------------------- 权重与旁注


def half_state_dict(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """模型（或其中要存的那些张量）的 fp16、连续、在内存里的状态字典；共享的张量（词嵌入与输出层）转一次，文件里也只占一份。"""
    state_dict = unwrap(model).state_dict() if isinstance(model, nn.Module) else model
    converted: dict[int, Tensor] = {}
    state = {}
    for key, value in state_dict.items():
        if value.data_ptr() not in converted or value.data_ptr() == 0:
            half = value.detach().half() if value.is_floating_point() else value.detach()
            converted[value.data_ptr()] = half.cpu().contiguous()
        state[key] = converted[value.data_ptr()]
    return state


def save_weights(model: nn.Module | Mapping[str, Tensor], path: Path, sidecar: dict[str, Any]) -> None:
    """写 ``path``（普通 fp16 状态字典）与旁边的 JSON。先写权重，后写旁注。

    Args:
        model: 模型，或只是其中要存的张量（键不带包装前缀）。
    """
    state = half_state_dict(model)
    atomic_write(path, lambda file: torch.save(state, file))
    write_sidecar(path, sidecar)


def write_sidecar(weights: Path, sidecar: dict[str, Any]) -> None:
    metrics = {k: v if math.isfinite(v) else None for k, v in sidecar.get("metrics", {}).items()}
    sidecar = {"format_version": FORMAT_VERSION, **sidecar, "metrics": metrics}
    text = json.dumps(sidecar, ensure_ascii=False, indent=2, allow_nan=False) + "\n"
    atomic_write(sidecar_path(weights), lambda file: file.write(text.encode()))


def read_sidecar(weights: Path) -> dict[str, Any] | None:
    """权重旁边的 JSON；没有（旧项目的权重）返回 None。"""
    path = sidecar_path(weights)
    if not path.is_file():
        return None
    fix = "删掉它，改用尺寸参数说明模型大小"
    try:
        sidecar = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"旁注不是合法的 JSON（{error}）", where=str(path), fix=fix) from error
    if not isinstance(sidecar, dict) or not isinstance(sidecar.get("config", {}), dict):
        raise UserError("旁注不是一个对象，或其中的 config 不是", where=str(path), fix=fix)
    _check_version(sidecar, "旁注", path, "升级 minimind")
    return sidecar


def load_weights(model: nn.Module, path: Path) -> None:
    """把 ``path`` 的权重装进 ``model``，键与形状必须一一对上（共享的输出层可以不在文件里）。

    Raises:
        UserError: 指出文件、键、两边的形状。
    """
    state = read_state(path)
    check_state(model, state, path)
    unwrap(model).load_state_dict(state, strict=False)


# 有的实现把位置编码的表也存进文件（未必是浮点数）；本项目现算
BUFFERS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|inv_freq|freqs_cos|freqs_sin|pos_cis|freqs_cis)")


def read_state(path: Path) -> dict[str, Tensor]:
    """读一份普通的权重字典，去掉包装层的前缀与位置编码的表。

    Raises:
        UserError: 文件损坏，或里面不是权重字典（例如续训存档），见 :func:`minimind.runtime.shapes.check_plain`。
    """
    from minimind.runtime.shapes import check_plain  # 从头训练的不读权重

    state = load_file(path)
    if isinstance(state, dict):
        state = {k: v for k, v in state.items() if not (isinstance(k, str) and BUFFERS.fullmatch(k))}
    check_plain(state, path)
    stripped = strip_prefixes(state)
    if len(stripped) < len(state):
        raise UserError(
            f"去掉包装层的前缀之后，{len(state)} 个键只剩 {len(stripped)} 个不同的",
            where=str(path),
            expected=f"每个参数一份，前缀（{'、'.join(WRAPPER_PREFIXES)}）可有可无",
            fix="同一个参数存了两份：只留一份",
        )
    return stripped


FIX_SIZES = "让 --hidden_size、--num_hidden_layers、--use_moe、--arch 与训练这个权重时一致"


def check_state(model: nn.Module, state: Mapping[str, Tensor], where: Path, fix: str = FIX_SIZES) -> None:
    """``state`` 的键与形状必须与 ``model``（可以在 meta 设备上）一一对上；共享的输出层可以不在里面。

    Raises:
        UserError: 指出文件、键、两边的形状。
    """
    from minimind.runtime.shapes import check_tied

    own = unwrap(model).state_dict()
    tied = getattr(model, "tied_keys", {})
    for key, value in own.items():
        if key in state and state[key].shape != value.shape:
            raise UserError(
                f"{key} 的形状是 {tuple(state[key].shape)}",
                where=str(where),
                expected=f"当前模型要 {tuple(value.shape)}",
                fix=fix,
            )
    missing = [key for key in own if key not in state and key not in tied]
    extra = [key for key in state if key not in own]
    if missing or extra:
        sides = [("缺少", missing), ("多出", extra)]
        what = "，".join(f"{word} {len(keys)} 个键（如 {keys[0]}）" for word, keys in sides if keys)
        raise UserError(what, where=str(where), expected="键与当前模型一一对应", fix=fix)
    check_tied(unwrap(model), state, where)


# ---------------------------------------------------------------- 续训存档


def _check_version(data: dict[str, Any], what: str, path: Path, fix: str) -> None:
    version = data.get("format_version", 0)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise UserError(
            f"{what}的格式版本 {version!r} 比程序认识的 {FORMAT_VERSION} 新", where=str(path), fix=fix
        )


def _state_of(value: Any) -> Any:
    return unwrap(value).state_dict() if isinstance(value, nn.Module) else value.state_dict()


def lm_checkpoint(
    lm_config: Any,
    weight: str = "full_sft",
    model: nn.Module | None = None,
    optimizer: Any = None,
    epoch: int = 0,
    step: int = 0,
    wandb: Any = None,
    save_dir: str | Path = "checkpoints",
    **kwargs: Any,
) -> dict[str, Any] | None:
    """给了 ``model`` 就存续训存档，没给就读。

    存档在 ``{save_dir}/{weight}_{hidden_size}[_moe]_resume.pth``，模型是全精度，键名不带包装前缀，
    可用 ``torch.load(weights_only=True)`` 读。

    Args:
        epoch, step: 已完成的轮数与优化步数。
        wandb: 带 ``id`` 属性的记录器，用来续上同一条曲线。
        kwargs: 其余要存的东西：有 ``state_dict`` 的存其状态，别的原样存（只能是张量与基本类型）。

    Returns:
        读取时返回存档内容，没有存档返回 None；保存时返回 None。

    Raises:
        UserError: 磁盘满，文件损坏，或存档的格式版本比程序新。
    """
    path = resume_path(lm_config, weight, save_dir)
    if model is None:
        if not path.is_file():
            return None
        data = load_file(path)
        fix = "升级 minimind，或去掉 --from_resume 重新训练"
        if not isinstance(data, dict):
            raise UserError("里面不是续训存档", where=str(path), fix="去掉 --from_resume 重新训练")
        _check_version(data, "存档", path, fix)
        return data
    data = {
        "format_version": FORMAT_VERSION,
        "model": unwrap(model).state_dict(),
        "optimizer": optimizer.state_dict() if optimizer is not None else None,
        "epoch": epoch,
        "step": step,
        "world_size": world_size(),
        "wandb_id": getattr(wandb, "id", None),
        "config": config_dict(lm_config),
    }
    data |= {key: _state_of(v) if hasattr(v, "state_dict") else v for key, v in kwargs.items()}
    atomic_write(path, lambda file: torch.save(data, file), "--checkpoint_dir")
    return None


def check_same_config(saved: dict[str, Any], current: dict[str, Any], where: str, fix: str) -> None:
    """两份设置必须一样，否则列出每一处不同。

    Raises:
        UserError: 有不同，逐项写出“存档里是…，现在是…”。
    """
    differences = [
        f"{key} 存档里是 {saved[key]!r}、现在是 {current[key]!r}"
        for key in saved
        if key in current and saved[key] != current[key]
    ]
    if differences:
        raise UserError("，".join(differences), where=where, expected="与存档一致", fix=fix)
