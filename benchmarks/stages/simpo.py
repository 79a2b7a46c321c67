"""SimPO：不要参考模型，每词元概率加间隔；题目与考法同 DPO。"""

from __future__ import annotations

from bench_stages import Bench, Goal, Outcome
from stages import dpo

TITLE = "SimPO：不要参考模型，每词元概率加间隔"
GOALS = dpo.goals(Goal("accuracy", "留出的偏好对：好的每词元概率更高"), polite=0.35)
SETTINGS = {"loss_type": "simpo", "sft_coef": 2.0, "learning_rate": 1.7e-4}
FIGURE = {"title": "SimPO (tiny, micro-world)", "panels": ("accuracy", "margin", "loss")}
before = dpo.before


def run(bench: Bench, seed: int) -> Outcome:
    """训练一次并考试。"""
    return dpo.run(bench, seed, **SETTINGS)
