"""公共项目发布过的每个文件名：照公布的格式写几行，检查得过，读它的配方训练两步，中途收到信号停下，续训逐位相同。"""

from __future__ import annotations

import os
import shutil
import signal

import pytest
import torch
from public_minimind3 import ROWS, write_data
from recipe_cases import CASES, log_lines, saved, weights_file
from trainer_helpers import assert_same_weights

from minimind import signals
from minimind.dataset.check import main_check
from minimind.dataset.published import PUBLISHED
from minimind.trainer import loop

# 阶段 → 读它的配方
READERS = {
    "pretrain": ("pretrain",),
    "sft": ("full_sft",),
    "reason": ("reason",),
    "dpo": ("dpo", "reward"),
    "rl": ("grpo", "ppo", "spo"),
    "agent": ("agent",),
    "lora_identity": ("lora",),
    None: ("lora",),
}
TOKENIZER = "tokenizer_train"  # 只用来训练分词器，没有存档
NAMES = [one.name for one in PUBLISHED if one.name != TOKENIZER]
PAIRS = [(one.name, recipe) for one in PUBLISHED if one.name != TOKENIZER for recipe in READERS[one.stage]]


def argv(world, path, recipe, **changes):
    options = {"max_steps": 2, "save_interval": 0, "log_interval": 1, "eval_interval": 0}
    options |= {"val_path": None, "val_ratio": 0, "max_seq_len": 320, **changes}
    if recipe == "agent":
        options |= {"max_total_len": 460}
    return CASES[recipe].argv(world, data_path=path, **options)


@pytest.fixture
def stop_after_first(monkeypatch):
    """第一步里收到 SIGTERM：走完这一步，存盘，离开。"""
    original = loop.forward_backward
    monkeypatch.setattr(signals, "PATIENCE", 600)  # 机器再忙也走完这一步

    def forward_backward(run, *rest):
        monkeypatch.setattr(loop, "forward_backward", original)  # 一步里更新几次的也只发一次
        os.kill(os.getpid(), signal.SIGTERM)
        return original(run, *rest)

    return lambda: monkeypatch.setattr(loop, "forward_backward", forward_backward)


def test_这里写的就是发布过的全部名字():
    assert set(ROWS) == {one.name for one in PUBLISHED}


def test_每个名字都检查得过(tmp_path, cache):
    for name in ROWS:
        assert main_check([str(write_data(tmp_path / f"{name}.jsonl"))]) == 0, name


@pytest.mark.parametrize(("name", "recipe"), PAIRS, ids=[f"{name}-{recipe}" for name, recipe in PAIRS])
def test_训练两步_停下_续训逐位相同(home, base, world, tmp_path, monkeypatch, stop_after_first, name, recipe):
    case, other = CASES[recipe], shutil.copytree(base, tmp_path / "stopped")
    path = write_data(tmp_path / f"{name}.jsonl")
    assert case.main()(argv(world, path, recipe)) == 0
    assert saved(home, case)["step"] == 2

    monkeypatch.chdir(other)
    stop_after_first()
    with pytest.raises(SystemExit) as left:
        case.main()(argv(world, path, recipe))
    assert left.value.code == 143
    assert saved(other, case)["step"] == 1
    assert case.main()(argv(world, path, recipe, from_resume=1)) == 0

    one, two = saved(home, case), saved(other, case)
    assert two["step"] == 2
    assert_same_weights(one["model"], two["model"])
    files = [torch.load(weights_file(folder, case), weights_only=True) for folder in (home, other)]
    assert_same_weights(*files)
    assert log_lines(home, case) == log_lines(other, case)
