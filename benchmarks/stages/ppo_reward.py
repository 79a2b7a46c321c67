"""PPO 追奖励模型：学会客气，题目不掉。"""

from __future__ import annotations

from bench_stages import Bench, Outcome
from stages import _reward

from minimind.recipes import ppo

TITLE = "PPO 追奖励模型"
GOALS = _reward.GOALS
FIGURE = {
    "title": "PPO against the reward model (tiny, micro-world)",
    **_reward.FIGURE,
}
STEPS = 54
SETTINGS = {"optimizer": "adamw", "learning_rate": 2e-4, "kl_coef": 0.07, "reward": "auto:1.5,model:2"}
before = _reward.before


def run(bench: Bench, seed: int) -> Outcome:
    """训练一次并考试。"""
    return _reward.run(bench, seed, ppo.PPOArguments, ppo.run, STEPS, **SETTINGS)
