"""九个配方共用的地面：进程组、模型、存档、采样、设备。各有自己的文件，这里集中导出。"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from minimind.console import say
from minimind.errors import UserError
from minimind.model import MiniMindConfig, MiniMindLM, preset
from minimind.paths import resolve_path
from minimind.runtime.checkpoint import (
    check_same_config,
    config_dict,
    file_stem,
    lm_checkpoint,
    load_weights,
    read_sidecar,
    weights_path,
)
from minimind.runtime.device import is_npu_available, prepare_device, resolve_device, seed_all
from minimind.runtime.distributed import (
    broadcast_object,
    broadcast_state,
    init_distributed_mode,
    is_main_process,
    on_main,
    shutdown_distributed,
)
from minimind.runtime.files import check_writable
from minimind.tokenizer import load_tokenizer, tokenizer_fingerprint
from minimind.trainer.loader import SkipBatchSampler, epoch_order
from minimind.trainer.progress import lr_at

__all__ = [
    "SkipBatchSampler",
    "epoch_order",
    "init_distributed_mode",
    "init_model",
    "is_main_process",
    "is_npu_available",
    "lm_checkpoint",
    "lr_at",
    "model_config",
    "resolve_device",
    "setup_seed",
    "shutdown_distributed",
    "start_run",
]

setup_seed = seed_all  # 旧项目的名字

# 权重名 → 得到它的命令，写进“找不到权重”的提示里
COMMANDS = {
    "pretrain": "python trainer/train_pretrain.py",
    "full_sft": "python trainer/train_full_sft.py",
    "dpo": "python trainer/train_dpo.py",
    "reason": "python trainer/train_reason.py",
    "ppo_actor": "python trainer/train_ppo.py",
    "grpo": "python trainer/train_grpo.py",
    "spo": "python trainer/train_spo.py",
    "full_dist": "python trainer/train_distillation.py",
}


def start_run(args: Any) -> torch.device:
    """训练命令的第一步：建进程组、查输出目录、选设备、设种子（各进程同一个种子，模型初始化才一致）。

    Raises:
        UserError: 没有这个设备，或输出目录写不了：训练几个小时之后才发现存不下就晚了。
    """
    local_rank = init_distributed_mode(args.device)
    # 没写明的参数有的由磁盘上有哪些权重而定（蒸馏的起点与学习率），各机器看到的可以不同，一律听主进程的
    vars(args).update(broadcast_object(vars(args)))
    on_main(lambda: check_outputs(args))
    device = resolve_device(args.device, local_rank if torch.distributed.is_initialized() else None)
    prepare_device(device)
    seed_all(args.seed)
    return device


def check_outputs(args: Any) -> None:
    """权重、日志与续训存档的目录都要能写；哪个写不了就说哪个参数。"""
    checkpoint_dir, save_dir = resolve_path(args.checkpoint_dir), resolve_path(args.save_dir)
    check_writable(save_dir, "--save_dir")
    check_writable(save_dir / "logs", "--save_dir")
    check_writable(checkpoint_dir, "--checkpoint_dir")


def model_config(args: Any, **overrides: Any) -> MiniMindConfig:
    """由命令行参数得到模型配置；给了 ``--preset`` 就以它的尺寸为准。

    从头训练的初始化随优化器：Muon 用残差为零的，同样步数验证损失更低；AdamW 每个数走的步子有上限，从零起步反而慢，
    用普通的（docs/quality.md）。载入权重时它不起作用。

    v3 的混合专家只选一个专家，权重归一之后恒为 1，路由器从损失得不到梯度（7e-10，不归一 3e-3），所以从头训练时不归一；
    从已有的权重开始则照它训练时的（旁注里写着；公开的没有旁注，按归一）。
    """
    overrides = {"zero_init_residual": args.optimizer == "muon", **overrides}
    try:
        if args.preset:
            return _learnable_router(args, preset(args.preset, **{"arch": args.arch, **overrides}))
        sizes = {
            "arch": args.arch,
            "hidden_size": args.hidden_size,
            "num_hidden_layers": args.num_hidden_layers,
            "use_moe": bool(args.use_moe),
        }
        return _learnable_router(args, MiniMindConfig(**{**sizes, **overrides}))
    except ValueError as error:
        raise UserError(str(error), where="模型尺寸") from error


def _learnable_router(args: Any, config: MiniMindConfig) -> MiniMindConfig:
    """从头训练的单选路由器不归一，见 :func:`model_config`。"""
    if args.from_weight == "none" and config.arch == "v3" and config.num_experts_per_tok == 1:
        config.norm_topk_prob = False
    return config


def init_model(
    lm_config: MiniMindConfig,
    from_weight: str = "pretrain",
    tokenizer_path: str | None = None,
    save_dir: str | Path = "out",
    device: str | torch.device = "auto",
) -> tuple[MiniMindLM, Any]:
    """配置 + 权重 + 分词器。

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
    device = resolve_device(device) if isinstance(device, str) else device
    # 权重只由主进程写，也就只由它读，发给大家：别的机器上没有这个文件
    path = None
    if from_weight != "none":
        path = on_main(lambda: _find_weights(lm_config, tokenizer, from_weight, save_dir))
        trained = broadcast_object(on_main(lambda: (read_sidecar(path) or {}).get("config", {})))
        lm_config.norm_topk_prob = trained.get("norm_topk_prob", lm_config.norm_topk_prob)
        if trained.get("trained_length"):
            lm_config.record_trained_length(trained["trained_length"])
    model = MiniMindForCausalLM(lm_config)
    if from_weight != "none":
        on_main(lambda: load_weights(model, path))
        model.load_state_dict(broadcast_state(model.state_dict(), device))
        say(f"从 {path} 读入权重。")
    return model.to(device), tokenizer


