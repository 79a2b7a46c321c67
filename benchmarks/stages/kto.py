"""KTO：只标好坏，不成对；题目与考法同 DPO。"""

from __future__ import annotations

from bench_stages import Bench, Goal, Outcome
from stages import dpo

TITLE = "KTO：只标好坏，不成对"
GOALS = dpo.goals(Goal("accuracy", "留出的回答：与 z0 比，好的高、坏的低"), polite=0.35)
SETTINGS = {"loss_type": "kto", "sft_coef": 1.0, "batch_size": 32, "learning_rate": 1.8e-4}
FIGURE = {
    "title": "KTO (tiny, micro-world)",
    "panels": ("accuracy", "kl", "reward_chosen", "reward_rejected"),
}
before = dpo.before


def run(bench: Bench, seed: int) -> Outcome:
    """训练一次并考试。"""
    return dpo.run(bench, seed, **SETTINGS)
