"""三个强化学习配方的测试共用：起点、自定的奖励，以及在本进程里训练一次。"""

from __future__ import annotations

import json
import os
from pathlib import Path

from recipe_cases import CASES, log_lines

# 回答里英文字母、数字与标点的比例：小模型几步就学得会，又不会一上来就满分
REWARD = """
def ascii_share(prompt, response, reference):
    text = response.strip()
    return sum(c.isascii() for c in text) / len(text) if text else 0.0
"""
LEARN = {
    "max_steps": 20, "batch_size": 4, "accumulation_steps": 1, "log_interval": 1, "save_interval": 0,
    "eval_interval": 0, "max_gen_len": 6, "optimizer": "adamw", "learning_rate": 1e-2, "schedule": "wsd",
    "temperature": 0.1,  # 随机初始化的输出近乎均匀，低温才有分别
}  # fmt: skip


def write_reward(folder: Path) -> str:
    path = folder / "my_reward.py"
    path.write_text(REWARD, "utf-8")
    return f"{path}:ascii_share"


def train_here(recipe: str, folder: Path, world: Path, **changes) -> list[dict]:
    """在本进程里训练；返回训练的各行日志。"""
    case = CASES[recipe]
    os.chdir(folder)
    assert case.main()(case.argv(world, **changes)) in (None, 0)
    return [line for line in log_lines(folder, case) if "lr" in line]


def learns(recipe: str, folder: Path, world: Path, **changes) -> list[dict]:
    """按自定的奖励训练；返回日志，断言奖励明显上升、每行都有该有的体征。"""
    lines = train_here(recipe, folder, world, reward=write_reward(folder), **{**LEARN, **changes})
    rewards = [line["reward"] for line in lines]
    first, last = sum(rewards[:4]) / 4, sum(rewards[-4:]) / 4
    assert last > first + 0.15, json.dumps(rewards)
    for name in ("reward_std", "response_length", "truncated", "clip_share", "approx_kl", "entropy"):
        assert all(name in line for line in lines), name
    return lines
