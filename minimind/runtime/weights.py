"""权重的一扇门：名字或路径 → 文件 → 配置 → 模型。训练、教师、对话、服务、评测、导出、导入都从这里进。

配置先看权重旁的 JSON；没有旁注的（公共项目的）从键与形状看，见 :mod:`minimind.runtime.shapes`。
"""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minimind.console import say
from minimind.errors import UserError
from minimind.model import MiniMindConfig, MiniMindLM
from minimind.paths import file_problem, resolve_path
from minimind.runtime.checkpoint import (
    check_same_config,
    check_state,
    config_dict,
    file_stem,
    load_weights,
    parse_stem,
    read_sidecar,
    read_state,
    sidecar_path,
    weights_path,
)
from minimind.runtime.device import resolve_device
from minimind.runtime.distributed import broadcast_object, broadcast_state, on_main
from minimind.tokenizer import load_tokenizer, tokenizer_fingerprint
from minimind.tokenizer.loading import codec_of

# 权重名 → 得到它的命令，写进“找不到权重”的提示里
COMMANDS = {
    "pretrain": "python trainer/train_pretrain.py",
    "full_sft": "python trainer/train_full_sft.py",
    "dpo": "python trainer/train_dpo.py",
    "reason": "python trainer/train_reason.py",
    "reward": "python trainer/train_reward.py",
    "ppo_actor": "python trainer/train_ppo.py",
    "grpo": "python trainer/train_grpo.py",
    "spo": "python trainer/train_spo.py",
    "agent": "python trainer/train_agent.py",
    "full_dist": "python trainer/train_distillation.py",
}
PUBLIC_TOKENIZER = "model"  # 公共项目放分词器的目录
REWARD = "reward"  # 奖励模型的配方名，写在它的旁注里
# 决定权重形状与含义的配置项；其余（dropout、注意力实现、外推）可以随意不同
STRUCTURE = (
    "arch", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "vocab_size", "use_moe", "n_routed_experts", "num_experts_per_tok", "n_shared_experts",
    "moe_intermediate_size", "rope_theta", "tie_word_embeddings",
)  # fmt: skip


# ---------------------------------------------------------------- 名字 → 文件


def named_weights(
    name: str, save_dir: str | Path, hidden_size: int | None = None, use_moe: bool | None = None
) -> list[Path]:
    """目录里叫这个名字、合乎已知尺寸的全部权重，次序不定。"""
    found = []
    for path in resolve_path(save_dir).glob("*.pth"):
        stem = parse_stem(path)
        if stem and stem[0] == name and hidden_size in (None, stem[1]) and use_moe in (None, stem[2]):
            found.append(path)
    return found


def find_weights(
    name: str, save_dir: str | Path, hidden_size: int | None = None, use_moe: bool | None = None
) -> Path | None:
    """:func:`named_weights` 中的一个；不止一个时取最新的并说明，没有返回 ``None``。"""
    found = named_weights(name, save_dir, hidden_size, use_moe)
    if not found:
        return None
    newest = max(found, key=lambda path: path.stat().st_mtime)
    if len(found) > 1:
        say(f"有 {len(found)} 个 {name} 权重，用最新的 {newest.name}；用 --hidden_size、--use_moe 指定别的。")
    return newest


def weights_file(name: str) -> Path:
    """写成路径的（``out/full_sft_512.pth``）。

    Raises:
        UserError: 没有这个文件，或名字不合规矩（LoRA、续训存档都按名字与尺寸找）。
    """
    path = resolve_path(name)
    if problem := file_problem(path, ".pth"):
        raise UserError(f"权重文件{problem}", where=str(path), fix="检查路径，或写权重的名字，如 full_sft")
    if parse_stem(path) is None:
        raise UserError(
            "文件名里认不出尺寸",
            where=str(path),
            expected="名字_隐藏维.pth 或 名字_隐藏维_moe.pth",
            fix=f"先运行 minimind import {name}",
        )
    return path


