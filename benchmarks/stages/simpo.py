"""SimPO：不要参考模型，每词元概率加间隔；题目与考法同 DPO。"""

from __future__ import annotations

from bench_stages import Bench, Goal, Outcome
from stages import dpo

TITLE = "SimPO：不要参考模型，每词元概率加间隔"
GOALS = [Goal("accuracy", "留出的偏好对：好的每词元概率更高"), *dpo.GOALS[1:]]
SETTINGS = {"loss_type": "simpo", "learning_rate": 1.6e-4}
before = dpo.before


def run(bench: Bench, seed: int) -> Outcome:
    """训练一次并考试。"""
    return dpo.run(bench, seed, **SETTINGS)
