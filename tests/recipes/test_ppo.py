"""PPO：奖励上升；权重文件只有策略；因 KL 停下的那一步不走；价值网络的学习率自成一套。"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from recipe_cases import CASES, saved, weights_file
from rl_cases import learns, train_here, write_reward

from minimind.model import MiniMindConfig, MiniMindForCausalLM
from minimind.recipes import ppo
from minimind.recipes.ppo import PPOArguments, estimate
from minimind.rl.actor_critic import ActorCritic
from minimind.rl.experience import Experience, minibatches
from minimind.rl.rollout import LocalRollout, response_batch
from minimind.tokenizer import load_tokenizer
from minimind.trainer import loop

FAST = {"num_generations": 1, "log_interval": 1, "save_interval": 0, "eval_interval": 0}


def test_奖励上升_权重只有策略(home, world):
    lines = learns("ppo", home, world, num_generations=1, accumulation_steps=4, kl_coef=0, max_steps=10)
    assert all("explained_variance" in line and "kl" not in line for line in lines)
    weights = torch.load(weights_file(home, CASES["ppo"]), weights_only=True)
    start = torch.load(home / "out" / "full_sft_64.pth", weights_only=True)
    assert weights.keys() == start.keys()
    model = saved(home, CASES["ppo"])["model"]
    assert {key.split(".")[0] for key in model} == {"actor", "critic"}
    assert torch.equal(model["actor.model.norm.weight"].half(), weights["model.norm.weight"])
    assert model["critic.value_weight"].abs().max() > 0


def count_updates(monkeypatch) -> list[int]:
    steps = []
    original = loop.update_weights
    monkeypatch.setattr(
        loop, "update_weights", lambda run, *rest: steps.append(run.state.step) or original(run, *rest)
    )
    return steps


def test_每批采样走几轮几小批(home, world, monkeypatch):
    steps = count_updates(monkeypatch)
    lines = train_here("ppo", home, world, max_steps=2, ppo_epochs=3, minibatches=2, target_kl=0, **FAST)
    assert steps == [0] * 6 + [1] * 6
    assert [line["updates"] for line in lines] == [6, 6]
    assert all(line["early_stop"] == 0 for line in lines)


def test_KL_超了连那一步也不走(home, world, monkeypatch):
    """门槛小到一次更新就超：每批采样恰好更新一次，而不是走了第二步再停。"""
    steps = count_updates(monkeypatch)
    options = {**FAST, "learning_rate": 1e-2, "reward": write_reward(home), "temperature": 0.1}
    lines = train_here(
        "ppo", home, world, max_steps=3, ppo_epochs=4, minibatches=1, target_kl=1e-9, **options
    )
    assert steps == [0, 1, 2]
    assert [line["early_stop"] for line in lines] == [1, 1, 1]


def test_价值网络的学习率自成一套(home, world):
    options = {**FAST, "optimizer": "adamw", "learning_rate": 1e-4, "max_steps": 1}
    train_here("ppo", home, world, critic_learning_rate=1e-2, **options)
    groups = saved(home, CASES["ppo"])["optimizer"]["param_groups"]
    assert sorted({round(group["lr_scale"], 6) for group in groups}) == [1.0, 100.0]


def test_kl_coef_为零时没有参考模型(home, world, monkeypatch):
    monkeypatch.setattr(ppo, "frozen_copy", lambda model: pytest.fail("不该有参考模型"))
    lines = train_here("ppo", home, world, max_steps=1, kl_coef=0, **FAST)
    assert "kl" not in lines[0]


def test_小批_不重不漏_份数固定():
    parts = minibatches(7, 3, seed=0)
    assert sorted(i for part in parts for i in part) == list(range(7))
    assert sorted(map(len, parts)) == [2, 2, 3]
    assert minibatches(1, 3, seed=0).count([]) == 2 and minibatches(0, 2, seed=0) == [[], []]
    assert parts == minibatches(7, 3, seed=0) != minibatches(7, 3, seed=1)


@pytest.fixture(scope="module")
def actor():
    torch.manual_seed(0)
    return MiniMindForCausalLM(
        MiniMindConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
    )


def test_估计_与逐条手算一致(actor):
    """价值取自写出词元之前的位置；优势白化，回报用白化之前的优势。"""
    model = ActorCritic(actor)
    with torch.no_grad():
        model.critic.value_weight.normal_(generator=torch.Generator().manual_seed(1))
    recorded = {}
    run = SimpleNamespace(
        model=model, device=torch.device("cpu"), dtype=torch.float32,
        record=lambda **metrics: recorded.update(metrics),
    )  # fmt: skip
    rollout = LocalRollout(actor, load_tokenizer(), max_new_tokens=5).generate(
        [[1, 40], [1, 50, 60]], 2, seed=3
    )
    experience = Experience(rollout, [0, 0, 1, 1], torch.tensor([1.0, 0.0, 0.5, 1.0]), pad_id=0)
    estimate(run, experience, None, PPOArguments(gamma=0.9, lam=0.8, kl_coef=0))
    advantages, returns, values = [], [], []
    for prompt, response, score in zip(rollout.prompts, rollout.responses, experience.scores.tolist()):
        with torch.no_grad():
            hidden, _ = model.critic.model(torch.tensor([prompt + response]))
            v = (hidden[0] @ model.critic.value_weight).tolist()[len(prompt) - 1 : -1]
        a, out = 0.0, []
        for t in range(len(response) - 1, -1, -1):
            after = v[t + 1] if t + 1 < len(response) else 0.0
            a = (score if t + 1 == len(response) else 0.0) + 0.9 * after - v[t] + 0.72 * a
            out.append(a)
        advantages += out[::-1]
        values += v
        returns += [x + y for x, y in zip(out[::-1], v)]
    got, a = experience.per_token, torch.tensor(advantages)
    torch.testing.assert_close(got["old_values"], torch.tensor(values), atol=1e-4, rtol=0)
    torch.testing.assert_close(got["returns"], torch.tensor(returns), atol=1e-4, rtol=0)
    torch.testing.assert_close(got["advantages"], (a - a.mean()) / a.std(), atol=1e-4, rtol=0)
    assert set(recorded) == {"explained_variance"}


def test_价值网络开始时处处报零_两个主干互不相干(actor):
    model = ActorCritic(actor)
    rollout = LocalRollout(actor, load_tokenizer(), max_new_tokens=4).generate([[1, 40]], 2, seed=0)
    policy, values, _ = model(response_batch(rollout, [0, 1], 0))
    assert values.shape == policy.targets.shape and values.abs().max() == 0
    values.sum().backward()
    assert all(p.grad is None for p in model.actor.parameters())
    assert model.critic.value_weight.grad.abs().max() > 0
    assert model.config is actor.config