def missing_weights(lm_config: MiniMindConfig, name: str, save_dir: str | Path) -> UserError:
    """没有这份权重：说出该有的文件、得到它的命令、目录里有什么。"""
    path = weights_path(lm_config, name, save_dir)
    others = sorted(p.name for p in resolve_path(save_dir).glob(f"{glob.escape(name)}_*.pth"))
    size = f" --hidden_size {lm_config.hidden_size}" + (" --use_moe 1" if lm_config.use_moe else "")
    size += " --arch v3" if lm_config.arch == "v3" else ""
    if name in COMMANDS:
        hint = f"；目录里有 {'、'.join(others)}，可改 --hidden_size / --use_moe 与它一致" if others else ""
        fix = f"先运行 {COMMANDS[name]}{size}{hint}"
    else:
        there = others or sorted(p.name for p in resolve_path(save_dir).glob("*.pth"))
        there = f"目录里有 {'、'.join(there[:8])}" if there else "目录里一份权重也没有"
        fix = f"名字写错了就改（{there}）；没写错，就在训练它的命令里加 --save_weight {name}{size}"
    return UserError(f"没有权重文件（{file_stem(lm_config, name)}.pth）", where=str(path), fix=fix)


def arch_of_weights(name: str, save_dir: str | Path, hidden_size: int, use_moe: bool) -> str | None:
    """这份权重是哪种布局：旁注里写着，没有旁注的从键看；没有这个文件是 ``None``。"""
    for path in named_weights(name, save_dir, hidden_size, use_moe):
        from minimind.runtime.shapes import arch_of  # 有旁注的用不着

        saved = (read_sidecar(path) or {}).get("config", {}).get("arch")
        return saved or arch_of(read_state(path))
    return None


def starting_arch(
    given: str | None, preset: str | None, sizes: Mapping[str, Any], weight: str, save_dir: str | Path
) -> str:
    """训练用哪种布局：命令行写明的，预设的，起点权重的，都没说就是 v2。

    Args:
        given, preset: ``--arch`` 与 ``--preset``。
        sizes: 已定下的尺寸；预设的可能写着 ``arch``。
        weight: 起点权重的名字，``none`` 是从头训练。

    Raises:
        UserError: ``--arch`` 与预设的不同。
    """
    own = sizes.get("arch")
    if own and given not in (None, own):
        raise UserError(
            f"这个预设的结构是 {own}",
            where=f"--preset {preset} --arch {given}",
            fix="去掉 --arch，或用尺寸参数代替 --preset",
        )
    if given or own:
        return given or own
    # 权重只在主进程那台机器上
    found = weight != "none" and on_main(
        lambda: arch_of_weights(weight, save_dir, sizes["hidden_size"], bool(sizes.get("use_moe")))
    )
    return broadcast_object(found or "v2")


# ---------------------------------------------------------------- 文件 → 配置


@dataclass
class WeightsFile:
    """读进来的一份权重。

    Args:
        config: 由旁注，或由形状看出的配置。
        state: 键与形状已经能与 ``config`` 对照的权重，还没有核对。
        sidecar: 旁注；没有就是空字典。
        notes: 没有旁注时靠默认值定下的事。
    """

    path: Path
    config: MiniMindConfig
    state: dict[str, Tensor]
    sidecar: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def read_weights(
    path: Path, given: Mapping[str, Any] | None = None, prefix: str = "", **extra: Any
) -> WeightsFile:
    """读一份 ``.pth`` 与它的配置。

    Args:
        given: 命令行写明的配置项（``None`` 是没写），必须与权重的一致。
        prefix: 这些参数的前缀，报错时用，例如 ``teacher_``。
        extra: 与形状无关、照单全收的配置项，例如 ``inference_rope_scaling``。

    Raises:
        UserError: 文件或旁注坏了，不是 MiniMind 的权重，或写明的尺寸与它不符。
    """
    sidecar, notes = read_sidecar(path) or {}, []
    given = {name: value for name, value in (given or {}).items() if value is not None}
    if saved := sidecar.get("config"):
        flags = (
            "、".join(f"--{prefix}{name}" for name in given) or "--hidden_size、--num_hidden_layers、--arch"
        )
        check_same_config(saved, given, str(path), f"去掉 {flags}，尺寸由权重旁的 JSON 决定")
        try:
            config = MiniMindConfig(**{**saved, **given, **extra})
        except (ValueError, TypeError) as error:
            raise UserError(str(error), where=str(sidecar_path(path))) from error
        return WeightsFile(path, config, read_state(path), sidecar)
    from minimind.runtime.shapes import check_visible, config_of_state  # 有旁注的用不着

    state = read_state(path)
    check_visible(state, given, path, prefix)
    config = config_of_state(state, path, {**given, **extra}, notes)
    return WeightsFile(path, config, state, sidecar, notes)


