"""十个配方共用的地面：进程组、模型、存档、采样、设备。各有自己的文件，这里集中导出。"""

from __future__ import annotations

from typing import Any

import torch

from minimind.errors import UserError
from minimind.model import MiniMindConfig, preset
from minimind.paths import resolve_path
from minimind.runtime.checkpoint import lm_checkpoint
from minimind.runtime.device import is_npu_available, prepare_device, resolve_device, seed_all
from minimind.runtime.distributed import (
    broadcast_object,
    init_distributed_mode,
    is_main_process,
    on_main,
    shutdown_distributed,
)
from minimind.runtime.files import check_writable
from minimind.runtime.weights import STRUCTURE, init_model
from minimind.trainer.loader import SkipBatchSampler, epoch_order
from minimind.trainer.progress import lr_at

__all__ = [
    "STRUCTURE",
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
