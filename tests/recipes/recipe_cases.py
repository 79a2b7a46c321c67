"""十个配方的最小设置：一份极小的微世界、随机初始化的起点，几步就训练完。"""

from __future__ import annotations

import importlib
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from minimind.microworld import make_microworld
from minimind.model import MiniMindConfig, MiniMindForCausalLM
from minimind.runtime.checkpoint import config_dict, load_file, save_weights, weights_path
from minimind.tokenizer import load_tokenizer, tokenizer_fingerprint

SMALL = {"hidden_size": 64, "num_hidden_layers": 2}
COMMON = {
    **SMALL,
    "device": "cpu",
    "dtype": "float32",
    "max_seq_len": 160,
    "batch_size": 2,
    "accumulation_steps": 2,
    "epochs": 20,  # 步数够跨过几轮
    "max_steps": 5,
    "save_interval": 2,
    "log_interval": 3,
    "eval_interval": 4,
    "val_max_rows": 2,
    "num_workers": 0,
    "sample_prompts": "0",  # 与有样例的逐位相同另有测试
}
RL = {"max_gen_len": 6, "num_generations": 4}
# 随机的模型什么题也答不对，全零的奖励不产生梯度；这个奖励只看文字，有高有低
REWARD = """import zlib


def score(prompt, response, reference):
    return zlib.crc32(response.encode()) % 7 / 6
"""
# 随机的模型多半写不完一回合，没写完的没有回答；看它写过的每一个 id
AGENT_REWARD = """import zlib


def score(prompt, response, reference, conversation):
    return zlib.crc32(str(conversation.ids).encode()) % 7 / 6
"""


@dataclass(frozen=True)
class Case:
    """一个配方怎么跑。

    Args:
        recipe: ``minimind.recipes`` 下的模块名。
        data: 微世界里的文件名。
        weight: 保存权重的名字（``save_weight`` 的默认值）。
        flags: 在 :data:`COMMON` 之外的参数。
    """

    recipe: str
    data: str
    weight: str
    flags: dict = field(default_factory=dict)

    def main(self):
        return importlib.import_module(f"minimind.recipes.{self.recipe}").main

    def argv(self, world: Path, **changes) -> list[str]:
        """命令行；``changes`` 里值为 None 的参数去掉。"""
        files = {"data_path": world / f"{self.data}.jsonl", "val_path": world / f"{self.data}_heldout.jsonl"}
        if self.data in ("rl", "agent"):
            name = "reward.py" if self.data == "rl" else "agent_reward.py"
            files["reward"] = f"{world / name}:score"
        flags = {**files, **COMMON, **self.flags, **changes}
        return [
            part for name, value in flags.items() if value is not None for part in (f"--{name}", str(value))
        ]


CASES = {
    "pretrain": Case("pretrain", "pretrain", "pretrain"),
    "full_sft": Case("full_sft", "sft", "full_sft", {"from_weight": "full_sft"}),
    "lora": Case("lora", "lora_identity", "lora_identity"),
    "dpo": Case("dpo", "dpo", "dpo"),
    "reward": Case("reward", "dpo", "reward"),
    "distillation": Case("distillation", "sft", "full_dist", {"from_teacher_weight": "teacher"}),
    "reason": Case("reason", "reason", "reason"),
    "ppo": Case("ppo", "rl", "ppo_actor", RL),
    "grpo": Case("grpo", "rl", "grpo", RL),
    "spo": Case("spo", "rl", "spo", {**RL, "num_generations": 1, "reward_low": 0, "reward_high": 1}),
    "agent": Case(
        "agent", "agent", "agent", {**RL, "max_turns": 2, "max_seq_len": 300, "max_total_len": 420}
    ),
}


def make_world(folder: Path) -> Path:
    """几十行的微世界，留出部分各留 8 行。"""
    for name, path in make_microworld(folder, scale=0.01).items():
        if name.endswith("_heldout"):
            lines = path.read_text("utf-8").splitlines(keepends=True)
            path.write_text("".join(lines[:8]), "utf-8")
    (folder / "reward.py").write_text(REWARD)
    (folder / "agent_reward.py").write_text(AGENT_REWARD)
    return folder


def make_base(folder: Path, name: str = "full_sft", **changes) -> Path:
    """随机初始化的 ``out/{name}_{宽度}[_moe].pth``，各配方的起点，也当教师。"""
    torch.manual_seed(3)
    config = MiniMindConfig(**{**SMALL, **changes})
    model = MiniMindForCausalLM(config)
    sidecar = {
        "config": config_dict(config),
        "tokenizer_hash": tokenizer_fingerprint(load_tokenizer()),
        "recipe": "full_sft",
    }
    save_weights(model, weights_path(config, name, folder / "out"), sidecar)
    return folder


def run_recipe(case: Case, folder: Path, argv: list[str]) -> None:
    """在 ``folder`` 里运行一次；不成功就以同样的退出码离开。"""
    os.chdir(folder)
    if code := case.main()(argv):
        sys.exit(code)


def saved(folder: Path, case: Case, suffix: str = "") -> dict:
    """续训存档。"""
    return load_file(folder / "checkpoints" / f"{case.weight}_64{suffix}_resume.pth")


def weights_file(folder: Path, case: Case, suffix: str = "") -> Path:
    """写出的权重：LoRA 在 ``out/lora`` 里，其余在 ``out``。"""
    found = list((folder / "out").rglob(f"{case.weight}_64{suffix}.pth"))
    assert len(found) == 1, found
    return found[0]


def log_lines(folder: Path, case: Case, suffix: str = "") -> list[dict]:
    """日志里不随时间变的部分。"""
    text = (folder / "out" / "logs" / f"{case.weight}_64{suffix}.jsonl").read_text()
    timing = ("time", "tokens_per_s", "mfu")
    return [{k: v for k, v in json.loads(line).items() if k not in timing} for line in text.splitlines()]