def check_tokenizer(path: Path, sidecar: Mapping[str, Any], config: MiniMindConfig, tokenizer: Any) -> None:
    """权重与分词器配套：旁注里的指纹相同；词表装得下。

    Raises:
        UserError: 不是训练它的那个分词器。
    """
    saved, fix = sidecar.get("tokenizer_hash"), "用 --tokenizer_path 指向训练它时的分词器"
    if saved and saved != tokenizer_fingerprint(tokenizer):
        raise UserError("这个权重是用另一个分词器训练的", where=str(path), fix=fix)
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"分词器有 {len(tokenizer)} 个词，这份权重只有 {config.vocab_size} 个",
            where=str(path),
            expected="词表不大于权重的",
            fix=fix,
        )


def tokenizer_beside(path: Path) -> str | None:
    """没写 ``--tokenizer_path`` 时，这份权重用哪个分词器目录；随包的是 ``None``。

    公共项目的 ``--load_from model`` 指的就是放分词器的 ``model/``：没有旁注的权重（公共的）配它；有旁注的，指纹与它相同才配。
    """
    if not path.is_file():
        return None
    sidecar, folder = read_sidecar(path) or {}, resolve_path(PUBLIC_TOKENIZER)
    there, trained = (folder / "tokenizer.json").is_file(), sidecar.get("tokenizer_hash")
    if not there and not sidecar:
        say(
            f"留意：{path.name} 没有旁注，不知道训练它的分词器，按自带的读；公共项目的权重配它自己的："
            f"把它的 {PUBLIC_TOKENIZER}/ 目录放在这里，或加 --tokenizer_path。"
        )
    if not there or (sidecar and not trained):
        return None
    if trained and (
        trained == tokenizer_fingerprint(load_tokenizer())
        or trained != tokenizer_fingerprint(load_tokenizer(folder))
    ):
        return None
    say(f"{path.name} 用 {folder} 的分词器。")
    return str(folder)


def check_speaks(path: Path, sidecar: Mapping[str, Any]) -> None:
    """不是奖励模型：它只有打分头，接不下去话。

    Raises:
        UserError: 旁注写着它是奖励模型。
    """
    if sidecar.get("recipe") == REWARD:
        raise UserError(
            "这是奖励模型，只会打分，不会说话",
            where=str(path),
            expected="语言模型的权重",
            fix=f"换一份权重，如 full_sft；打分用 --reward_model_path {path}",
        )


# ---------------------------------------------------------------- 配置 → 模型


def open_weights(
    path: Path,
    given: Mapping[str, Any] | None = None,
    tokenizer_path: str | None = None,
    **extra: Any,
) -> tuple[MiniMindLM, Any, WeightsFile]:
    """为使用而打开：尺寸由权重决定，``given`` 与 ``extra`` 见 :func:`read_weights`。

    Returns:
        ``(model, tokenizer, file)``，模型是内存里 fp32 的 ``MiniMindForCausalLM``；``file.state`` 已清空。
    """
    from minimind.model import MiniMindForCausalLM

    tokenizer = load_tokenizer(tokenizer_path)
    file = read_weights(path, given, **extra)
    check_speaks(path, file.sidecar)
    check_tokenizer(path, file.sidecar, file.config, tokenizer)
    file.config.pad_token_id = tokenizer.pad_token_id
    model = MiniMindForCausalLM(file.config)
    fill(model, file)
    say(f"从 {path} 读入权重。")
    if not file.sidecar:
        config = file.config
        kind = f"{config.arch}{'，混合专家' if config.use_moe else ''}"
        say(
            f"没有旁注，从键与形状看：{kind}，{config.num_hidden_layers} 层，宽 {config.hidden_size}，"
            f"{config.num_attention_heads} 个头，词表 {config.vocab_size}。"
        )
    return model, tokenizer, file


