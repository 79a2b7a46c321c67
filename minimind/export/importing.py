"""把别处的权重收进来：Hugging Face 目录，或公共项目没有旁注的 ``.pth``。

权重的精度与每一位都照旧（fp32 进来还是 fp32），只补上本项目要的文件名与旁注。
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file as load_safetensors
from torch import Tensor

from minimind.errors import UserError
from minimind.export.hf import SIDECAR
from minimind.export.layouts import NATIVE, config_from_hf
from minimind.export.shared_experts import from_qwen2_moe
from minimind.model import MiniMindConfig, MiniMindLM
from minimind.paths import file_problem, resolve_path
from minimind.runtime.checkpoint import (
    BUFFERS,
    atomic_write,
    check_state,
    config_dict,
    parse_stem,
    read_state,
    weights_path,
    write_sidecar,
)
from minimind.runtime.shapes import arch_of, is_tied, layer_count
from minimind.runtime.weights import read_weights
from minimind.tokenizer import load_tokenizer, tokenizer_fingerprint

FUSED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass
class Imported:
    """读进来、核对过的权重。

    Args:
        tokenizer: 目录里的分词器；没有就是 ``None``。
        notes: 靠猜或默认值定下的事，要说给使用者听。
    """

    config: MiniMindConfig
    state: dict[str, Tensor]
    tokenizer: Any
    sidecar: dict[str, Any]
    notes: list[str]


def import_model(
    source: str,
    name: str | None = None,
    save_dir: str = "out",
    dtype: torch.dtype | None = None,
    tokenizer_path: str | None = None,
    force: bool = False,
    **options: Any,
) -> tuple[Path, Imported]:
    """导入并写出 ``{save_dir}/{name}_{hidden}[_moe].pth`` 与旁注。

    Args:
        dtype: ``None`` 不改精度。
        options: 没有配置文件的 ``.pth`` 看不出来的几项：``num_attention_heads``、``num_experts_per_tok``、``rope_theta``。

    Raises:
        UserError: 来源不存在、结构不支持、键或形状对不上，或目标已存在。
    """
    path = resolve_path(source)
    if name is not None and not re.fullmatch(r"[^/\\]+", name):
        raise UserError(
            f"--name {name!r} 不能当文件名", expected="不含斜杠的名字", fix="目录用 --save_dir 指定"
        )
    if path.is_dir():
        model = read_folder(path, tokenizer_path)
    elif problem := file_problem(path, ".pth"):
        raise UserError(
            f"来源{problem}", where=str(path), expected="Hugging Face 目录或 .pth 文件", fix="检查路径"
        )
    else:
        model = read_pth(path, tokenizer_path, options)
    target = weights_path(model.config, name or _default_name(path), save_dir)
    in_place = target.exists() and path.is_file() and target.samefile(path)
    if target.exists() and not in_place and not force:
        raise UserError("权重已存在", where=str(target), fix="用 --name 换一个名字，或加 --force 覆盖")
    state = model.state
    if dtype is not None:
        from minimind.export.source import cast

        state = cast(state, dtype, str(path))
    if model.config.tie_word_embeddings:
        state = {**state, "lm_head.weight": state["model.embed_tokens.weight"]}
    if not in_place or dtype is not None:
        atomic_write(target, lambda file: torch.save(state, file))
    if "pretrain" in target.stem.lower():
        model.sidecar["recipe"] = "pretrain"  # 只会续写，对话程序不给它套模板
    write_sidecar(target, model.sidecar)
    return target, model


def _default_name(path: Path) -> str:
    stem = parse_stem(path) if path.is_file() else None
    return stem[0] if stem else path.stem if path.is_file() else path.name


# ---------------------------------------------------------------- 目录


def read_folder(folder: Path, tokenizer_path: str | None = None) -> Imported:
    """读一个 Hugging Face 目录：本项目导出的、公共 MiniMind 的、或同结构的 Llama / Qwen3 / Qwen3-MoE。"""
    raw = _read_json(folder / "config.json")
    state, weights = _read_folder_state(folder)
    if raw.get("model_type") == NATIVE and "arch" not in raw:
        raw["arch"] = arch_of(state)  # 公共项目的配置没有这一项
    config = config_from_hf(raw, folder / "config.json")
    config.eos_token_id = _ends(folder, raw) or config.eos_token_id
    if raw.get("model_type") == "qwen2_moe":
        state = from_qwen2_moe(state, config, weights)
    state = _finish_state(state, config, weights)
    _check(config, state, weights, "config.json 与权重不是一套，重新下载这个目录")
    has_tokenizer = tokenizer_path is not None or (folder / "tokenizer.json").is_file()
    tokenizer = load_tokenizer(tokenizer_path or folder) if has_tokenizer else None
    before = _read_json(folder / SIDECAR) if (folder / SIDECAR).is_file() else {}
    return Imported(config, state, tokenizer, _sidecar(config, tokenizer, before, folder.name), [])


def _ends(folder: Path, raw: dict[str, Any]) -> int | list[int] | None:
    """两份配置里写的结束符，``config.json`` 的在前；Llama 3 的回合结束符只在 ``generation_config.json`` 里。"""
    generation = folder / "generation_config.json"
    found: list[int] = []
    for config in (raw, _read_json(generation) if generation.is_file() else {}):
        given = config.get("eos_token_id")
        found += [token for token in (given if isinstance(given, list) else [given]) if type(token) is int]
    unique = list(dict.fromkeys(found))
    return unique[0] if len(unique) == 1 else unique or None


def _no_constant(word: str) -> None:
    raise ValueError(f"含有 {word}")  # NaN、Infinity 不是 JSON，也写不回旁注


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(
            f"目录里没有 {path.name}",
            where=str(path.parent),
            expected="Hugging Face 格式的目录：config.json 与 model.safetensors（或 pytorch_model.bin）",
            fix="检查路径，或重新下载",
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except ValueError as error:
        raise UserError(f"不是合法的 JSON（{error}）", where=str(path), fix="重新下载这个文件") from error
    if not isinstance(value, dict):
        raise UserError("内容应当是一个 JSON 对象", where=str(path), fix="重新下载这个文件")
    return value


def _read_folder_state(folder: Path) -> tuple[dict[str, Tensor], Path]:
    """单个文件，或 ``….index.json`` 列出的几片；返回权重与读的文件（报错时指给人看）。"""
    for name in WEIGHT_FILES:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return _read_weights(folder / name), folder / name
        if index.is_file():
            state: dict[str, Tensor] = {}
            shards = _read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
                raise UserError("没有 weight_map", where=str(index), fix="重新下载这个文件")
            for shard in sorted(set(shards.values())):
                if not (folder / shard).is_file():
                    raise UserError(f"缺少 {shard}", where=str(index), fix="重新下载缺的那一片")
                state |= _read_weights(folder / shard)
            return state, index
    raise UserError(
        "目录里没有权重", where=str(folder), expected=" 或 ".join(WEIGHT_FILES), fix="重新下载这个目录"
    )


def _read_weights(path: Path) -> dict[str, Tensor]:
    if path.suffix != ".safetensors":
        return read_state(path)
    try:
        return load_safetensors(path)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"读不了这个文件（{str(error)[:120]}）", where=str(path), fix="文件可能下载不全，重新下载"
        ) from error


# ---------------------------------------------------------------- .pth


def read_pth(path: Path, tokenizer_path: str | None, options: dict[str, Any]) -> Imported:
    """读一份 ``.pth``；有旁注就照旁注，没有就从形状推出尺寸，推不出的用公共项目的默认值并说明。"""
    file = read_weights(path, options)
    config, before, notes = file.config, file.sidecar, file.notes
    state = _finish_state(file.state, config, path)
    _check(config, state, path, "检查这份权重是不是本项目或公共 MiniMind 的")
    tokenizer = load_tokenizer(tokenizer_path)
    if not before and tokenizer_path is None:
        notes.append("没有旁注，不知道训练时的分词器；不是随包的那个时，请加 --tokenizer_path 重新导入")
    sidecar = _sidecar(config, tokenizer if tokenizer_path else None, before, path.stem)
    return Imported(config, state, tokenizer, sidecar, notes)


# ---------------------------------------------------------------- 共同的收尾


def _finish_state(state: dict[str, Tensor], config: MiniMindConfig, path: Path) -> dict[str, Tensor]:
    """去掉位置编码的表，拆开合存的专家，去掉重复的输出头。"""
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        fused = FUSED.fullmatch(key)
        if BUFFERS.fullmatch(key):
            continue
        if fused:  # transformers 5 在内存里的布局：[E, 2·ff, H] 与 [E, H, ff]
            parts = {"down_proj": value} if fused[2] == "down_proj" else dict(
                zip(("gate_proj", "up_proj"), value.chunk(2, dim=1))
            )  # fmt: skip
            for part, stacked in parts.items():
                for i, expert in enumerate(stacked):
                    result[f"{fused[1]}.{i}.{part}.weight"] = expert.contiguous()
            continue
        result[key] = value
    if not config.tie_word_embeddings:
        if "lm_head.weight" not in result:
            raise UserError(
                "没有 lm_head.weight，而配置说输出头不与词嵌入共享",
                where=str(path),
                expected=f"lm_head.weight {(config.vocab_size, config.hidden_size)}",
                fix="把 config.json 的 tie_word_embeddings 改成 true，或重新下载权重",
            )
        return result
    if not is_tied(result):
        raise UserError(
            "lm_head.weight 与词嵌入不同，而配置说它们共享",
            where=str(path),
            fix="把 config.json 的 tie_word_embeddings 改成 false",
        )
    result.pop("lm_head.weight", None)
    return result


def _check(config: MiniMindConfig, state: dict[str, Tensor], where: Path, fix: str) -> None:
    """键与形状逐一核对；模型建在 meta 设备上，不占内存。"""
    layers = layer_count(state)
    if config.num_hidden_layers != layers:  # 先比层数：配置写成十亿层时不去建它
        raise UserError(
            f"权重有 {layers} 层",
            where=str(where),
            expected=f"配置写的 num_hidden_layers={config.num_hidden_layers}",
            fix=fix,
        )
    try:
        with torch.device("meta"):
            model = MiniMindLM(config)
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0][:160]
        raise UserError(f"按配置建不出模型（{reason}）", where=str(where), fix=fix) from error
    check_state(model, state, where, fix)


def _sidecar(config: MiniMindConfig, tokenizer: Any, before: dict[str, Any], origin: str) -> dict[str, Any]:
    kept = {
        key: before[key] for key in ("recipe", "step", "epoch", "metrics", "tokenizer_hash") if key in before
    }
    sidecar = {"config": config_dict(config), "recipe": "import", "step": 0, "imported_from": origin, **kept}
    if tokenizer is not None:
        sidecar["tokenizer_hash"] = tokenizer_fingerprint(tokenizer)
    return sidecar
