"""经验：采样的对数概率与训练的一致，微批次怎么切都不改变结果，没有样本的进程也有得算。"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from minimind.dataset.collate import to_device
from minimind.model import MiniMindConfig, MiniMindForCausalLM
from minimind.objectives.policy import LOSS_TYPES
from minimind.rl.experience import Experience
from minimind.rl.policy import drift, mean_drift, policy_loss, response_logps
from minimind.rl.rollout import LocalRollout
from minimind.tokenizer import load_tokenizer

RUN = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)


def settings(**changes):
    defaults = {
        "temperature": 0.7, "rows_per_forward": 3, "beta": 0.0, "epsilon": 0.2, "epsilon_high": None,
        "max_gen_len": 12,
    }  # fmt: skip
    return SimpleNamespace(**{**defaults, **changes})


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = MiniMindConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = MiniMindForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(8)  # 初始化的分布近乎均匀，放大才有分别
    return model


@pytest.fixture(scope="module")
def experience(model):
    """三个长短不一的提示各答四次。"""
    sampler = LocalRollout(model, load_tokenizer(), max_new_tokens=12, temperature=0.7)
    rollout = sampler.generate([[1, 50, 60], [1, 70, 80, 90, 100, 110], [1, 40]], 4, seed=5)
    made = Experience(rollout, [30 + g for g in rollout.group], torch.rand(12), pad_id=0)
    made.per_token["advantages"] = made.spread(torch.arange(12.0))
    return made


def test_采样与训练的对数概率一致(model, experience):
    """同一温度下，采样时记下的与训练时算出的差不到 1e-4；换了温度就不是一回事。"""
    again = response_logps(model, experience, RUN, settings())
    assert (again - experience.old_logps).abs().max() < 1e-4
    assert mean_drift(model, experience, RUN, settings()) < 1e-6
    assert mean_drift(model, experience, RUN, settings(temperature=1.0)) > 0.01


def test_微批次里各量与各条对得上(experience):
    window = experience.micro_batches(range(12), 5)
    assert [len(batch["lengths"]) for _, batch in window] == [5, 5, 2]
    seen = []
    for ids, batch in window:
        rows = [int(part[0]) for part in batch["advantages"].split(batch["lengths"])]
        for row, part in zip(rows, batch["old_logps"].split(batch["lengths"])):
            assert torch.equal(part, experience.rollout.logprobs[row])
        assert ids == sorted({experience.prompts[row] for row in rows})
        seen += rows
    assert sorted(seen) == list(range(12))


def test_只挑几条(experience):
    part = experience.select([7, 2])
    assert part.prompts == [31, 30] and part.lengths == [experience.lengths[i] for i in (7, 2)]
    assert torch.equal(part.scores, experience.scores[[7, 2]])
    assert part.rollout.responses[0] == experience.rollout.responses[7]


@pytest.mark.parametrize("loss_type", [name for name in LOSS_TYPES if name != "bnpo"])
def test_损失与梯度不随微批次的切法变(model, experience, loss_type):
    loss_of, count = policy_loss(settings(), loss_type)
    results = []
    for size in (3, 12):
        model.zero_grad()
        total = 0.0
        for _, batch in experience.micro_batches(range(12), size):
            loss, _ = loss_of(model, to_device(batch, RUN.device))
            loss.backward()
            total += count(batch)
        results.append((model.lm_head.weight.grad / total, total))
    (a, n), (b, m) = results
    assert n == m and a.abs().max() > 1e-4
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    model.zero_grad()


def test_没有样本的进程也有得算(model):
    """陪跑的批没有目标，损失与梯度都是零，但每个参数都有梯度：DDP 不会等它。"""
    empty = LocalRollout(model, load_tokenizer(), max_new_tokens=4).generate([], 4, seed=0)
    nothing = Experience(empty, [], torch.zeros(0), pad_id=0)
    nothing.per_token["advantages"] = nothing.spread(torch.zeros(0))
    ((ids, batch),) = nothing.micro_batches([], 4)
    loss_of, count = policy_loss(settings(), "dapo")
    assert ids == [] and count(batch) == 0
    loss, _ = loss_of(model, batch)
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in model.parameters())
    assert response_logps(model, nothing, RUN, settings()).shape == (0,)
    model.zero_grad(set_to_none=True)


def test_漂移_相同则零_不同则正():
    a, b = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
    assert drift(a, a).tolist() == [0, 0]
    assert (drift(a, b) > 0).all()