def fill(model: MiniMindLM, file: WeightsFile) -> None:
    """把读进来的权重装进模型，然后放开它占的内存。

    Raises:
        UserError: 指出文件、键、两边的形状。
    """
    check_state(model, file.state, file.path)
    model.load_state_dict(file.state, strict=False)
    file.state = {}


def init_model(
    lm_config: MiniMindConfig,
    from_weight: str = "pretrain",
    tokenizer_path: str | None = None,
    save_dir: str | Path = "out",
    device: str | torch.device = "auto",
) -> tuple[MiniMindLM, Any]:
    """训练的起点：配置由命令行给，权重必须与它一致。

    Args:
        from_weight: 权重的名字；``none`` 表示随机初始化。
        tokenizer_path: 分词器目录；``None`` 用自带的。
        device: 模型放在哪里。

    Returns:
        ``(model, tokenizer)``，模型是 fp32 的 ``MiniMindForCausalLM``。

    Raises:
        UserError: 没有这个权重，尺寸不符，键对不上，或权重与分词器不配套。
    """
    from minimind.model import MiniMindForCausalLM  # 连带 transformers 的模型基类，只看 --help 的不必等

    tokenizer = load_tokenizer(tokenizer_path)
    if len(tokenizer) > lm_config.vocab_size:
        lm_config.vocab_size = len(tokenizer)
    lm_config.pad_token_id = tokenizer.pad_token_id  # 模型靠它认出打包行的补齐
    codec = codec_of(tokenizer)  # 写进旁注：推理停在这里
    lm_config.bos_token_id, lm_config.eos_token_id = codec.bos_id, codec.eos_id
    device = resolve_device(device) if isinstance(device, str) else device
    # 权重只由主进程写，也就只由它读，发给大家：别的机器上没有这个文件
    path = None
    if from_weight != "none":
        path = on_main(lambda: _training_start(lm_config, tokenizer, from_weight, save_dir))
        trained = broadcast_object(on_main(lambda: (read_sidecar(path) or {}).get("config", {})))
        lm_config.vocab_size = broadcast_object(lm_config.vocab_size)
        lm_config.norm_topk_prob = trained.get("norm_topk_prob", lm_config.norm_topk_prob)
        lm_config.eos_token_id = trained.get("eos_token_id", lm_config.eos_token_id)
        if trained.get("trained_length"):
            lm_config.record_trained_length(trained["trained_length"])
    model = MiniMindForCausalLM(lm_config)
    if from_weight != "none":
        on_main(lambda: load_weights(model, path))
        model.load_state_dict(broadcast_state(model.state_dict(), device))
        say(f"从 {path} 读入权重。")
    return model.to(device), tokenizer


def _training_start(
    lm_config: MiniMindConfig, tokenizer: Any, from_weight: str, save_dir: str | Path
) -> Path:
    """权重文件；结构与分词器已同旁注核对，没有旁注的同看得见的尺寸核对。词表的大小随权重，它可以比分词器的大。"""
    path = weights_path(lm_config, from_weight, save_dir)
    if not path.is_file():
        raise missing_weights(lm_config, from_weight, save_dir)
    sidecar = read_sidecar(path) or {}
    check_speaks(path, sidecar)
    if saved := sidecar.get("config", {}):
        lm_config.vocab_size = saved.get("vocab_size", lm_config.vocab_size)
    else:
        from minimind.runtime.shapes import check_visible, visible_sizes

        state = read_state(path)
        check_visible(state, config_dict(lm_config), path)
        lm_config.vocab_size = visible_sizes(state, path)["vocab_size"]
    check_tokenizer(path, sidecar, lm_config, tokenizer)
    current = {key: value for key, value in config_dict(lm_config).items() if key in STRUCTURE}
    fix = "改用与它一致的尺寸参数（--hidden_size、--num_hidden_layers、--arch…）"
    check_same_config(saved, current, str(path), fix)
    return path
