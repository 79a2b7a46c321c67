"""目标多的时候也没有整块的 [N, V]：对数概率、熵、DPO、强化学习、蒸馏；值与梯度同整块算。"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minimind.dataset import collate_dpo
from minimind.model import MiniMindConfig, MiniMindLM
from minimind.model.kernels import linear
from minimind.objectives import logprobs
from minimind.objectives.distillation import chunked_loss, distillation_loss
from minimind.objectives.logprobs import chunked_logprobs, entropy_of, selected_logprobs, target_logits
from minimind.objectives.preference import sequence_logprobs
from minimind.recipes.ppo import ppo_loss
from minimind.rl.actor_critic import ActorCritic
from minimind.rl.policy import policy_loss

V, N = 2000, 3000


def make(**extra) -> MiniMindLM:
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=V
    )
    return MiniMindLM(MiniMindConfig(**(sizes | extra)))


class Largest(TorchDispatchMode):
    """每个算子的结果里最大的有多少个元素。"""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


def whole(hidden, weight, targets, temperature):
    logits = linear(hidden, weight)
    return selected_logprobs(logits, targets, temperature), entropy_of(logits, temperature)


@pytest.mark.parametrize("n", [0, 1, 7, 64, 700])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_分块的值与梯度同整块算(n, temperature):
    """块长 7：前四块的 logits 留着，其余反向时重算，两条路都走到。"""
    torch.manual_seed(0)
    hidden, weight = torch.randn(n, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    targets, grad = torch.randint(0, 50, (n,)), torch.randn(n)
    logp, entropy = chunked_logprobs(hidden, weight, targets, temperature, entropy=True, chunk=7)
    expected, spread = whole(hidden, weight, targets, temperature)
    assert logp.shape == entropy.shape == (n,) and not entropy.requires_grad
    torch.testing.assert_close(logp, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy, spread, rtol=1e-6, atol=1e-6)
    ours = torch.autograd.grad(logp, (hidden, weight), grad)
    theirs = torch.autograd.grad(expected, (hidden, weight), grad)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mixed", [False, True])
def test_一块放得下时与整块逐位相同(mixed):
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 32, requires_grad=True), torch.randn(V, 32, requires_grad=True)
    targets, grad, results = torch.randint(0, V, (300,)), torch.randn(300), []
    for compute in (
        lambda: chunked_logprobs(hidden, weight, targets)[0],
        lambda: whole(hidden, weight, targets, 1.0)[0],
    ):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            logp = compute()
        results.append((logp, *torch.autograd.grad(logp, (hidden, weight), grad)))
    assert torch.equal(results[0][0], results[1][0])
    for a, b in zip(*(r[1:] for r in results)):
        assert torch.equal(a, b)


def test_冻结的输出头与冻结的主干各自不求梯度():
    hidden, weight, targets = torch.randn(20, 8), torch.randn(50, 8), torch.randint(0, 50, (20,))
    for h, w in ((True, False), (False, True)):
        hidden.requires_grad_(h), weight.requires_grad_(w)
        hidden.grad = weight.grad = None
        chunked_logprobs(hidden, weight, targets, chunk=3)[0].sum().backward()
        assert (hidden.grad is not None, weight.grad is not None) == (h, w)


# ---------------------------------------------------------------- 没有整块 [N, V]


def pairs():
    torch.manual_seed(1)
    made = []
    for _ in range(5):
        item = {}
        for side in ("chosen", "rejected"):
            ids = torch.randint(3, V, (N // 10 + 2,))
            labels = ids.clone()
            labels[:2] = -100
            item[side], item[f"{side}_labels"] = ids, labels
        made.append(item)
    return collate_dpo(made)


def rl_batch():
    batch = pairs()
    count = int((batch["labels"] != -100).sum())
    assert count == N
    lengths = [N // 10] * 10
    zeros = torch.zeros(count)
    return batch | {
        "old_logps": zeros - 7.6, "advantages": torch.randn(count), "lengths": lengths, "old_values": zeros,
        "returns": torch.randn(count),
    }  # fmt: skip


ARGS = SimpleNamespace(
    temperature=0.8, beta=0.0, epsilon=0.2, epsilon_high=None, max_gen_len=400, clip_epsilon=0.2, value_clip=0.2,
    vf_coef=0.5,
)  # fmt: skip


def dpo():
    model = make().train()
    return sequence_logprobs(model, pairs()).logps.sum()


def grpo():
    return policy_loss(ARGS, "dapo")[0](make().train(), rl_batch())[0]


def ppo():
    return ppo_loss(ActorCritic(make().train()), rl_batch(), ARGS)[0]


def distillation():
    out = target_logits(make().train(), pairs())
    with torch.no_grad():
        teacher = target_logits(make(num_hidden_layers=2), pairs())
    return chunked_loss(
        out.hidden, out.weight, teacher.hidden, teacher.weight, out.targets, distillation_loss
    )[0]


def entropy_only():
    out = target_logits(make().train(), pairs())
    logp, entropy = out.logprobs_and_entropy(0.8)
    return logp.sum() + entropy.sum()


@pytest.mark.parametrize("loss", [dpo, grpo, ppo, distillation, entropy_only])
def test_目标多时前向反向都没有整块的_N乘V(loss, monkeypatch):
    with Largest() as seen:
        loss().backward()
    assert seen.numel <= N * V / 4
    monkeypatch.setattr(logprobs, "CPU_CHUNK", N)  # 这把尺子真的量得到
    with Largest() as seen:
        loss().backward() if loss is not distillation else target_logits(make(), pairs()).logits
    assert seen.numel >= N * V


def test_隔着几层包装也找得到输出头():
    model = make()
    wrapped = torch.nn.Module()
    wrapped.module = torch.nn.Module()
    wrapped.module.module = model
    assert logprobs.output_head(wrapped) is model.lm_head


def test_输出头被换成别的模块是错误():
    model = make()
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(TypeError, match="输出头 lm_head 被换成了 Sequential"):
        target_logits(model, pairs())