def _find_weights(lm_config: MiniMindConfig, tokenizer: Any, from_weight: str, save_dir: str | Path) -> Path:
    """权重文件，已核对过旁注。"""
    path = weights_path(lm_config, from_weight, save_dir)
    if path.is_file():
        _check_sidecar(path, lm_config, tokenizer)
        return path
    others = sorted(p.name for p in resolve_path(save_dir).glob(f"{from_weight}_*.pth"))
    size = f" --hidden_size {lm_config.hidden_size}" + (" --use_moe 1" if lm_config.use_moe else "")
    if from_weight in COMMANDS:
        hint = f"；目录里有 {'、'.join(others)}，可改 --hidden_size / --use_moe 与它一致" if others else ""
        fix = f"先运行 {COMMANDS[from_weight]}{size}{hint}"
    else:
        there = others or sorted(p.name for p in resolve_path(save_dir).glob("*.pth"))
        there = f"目录里有 {'、'.join(there[:8])}" if there else "目录里一份权重也没有"
        fix = f"名字写错了就改（{there}）；没写错，就在训练它的命令里加 --save_weight {from_weight}{size}"
    raise UserError(
        f"没有权重文件（{file_stem(lm_config, from_weight)}.pth）",
        where=str(path),
        fix=fix,
    )


# 决定权重形状与含义的配置项；其余（dropout、注意力实现、外推）可以随意不同
STRUCTURE = (
    "arch", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "vocab_size", "use_moe", "n_routed_experts", "num_experts_per_tok", "n_shared_experts",
    "moe_intermediate_size", "rope_theta", "tie_word_embeddings",
)  # fmt: skip


def _check_sidecar(path: Path, lm_config: MiniMindConfig, tokenizer: Any) -> None:
    """旁注里的结构与分词器必须和现在的一致；没有旁注（旧项目的权重）就靠形状检查。"""
    sidecar = read_sidecar(path)
    if not sidecar:
        return
    current = {key: value for key, value in config_dict(lm_config).items() if key in STRUCTURE}
    check_same_config(
        sidecar.get("config", {}),
        current,
        str(path),
        "改用与它一致的尺寸参数（--hidden_size、--num_hidden_layers、--arch…）",
    )
    saved_hash = sidecar.get("tokenizer_hash")
    if saved_hash and saved_hash != tokenizer_fingerprint(tokenizer):
        raise UserError(
            "这个权重是用另一个分词器训练的", where=str(path), fix="用 --tokenizer_path 指向训练它时的分词器"
        )
