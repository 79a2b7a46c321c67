"""GRPO 追奖励模型：学会客气，题目不掉。"""

from __future__ import annotations

from bench_stages import Bench, Outcome
from stages import _reward

from minimind.recipes import grpo

TITLE = "GRPO 追奖励模型"
GOALS = _reward.GOALS
FIGURE = {
    "title": "GRPO against the reward model (tiny, micro-world)",
    **_reward.FIGURE,
}
STEPS = 80
SETTINGS = {"num_generations": 8, "learning_rate": 5e-4, "beta": 0.4, "reward": "auto:1.5,model:2"}
before = _reward.before


def run(bench: Bench, seed: int) -> Outcome:
    """训练一次并考试。"""
    return _reward.run(bench, seed, grpo.GRPOArguments, grpo.run, STEPS, **SETTINGS)
