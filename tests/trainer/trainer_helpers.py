"""测试共用：两层、宽 64 的真模型，一份手造的定长数据，以及“另开进程训练一次”。"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from minimind.errors import guard
from minimind.model import MiniMindConfig, MiniMindForCausalLM
from minimind.runtime import device
from minimind.runtime.checkpoint import load_file
from minimind.runtime.distributed import init_distributed_mode, shutdown_distributed
from minimind.trainer import loop
from minimind.trainer.loop import TrainResult, train
from minimind.trainer.recipe import Data, Recipe, language_model_loss
from minimind.trainer.train_args import TrainArguments

torch.set_num_threads(1)  # fork 之后 OpenMP 的线程池不可用
device.PEAK_SECONDS = 0.0  # 测一次就够：这里训练上百回，不看利用率准不准
VOCAB, LENGTH = 97, 12


class ToyRows:
    """``size`` 行随机词元；每行的目标数各不相同，好让“平均的平均”露馅；第 3 行一个目标也没有。"""

    def __init__(self, size: int = 22, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(3, VOCAB, (size, LENGTH), generator=generator)
        self.targets = torch.randint(1, LENGTH, (size,), generator=generator)
        if size > 3:
            self.targets[3] = 0

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        labels = self.ids[index].clone()
        labels[: LENGTH - int(self.targets[index])] = -100
        return {"input_ids": self.ids[index], "labels": labels}


def stack(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def toy_recipe(loss: Callable = language_model_loss, collate: Callable = stack, **hooks: Any) -> Recipe:
    """手造数据上的配方；``hooks`` 是 :class:`Recipe` 的其余各项。"""
    return Recipe("pretrain", loss, collate, **hooks)


def tiny_config(**changes) -> MiniMindConfig:
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
    }
    return MiniMindConfig(**{**sizes, **changes})


def tiny_model(seed: int = 7, **changes) -> MiniMindForCausalLM:
    torch.manual_seed(seed)
    return MiniMindForCausalLM(tiny_config(**changes))


def tiny_args(folder: Path | str, **changes) -> TrainArguments:
    """所有输出都在 ``folder`` 里；CPU、fp32。"""
    settings = {
        "save_dir": str(Path(folder) / "out"),
        "checkpoint_dir": str(Path(folder) / "checkpoints"),
        "save_weight": "toy",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "batch_size": 2,
        "max_seq_len": LENGTH,
        "log_interval": 1,
        "save_interval": 0,
        "eval_interval": 0,
        "device": "cpu",
        "dtype": "float32",
        "num_workers": 0,
        # 默认值会随测量改变，测试不跟着变
        "optimizer": "muon",
        "learning_rate": 5e-3,
        "embed_lr_scale": 1.0,
        "weight_decay": 0.1,
        "schedule": "wsd",
        "warmup_ratio": 0.02,
        "decay_ratio": 0.3,
    }
    return TrainArguments(**{**settings, **changes})


def toy_train(
    folder: Path | str,
    *,
    rows: int = 22,
    val_rows: int = 0,
    model: dict[str, Any] | None = None,
    loss: Callable = language_model_loss,
    **changes,
) -> TrainResult:
    """在手造数据上训练一次；``changes`` 改命令行参数，``model`` 改模型配置。"""
    val_ds = ToyRows(val_rows, seed=1) if val_rows else None
    args = tiny_args(folder, **changes)
    return train(args, toy_recipe(loss), tiny_model(**(model or {})), None, Data(ToyRows(rows), val_ds))


def saved_model(folder: Path | str, name: str = "toy_64") -> dict[str, torch.Tensor]:
    """续训存档里的 fp32 权重。"""
    return load_file(Path(folder) / "checkpoints" / f"{name}_resume.pth")["model"]


def assert_same_weights(a: dict, b: dict) -> None:
    """逐位相同。"""
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), f"{key} 不同，最大差 {(a[key] - b[key]).abs().max()}"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _child(rank: int, world: int, port: int, stderr: str, work: Callable, kwargs: dict) -> None:
    sys.stdout = sys.stderr = open(stderr, "a", buffering=1)  # noqa: SIM115  进程结束才关
    if world > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip

    def main() -> int:
        init_distributed_mode("cpu")
        work(**kwargs)
        shutdown_distributed()
        return 0

    sys.exit(guard(main)())


def in_processes(world: int, work: Callable, *, wait: bool = True, log: Path | None = None, **kwargs) -> Any:
    """在 ``world`` 个 fork 出来的进程里跑 ``work(**kwargs)``，多于一个时用 gloo 连起来。

    fork 省下重新导入 torch 的几秒；被杀、被信号打断都与独立进程无异。

    Returns:
        ``wait`` 时是各进程的退出码，否则是进程对象的列表。
    """
    context, port = multiprocessing.get_context("fork"), free_port()
    stderr = str(log or os.devnull)
    processes = [
        context.Process(target=_child, args=(rank, world, port, stderr, work, kwargs))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    if not wait:
        return processes
    for process in processes:
        process.join(300)  # 真卡住才会等这么久；机器再忙也够
        if process.is_alive():
            process.kill()
    return [process.exitcode for process in processes]


def record_samples(path: Path) -> None:
    """在本进程里把训练循环真正用过的样本编号逐行追加到 ``path``。"""
    original = loop.forward_backward

    def recording(run, window, *rest):
        with open(path, "a") as file:
            file.writelines(f"{run.state.epoch} {i}\n" for ids, _ in window for i in ids)
        return original(run, window, *rest)

    loop.forward_backward = recording
