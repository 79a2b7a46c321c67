"""GRPO：同题多答，组内比较；多步题答对的比例，训练前后。"""

from __future__ import annotations

from pathlib import Path

from bench_stages import Bench, Outcome
from stages import _rl

from minimind.recipes import grpo

TITLE = "GRPO：同题多答，组内比较"
GOALS = _rl.GOALS
before = _rl.before


def settings(bench: Bench, seed: int, folder: Path) -> grpo.GRPOArguments:
    """演示里用的就是这一组。"""
    return grpo.GRPOArguments(**_rl.common(bench, seed, folder, generations=8))


def run(bench: Bench, seed: int) -> Outcome:
    """训练一次并考试。"""
    return _rl.train_and_examine(bench, seed, settings, grpo.run, ("zero_spread",))
