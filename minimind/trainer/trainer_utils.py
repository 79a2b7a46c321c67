"""十个配方共用的地面：进程组、模型、存档、采样、设备。各有自己的文件，这里集中导出公共项目的名字。"""

from __future__ import annotations

from minimind.runtime.checkpoint import lm_checkpoint
from minimind.runtime.device import is_npu_available, resolve_device, seed_all
from minimind.runtime.distributed import init_distributed_mode, is_main_process, shutdown_distributed
from minimind.runtime.weights import STRUCTURE, init_model
from minimind.trainer.loader import SkipBatchSampler, epoch_order
from minimind.trainer.progress import lr_at
from minimind.trainer.setup import model_config, start_run

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
