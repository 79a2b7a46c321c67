"""PPO：价值网络作基线；多步题答对的比例，训练前后。"""

from __future__ import annotations

from pathlib import Path

from bench_stages import Bench, Outcome
from stages import _rl

from minimind.recipes import ppo

TITLE = "PPO：价值网络作基线"
GOALS = _rl.GOALS
before = _rl.before


def settings(bench: Bench, seed: int, folder: Path) -> ppo.PPOArguments:
    """演示里用的就是这一组。"""
    return ppo.PPOArguments(
        **_rl.common(bench, seed, folder),
        ppo_epochs=1,  # 走两轮多用六成时间
        critic_learning_rate=1e-3,
    )


def run(bench: Bench, seed: int) -> Outcome:
    """训练一次并考试。"""
    return _rl.train_and_examine(bench, seed, settings, ppo.run, ("explained_variance",))
