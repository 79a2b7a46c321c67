"""测试共用：两层、宽 64 的真模型，与一份手造的定长数据。"""

from __future__ import annotations

from pathlib import Path

import torch

from minimind.model import MiniMindConfig, MiniMindForCausalLM
from minimind.trainer.train_args import TrainArguments

VOCAB, LENGTH = 97, 12


class ToyRows:
    """``size`` 行随机词元；每行的目标数各不相同，好让“平均的平均”露馅；个别行一个目标也没有。"""

    def __init__(self, size: int = 22, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(3, VOCAB, (size, LENGTH), generator=generator)
        self.targets = torch.randint(1, LENGTH, (size,), generator=generator)
        self.targets[3] = 0
        self.seen: list[int] = []

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.seen.append(index)
        labels = self.ids[index].clone()
        labels[: LENGTH - int(self.targets[index])] = -100
        return {"input_ids": self.ids[index], "labels": labels}


def stack(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


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
        "learning_rate": 5e-3,
    }
    return TrainArguments(**{**settings, **changes})
