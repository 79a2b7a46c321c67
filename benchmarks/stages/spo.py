"""SPO：单条采样，和自己的过去比；多步题答对的比例，训练前后。"""

from __future__ import annotations

from pathlib import Path

from bench_stages import Bench, Outcome
from stages import _rl

from minimind.recipes import spo

TITLE = "SPO：单条采样，和自己的过去比"
GOALS = _rl.GOALS
before = _rl.before


def settings(bench: Bench, seed: int, folder: Path) -> spo.SPOArguments:
    """演示里用的就是这一组。"""
    return spo.SPOArguments(**_rl.common(bench, seed, folder))


def run(bench: Bench, seed: int) -> Outcome:
    """训练一次并考试。"""
    return _rl.train_and_examine(bench, seed, settings, spo.run, ("tracker_explained",))
