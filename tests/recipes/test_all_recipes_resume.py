"""十个配方一视同仁：被 kill -9 之后续训逐位相同，两个进程的权重一致，各种精度与混合专家都走得通。"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal

import pytest
import torch
from recipe_cases import CASES, log_lines, run_recipe, saved, weights_file
from trainer_helpers import assert_same_weights, in_processes

from minimind import signals
from minimind.recipes.health import RLHealth, distillation_health, preference_health
from minimind.rl.experience import Collector
from minimind.rl.rollout import LocalRollout
from minimind.runtime import distributed
from minimind.trainer import loop

RECIPES = list(CASES)
RL_RECIPES = ("ppo", "grpo", "spo")
pytestmark = pytest.mark.usefixtures("cache")


def start(base, folder):
    shutil.copytree(base, folder)
    return folder


def die_at(step: int, **kwargs) -> None:
    """完成 ``step`` 步之后、下一步走到一半时 kill -9 自己。"""
    original = loop.forward_backward

    def forward_backward(run, *rest):
        result = original(run, *rest)
        if run.state.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    loop.forward_backward = forward_backward
    run_recipe(**kwargs)


def stick_in_rollout(step: int, **kwargs) -> None:
    """完成 ``step`` 步之后采样时收到 SIGTERM，采到一半再也出不来；采样动过的随机数、体征都不作数。"""
    signals.PATIENCE = 0.5
    original_collect, original_generate = Collector.collect, LocalRollout.generate
    now = {"step": -1}

    def collect(self, run, prompts):
        now["step"] = run.state.step
        run.record(made_up=(1.0, 1.0))  # 采样之前就记下了点什么
        return original_collect(self, run, prompts)

    def generate(self, *args):
        if now["step"] == step:
            torch.rand(1)
            os.kill(os.getpid(), signal.SIGTERM)
            hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
        return original_generate(self, *args)

    Collector.collect, LocalRollout.generate = collect, generate
    run_recipe(**kwargs)


def record_made_up(**kwargs) -> None:
    """对照：同样多记一项，不收信号。"""
    original = Collector.collect

    def collect(self, run, prompts):
        run.record(made_up=(1.0, 1.0))
        return original(self, run, prompts)

    Collector.collect = collect
    run_recipe(**kwargs)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("recipe", RL_RECIPES)
def test_采样途中收到信号_放弃这一步_续训逐位相同(tmp_path, base, world, recipe, processes):
    """第 3 步不存盘；采第 4 步时放弃，存下的是第 3 步，含记分牌与记录区间里攒了一半的数。"""
    whole, stuck, case = start(base, tmp_path / "whole"), start(base, tmp_path / "stuck"), CASES[recipe]
    log, argv = tmp_path / "log", case.argv(world, log_interval=2)
    common = {"log": log, "case": case}
    codes = in_processes(processes, record_made_up, folder=whole, argv=argv, **common)
    assert codes == [0] * processes, log.read_text()[-3000:]
    codes = in_processes(processes, stick_in_rollout, step=3, folder=stuck, argv=argv, **common)
    assert codes == [143] * processes, log.read_text()[-3000:]
    assert saved(stuck, case)["step"] == 3
    resume = [*argv, "--from_resume", "1"]
    codes = in_processes(processes, record_made_up, folder=stuck, argv=resume, **common)
    assert codes == [0] * processes, log.read_text()[-3000:]
    assert_same_run(stuck, whole, recipe)


def train(folder, recipe, world, processes: int = 1, kill_at: int | None = None, **changes) -> None:
    case, log = CASES[recipe], folder / f"stderr{len(list(folder.glob('stderr*')))}.txt"
    options = {"case": case, "folder": folder, "argv": case.argv(world, **changes)}
    if kill_at is None:
        codes, want = in_processes(processes, run_recipe, log=log, **options), 0
    else:
        codes, want = in_processes(processes, die_at, log=log, step=kill_at, **options), -signal.SIGKILL
    assert codes == [want] * processes, log.read_text()[-3000:]


def assert_same_run(one, two, recipe, suffix: str = "") -> None:
    """续训存档（权重、优化器、配方状态）、写出的权重、日志都逐位相同。"""
    case = CASES[recipe]
    a, b = saved(one, case, suffix), saved(two, case, suffix)
    assert a["step"] == b["step"]
    assert_same_weights(a["model"], b["model"])
    assert_same(a["optimizer"], b["optimizer"])
    assert_same(a["recipe_state"], b["recipe_state"])
    files = [torch.load(weights_file(f, case, suffix), weights_only=True) for f in (one, two)]
    assert_same_weights(*files)
    assert log_lines(one, case, suffix) == log_lines(two, case, suffix)


def assert_same(a, b, path: str = "") -> None:
    """嵌套的字典与列表逐项逐位相同。"""
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, pair in enumerate(zip(a, b)):
            assert_same(*pair, f"{path}[{i}]")
    else:
        assert a == b, path


@pytest.mark.parametrize("recipe", RECIPES)
def test_被杀之后续训逐位相同(tmp_path, base, world, recipe):
    """第 4 步走到一半被杀：存档在第 2 步，记录区间（3 步）跨过存盘点，验证在第 4 步。"""
    whole, killed = start(base, tmp_path / "whole"), start(base, tmp_path / "killed")
    train(whole, recipe, world)
    assert [line["step"] for line in log_lines(whole, CASES[recipe]) if "lr" in line] == [3, 5]
    train(killed, recipe, world, kill_at=3)
    halfway = saved(killed, CASES[recipe])
    assert halfway["step"] == 2
    train(killed, recipe, world, from_resume=1)
    assert_same_run(killed, whole, recipe)
    final = saved(whole, CASES[recipe])["model"]
    assert any(not torch.equal(final[key], halfway["model"][key]) for key in final)  # 后三步确实改了权重
    assert all(line["grad_norm"] > 0 for line in log_lines(whole, CASES[recipe]) if "lr" in line)


@pytest.mark.slow
@pytest.mark.parametrize("use_moe", [0, 1])
@pytest.mark.parametrize("recipe", RECIPES)
def test_每一步被杀都能续上(tmp_path, base, world, recipe, use_moe):
    """每一步都被杀一次，含还没有存档的头两步；稠密与混合专家。"""
    suffix, options = "_moe" * use_moe, {"use_moe": use_moe, "save_interval": 1}
    whole, killed = start(base, tmp_path / "whole"), start(base, tmp_path / "killed")
    train(whole, recipe, world, **options)
    for step in range(5):
        train(killed, recipe, world, kill_at=step, from_resume=1, **options)
    train(killed, recipe, world, from_resume=1, **options)
    assert_same_run(killed, whole, recipe, suffix)


# 默认之外、各有自己状态或随机数的设置
VARIANTS = [
    ("lora", {"lora_targets": "square", "optimizer": "muon"}),
    ("dpo", {"cache_reference": 0, "loss_type": "ipo"}),
    ("dpo", {"loss_type": "sigmoid_norm", "label_smoothing": 0.1}),
    ("dpo", {"loss_type": "orpo"}),
    ("dpo", {"loss_type": "simpo", "simpo_gamma": 0.5, "sft_coef": 0.1}),
    ("dpo", {"loss_type": "kto", "desirable_weight": 2}),
    ("dpo", {"loss_type": "kto", "cache_reference": 0}),
    ("distillation", {"on_policy": 0.5, "max_gen_len": 6, "divergence": "jsd"}),
    ("ppo", {"kl_coef": 0, "ppo_epochs": 3, "target_kl": 1e-4, "critic_learning_rate": 1e-3}),
    ("grpo", {"beta": 0.1, "dynamic_sampling": 1, "loss_type": "cispo"}),
    ("grpo", {"mask_truncated": 1, "scale_rewards": "batch", "loss_type": "dr_grpo"}),
    ("grpo", {"loss_type": "gspo", "beta": 0.1}),
    ("spo", {"beta": 0.1, "offline_samples": 2, "epochs": 20}),
    ("agent", {"beta": 0.1, "thinking_ratio": 0.5, "loss_type": "grpo", "mask_truncated": 0}),
    ("full_sft", {"optimizer": "adamw", "schedule": "wsd"}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "options"), VARIANTS)
def test_别的设置被杀后续训逐位相同(tmp_path, base, world, recipe, options):
    whole, killed = start(base, tmp_path / "whole"), start(base, tmp_path / "killed")
    train(whole, recipe, world, **options)
    train(killed, recipe, world, kill_at=3, **options)
    train(killed, recipe, world, from_resume=1, **options)
    assert_same_run(killed, whole, recipe)
    train_two(start(base, tmp_path / "two"), recipe, world, **options)


def save_each_rank(**kwargs) -> None:
    """训练结束时每个进程各写一份自己的权重：存盘只由主进程做，看不出各进程是否一致。"""
    original = loop.finish

    def finish(run):
        torch.save(run.model.state_dict(), kwargs["folder"] / f"rank{distributed.rank()}.pt")
        return original(run)

    loop.finish = finish
    run_recipe(**kwargs)


def train_two(folder, recipe, world, **changes) -> None:
    case, log = CASES[recipe], folder / "stderr.txt"
    codes = in_processes(
        2, save_each_rank, log=log, case=case, folder=folder, argv=case.argv(world, **changes)
    )
    assert codes == [0, 0], log.read_text()[-3000:]
    ranks = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert_same_weights(*ranks)


@pytest.mark.parametrize("recipe", (*RL_RECIPES, "agent"))
def test_两个进程十步之后权重相同(tmp_path, base, world, recipe):
    """强化学习在采样时各走各的：忘了经过 DDP 的前向，权重第一步就分道扬镳。"""
    train_two(start(base, tmp_path / "two"), recipe, world, max_steps=10, save_interval=0, eval_interval=0)


@pytest.mark.slow
@pytest.mark.parametrize("use_moe", [0, 1])
@pytest.mark.parametrize("recipe", RECIPES)
def test_两个进程_每个配方(tmp_path, base, world, recipe, use_moe):
    train_two(start(base, tmp_path / "two"), recipe, world, use_moe=use_moe, max_steps=10)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_两个进程被杀后续训逐位相同(tmp_path, base, world, recipe):
    whole, killed = start(base, tmp_path / "whole"), start(base, tmp_path / "killed")
    train(whole, recipe, world, processes=2)
    train(killed, recipe, world, processes=2, kill_at=3)
    train(killed, recipe, world, processes=2, from_resume=1)
    assert_same_run(killed, whole, recipe)


PRECISIONS = [("bfloat16", 0), ("float16", 0), ("float32", 1), ("bfloat16", 1), ("float16", 1)]


def test_没有一次正常更新的记录区间_体征不出错():
    """float16 头几步溢出时，一个记录区间里可能一次更新也没有，日志里就没有各项指标。"""
    assert preference_health({"step": 60, "loss": float("nan")}) == []
    assert distillation_health({"step": 60, "loss": float("nan")}) == []
    assert RLHealth(8)({"step": 60, "loss": float("nan"), "reward": 0.5}) == []


def assert_trains(folder, recipe, world, dtype, use_moe) -> None:
    small = {"max_steps": 2, "batch_size": 1, "accumulation_steps": 1, "log_interval": 1, "save_interval": 0}
    train(folder, recipe, world, dtype=dtype, use_moe=use_moe, **small)
    case, suffix = CASES[recipe], "_moe" * use_moe
    lines = [line for line in log_lines(folder, case, suffix) if "lr" in line]
    assert [line["step"] for line in lines] == [1, 2]
    # float16 的缩放从 65536 起步，头几步溢出而跳过是正常的；除此之外损失都是有限的数
    assert all(line["loss"] is not None or (dtype == "float16" and "skipped_steps" in line) for line in lines)
    assert all(v.isfinite().all() for v in saved(folder, case, suffix)["model"].values())


@pytest.mark.parametrize("recipe", RECIPES)
def test_半精度混合专家走得通(tmp_path, base, world, recipe):
    """最容易出事的一种组合：float16 要缩放梯度，混合专家的路由在 fp32。"""
    assert_trains(start(base, tmp_path / "run"), recipe, world, "float16", 1)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "use_moe"), PRECISIONS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_各种精度都走得通(tmp_path, base, world, recipe, dtype, use_moe):
    assert_trains(start(base, tmp_path / "run"), recipe, world, dtype, use_moe)
