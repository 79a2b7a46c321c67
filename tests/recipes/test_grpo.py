"""GRPO：奖励上升；参考模型、遮住、丢组各做各的事。"""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch
from recipe_cases import CASES, saved
from rl_cases import learns, train_here, write_reward

from minimind.errors import UserError
from minimind.recipes import grpo
from minimind.recipes.grpo import GRPOArguments, learnable_rows


def test_奖励上升(home, world, capfd):
    lines = learns("grpo", home, world)
    assert all("zero_spread" in line and "kl" not in line for line in lines)
    # 一次采样更新一次：采样与训练的策略相同，没有截断
    assert all(line["approx_kl"] < 1e-5 and line["clip_share"] == 0 for line in lines)
    assert "训练前：留出的 2 题" in capfd.readouterr().err


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "bnpo", "cispo"])
def test_各种归约都走得通(home, world, loss_type):
    lines = train_here("grpo", home, world, loss_type=loss_type, max_steps=2, log_interval=1)
    assert len(lines) == 2


def test_beta_不为零才有参考模型(home, world, monkeypatch):
    copies = []
    original = grpo.frozen_copy
    monkeypatch.setattr(grpo, "frozen_copy", lambda model: copies.append(1) or original(model))
    options = {
        "log_interval": 1,
        "save_interval": 0,
        "eval_interval": 0,
        "learning_rate": 1e-2,
        "temperature": 0.1,
    }
    lines = train_here("grpo", home, world, reward=write_reward(home), beta=0.05, max_steps=3, **options)
    assert copies == [1]
    assert lines[0]["kl"] < 1e-5 < 1e-3 < lines[-1]["kl"]  # 开始时与参考模型相同，之后走开
    train_here("grpo", home, world, max_steps=1, log_interval=1)
    assert copies == [1]


def fake_experience(scores, truncated):
    return SimpleNamespace(scores=torch.tensor(scores), rollout=SimpleNamespace(truncated=truncated))


def test_哪些回答参与更新():
    """两组各两条：第一组同分；第二组有一条没写完。"""
    experience = fake_experience([1.0, 1.0, 0.0, 1.0], [False, True, False, True])

    def rows(**changes):
        return learnable_rows(experience, GRPOArguments(num_generations=2, **changes))

    assert rows() == [0, 1, 2, 3]
    assert rows(dynamic_sampling=1) == [2, 3]
    assert rows(mask_truncated=1) == [0, 2]
    assert rows(dynamic_sampling=1, mask_truncated=1) == [2]


def test_全被遮掉时权重不动并说出来(home, world, capfd):
    """奖励恒为零，每组都同分：丢掉之后一个样本也不剩。"""
    path = home / "zero.py"
    path.write_text("def zero(prompt, response, reference):\n    return 0.0\n", "utf-8")
    options = {"reward": f"{path}:zero", "dynamic_sampling": 1, "max_steps": 3, "log_interval": 1}
    lines = train_here("grpo", home, world, **options, save_interval=0)
    assert all(line["kept"] == 0 and line["zero_spread"] == 1 for line in lines)
    error = capfd.readouterr().err
    assert "全被遮掉" in error and "全组同分" in error
    before = torch.load(home / "out" / "full_sft_64.pth", weights_only=True)
    after = saved(home, CASES["grpo"])["model"]
    assert all(torch.equal(after[key].half(), before[key]) for key in before)


def test_一组只有一条_报错():
    with pytest.raises(UserError, match=r"num_generations.*至少为 2"):
        GRPOArguments(num_generations=1)


def test_温度为零_报错():
    with pytest.raises(UserError, match="temperature"):
        GRPOArguments(temperature=0)


def test_思考时从推理权重开始():
    assert GRPOArguments().from_weight == "full_sft"
    assert GRPOArguments(reasoning=1).from_weight == "reason"
    assert GRPOArguments(reasoning=1, from_weight="full_sft").from_weight == "full_sft"


def test_思考_提示里写好开头_打分时补回去(home, world, monkeypatch):
    """提示以 ``<think>`` 收尾，奖励看到的回答以它开头。"""
    import minimind.rl.experience as module

    seen = []
    original = module.make_samples

    def record(batch, texts, group, truncated):
        seen.extend(texts)
        return original(batch, texts, group, truncated)

    monkeypatch.setattr(module, "make_samples", record)
    shutil.copy(home / "out" / "full_sft_64.pth", home / "out" / "reason_64.pth")
    shutil.copy(home / "out" / "full_sft_64.json", home / "out" / "reason_64.json")
    lines = train_here("grpo", home, world, reasoning=1, reward=None, max_steps=1, log_interval=1)
    assert seen and all(text.startswith("<think>\n") for text in seen)
    assert {"reward_auto", "reward_format"} <= set(lines[0])


def test_全部回答都被遮住_不打印nan(home, world, capsys):
    """写到上限都没写完又不参与更新：这一段没有目标，损失无从谈起。"""
    lines = train_here(
        "grpo", home, world, max_steps=2, log_interval=1, max_gen_len=1, mask_truncated=1, eval_interval=0
    )
    printed = capsys.readouterr().err
    assert [line["loss"] for line in lines] == [None, None] and lines[0]["kept"] == 0
    assert "loss 无（这一段没有可学的目标）" in printed and " nan" not in printed
