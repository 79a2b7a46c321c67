"""SPO 追奖励模型：学会客气，题目不掉。"""

from __future__ import annotations

from bench_stages import Bench, Outcome
from stages import _reward

from minimind.recipes import spo

TITLE = "SPO 追奖励模型"
GOALS = _reward.GOALS
FIGURE = {
    "title": "SPO against the reward model (tiny, micro-world)",
    **_reward.FIGURE,
}
STEPS = 80
SETTINGS = {
    "learning_rate": 5e-4,
    "beta": 0.4,
    "reward": "auto:1.5,model:2",
    "reward_low": -1.0,
    "reward_high": 2.5,
}
before = _reward.before


def run(bench: Bench, seed: int) -> Outcome:
    """训练一次并考试。"""
    return _reward.run(bench, seed, spo.SPOArguments, spo.run, STEPS, **SETTINGS)
