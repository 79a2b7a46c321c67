"""每个配方：晚一步读（显卡上的做法）与当场就读，权重、优化器、续训存档、日志逐位相同。"""

from __future__ import annotations

import shutil

import pytest
from recipe_cases import CASES, log_lines, run_recipe, saved
from test_all_recipes_resume import assert_same, assert_same_run
from trainer_helpers import in_processes

from minimind.trainer.recipe import Run

QUICK = ("pretrain", "full_sft", "dpo", "grpo", "ppo")
pytestmark = pytest.mark.usefixtures("cache")
# 记录在第 4、8 步，存盘在第 5 步，验证在第 7 步：其余各步走完时，数都还没有读
SPARSE = {"max_steps": 9, "log_interval": 4, "save_interval": 5, "eval_interval": 7}


def train(late: bool, **options) -> None:
    if late:
        Run.reads_late = True
    run_recipe(**options)


def without_time(state: dict) -> dict:
    """续训存档里随时间、路径变的去掉。"""
    progress = {key: value for key, value in state["progress"].items() if key != "seconds"}
    interval = {key: value for key, value in progress["interval"].items() if key != "seconds"}
    kept = {key: value for key, value in state.items() if key not in ("args", "numerics")}
    return {**kept, "progress": {**progress, "interval": interval}}


@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES]
)
def test_晚一步读与当场就读逐位相同(tmp_path, base, world, recipe):
    case, folders = CASES[recipe], []
    for late in (False, True):
        folder, log = tmp_path / str(late), tmp_path / f"{late}.txt"
        folders.append(shutil.copytree(base, folder))
        options = {"case": case, "folder": folder, "argv": case.argv(world, **SPARSE)}
        assert in_processes(1, train, late=late, log=log, **options) == [0], log.read_text()[-3000:]
    assert_same_run(*folders, recipe)
    assert_same(*(without_time(saved(folder, case)) for folder in folders))
    assert [line["step"] for line in log_lines(folders[0], case) if "lr" in line] == [4, 8, 9]
