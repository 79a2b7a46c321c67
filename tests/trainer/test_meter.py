"""剩余时间：按最近的步估计，验证与存盘都算进去。"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trainer_helpers import tiny_args

from minimind import console as meter_module
from minimind.arguments import parse_args
from minimind.console import Meter
from minimind.errors import UserError
from minimind.trainer.progress import events_left
from minimind.trainer.train_args import TrainArguments


@given(st.integers(0, 200), st.integers(0, 200), st.integers(0, 20))
def test_还剩几次等于逐步数出来的(step, total, interval):
    due = [s for s in range(step + 1, total + 1) if s == total or (interval and s % interval == 0)]
    assert events_left(step, total, interval) == len(due)


@pytest.fixture
def clock(monkeypatch):
    now = {"t": 100.0}
    monkeypatch.setattr(meter_module.time, "perf_counter", lambda: now["t"])
    return now


def test_剩余时间含验证与存盘且不被第一步带偏(clock):
    meter = Meter(eval_guess_steps=3.0)
    clock["t"] += 60  # 第一步要编译
    meter.lap()
    for _ in range(10):
        clock["t"] += 2
        assert meter.lap() == 2
    assert meter.seconds_left(steps=100, evals=0, saves=0) == pytest.approx(200)
    assert meter.seconds_left(steps=100, evals=2, saves=0) == pytest.approx(200 + 2 * 6)  # 还没验证过：猜
    with meter.pause("eval"):
        clock["t"] += 30
    with meter.pause("save"):
        clock["t"] += 5
    clock["t"] += 2
    assert meter.lap() == 2  # 停顿不算进步时
    assert meter.seconds_left(steps=100, evals=2, saves=3) == pytest.approx(200 + 60 + 15)


def test_变快变慢跟得上(clock):
    meter = Meter()
    for seconds in [1] * 60 + [3] * 50:
        clock["t"] += seconds
        meter.lap()
    assert meter.seconds_left(10, 0, 0) == pytest.approx(30)


@pytest.mark.parametrize(
    "changes", [{"batch_size": 0}, {"epochs": -1}, {"learning_rate": float("nan")}, {"warmup_ratio": 1.5}]
)
def test_取值不对的参数一句话(tmp_path, changes):
    with pytest.raises(UserError, match=f"--{next(iter(changes))}"):
        tiny_args(tmp_path, **changes)


def test_旧命令行照用():
    """公共项目的参数名与写法：开关可以写 0/1，--use_wandb 可以不带值。"""
    flags = (
        "--save_dir out --save_weight pretrain --epochs 1 --batch_size 32 --learning_rate 5e-4 --device cpu "
        "--dtype bfloat16 --num_workers 8 --accumulation_steps 8 --grad_clip 1.0 --log_interval 100 "
        "--save_interval 100 --hidden_size 512 --num_hidden_layers 8 --max_seq_len 340 --use_moe 0 "
        "--data_path ../dataset/pretrain_hq.jsonl --from_weight none --from_resume 0 --use_wandb "
        "--wandb_project MiniMind-Pretrain --use_compile 1"
    )
    args = parse_args(TrainArguments, flags.split())
    assert (args.use_wandb, args.use_compile, args.use_moe, args.learning_rate) == (1, 1, 0, 5e-4)
