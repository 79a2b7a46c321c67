"""分块交叉熵与整块计算一致；目标、权重、空目标的约定；初始损失。"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.model import MiniMindConfig, MiniMindForCausalLM, linear_cross_entropy, preset
from minimind.model.kernels import chunk_loss
from minimind.trainer.compiling import fusible_chunk_loss


def make(**extra) -> MiniMindForCausalLM:
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=97
    )
    return MiniMindForCausalLM(MiniMindConfig(**(sizes | extra))).train()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(2, 50), st.sampled_from([1, 3, 16, None]), st.booleans())
def test_分块交叉熵的值与梯度等于整块(n, vocab, chunk, masked):
    generator = torch.Generator().manual_seed(n * 100 + vocab)
    hidden = torch.randn(n, 8, generator=generator, requires_grad=True)
    weight = torch.randn(vocab, 8, generator=generator, requires_grad=True)
    target = torch.randint(0, vocab, (n,), generator=generator)
    loss_weight = torch.rand(n, generator=generator) * 3
    if masked:
        target[::2], loss_weight[::2] = -100, 0.0
    ours = linear_cross_entropy(hidden, weight, target, loss_weight, chunk)
    each = F.cross_entropy(hidden @ weight.t(), target, reduction="none", ignore_index=-100)
    reference = (each * loss_weight).sum()
    torch.testing.assert_close(ours, reference, rtol=1e-6, atol=1e-6 * n)
    ours_grad = torch.autograd.grad(ours * 0.37, (hidden, weight))
    for a, b in zip(ours_grad, torch.autograd.grad(reference * 0.37, (hidden, weight))):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_极端的_logits_不溢出():
    hidden, weight = torch.full((2, 4), 50.0), torch.tensor([[50.0] * 4, [-50.0] * 4])
    loss = linear_cross_entropy(hidden, weight, torch.tensor([0, 1]), torch.ones(2))
    assert loss == 20000.0


@pytest.mark.parametrize("weighted", [True, False])
def test_不返回_logits_时损失与梯度不变(weighted):
    model = make()
    ids = torch.randint(0, 97, (3, 150))
    labels, weights = ids.clone(), torch.rand(3, 150) * 10 if weighted else None
    labels[0, :140] = -100
    results = []
    for flag in (True, False):
        model.zero_grad()
        out = model(ids, labels=labels, loss_weights=weights, return_logits=flag)
        assert (out.logits is not None) == flag
        out.loss.backward()
        results.append([out.loss_sum, out.target_count] + [p.grad for p in model.parameters()])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_目标右移一位_权重跟着目标走_计数是权重和():
    model, ids = make(), torch.randint(0, 97, (2, 9))
    labels = ids.clone()
    labels[:, :3], labels[1] = -100, -100
    weights = torch.arange(18.0).view(2, 9)
    out = model(ids, labels=labels, loss_weights=weights, return_logits=True)
    logp = out.logits.log_softmax(-1)
    by_hand = -sum(weights[0, t] * logp[0, t - 1, ids[0, t]] for t in range(3, 9))
    assert out.target_count == weights[0, 3:].sum()
    torch.testing.assert_close(out.loss_sum, by_hand)
    torch.testing.assert_close(out.loss, by_hand / weights[0, 3:].sum())


def test_没有任何目标时损失为零而不是_NaN_且梯度齐全():
    model, ids = make(use_moe=True), torch.randint(0, 97, (2, 9))
    out = model(ids, labels=torch.full_like(ids, -100))
    assert out.loss == 0 and out.target_count == 0
    (out.loss_sum + 0 * out.aux_loss).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() == 0, name


@pytest.mark.parametrize("arch", ["v2", "v3"])
def test_初始损失接近词表对数(arch):
    torch.manual_seed(0)
    model = MiniMindForCausalLM(preset("tiny", arch=arch)).train()
    ids = torch.randint(0, 6400, (2, 200))
    assert abs(model(ids, labels=ids).loss.item() - math.log(6400)) < 0.15


def test_初始化的标准差可配置():
    model = make(initializer_range=0.005, vocab_size=3000)
    assert abs(model.model.embed_tokens.weight.std().item() - 0.005) < 2e-4
    assert abs(model.model.layers[0].mlp.up_proj.weight.std().item() - 0.005) < 2e-4
    assert (model.model.norm.weight == 1).all()


@pytest.mark.parametrize("use_moe", [True, False])
def test_bf16_自动混合精度接近_fp32_且梯度是_fp32(use_moe):
    model, ids = make(use_moe=use_moe), torch.randint(0, 97, (2, 150))
    exact = model(ids, labels=ids)
    exact.loss.backward()
    grad = model.model.layers[0].mlp.parameters().__next__().grad.clone()
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(ids, labels=ids)
    assert mixed.loss.dtype == torch.float32
    torch.testing.assert_close(mixed.loss, exact.loss, rtol=0, atol=0.02)
    mixed.loss.backward()
    for name, p in model.named_parameters():
        assert p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all(), name
    other = model.model.layers[0].mlp.parameters().__next__().grad
    assert F.cosine_similarity(grad.flatten(), other.flatten(), dim=0) > 0.98


def test_训练时不产生整块_logits():
    """8192 × 6400 的 fp32 logits 要 210 MB；分块后任何一个张量都远小于它。"""
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                seen.append(out.numel())
            return out

    torch.manual_seed(0)
    model = make(vocab_size=6400, hidden_size=32, num_hidden_layers=1, intermediate_size=64)
    ids = torch.randint(0, 6400, (8, 512))
    with Watch():
        model(ids, labels=ids).loss.backward()
    assert max(seen) <= 512 * 6400 < ids.numel() * 6400


@torch.no_grad()
def test_不求梯度时不算梯度(monkeypatch):
    """验证集评估只要损失；若仍算梯度，输出头要多花两倍时间。"""
    hidden, weight = torch.randn(9, 4), torch.nn.Parameter(torch.randn(5, 4))
    made = []
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: made.append("梯度"))
    linear_cross_entropy(hidden, weight, torch.zeros(9, dtype=torch.long), torch.ones(9))
    assert not made


def test_推理时默认给出_logits_且可以只要最后几个():
    model, ids = make().eval(), torch.randint(0, 97, (2, 9))
    full = model(ids, labels=ids)
    assert full.logits.shape == (2, 9, 97) and full.loss > 0
    torch.testing.assert_close(model(ids, logits_to_keep=1).logits, full.logits[:, -1:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([2, 5])).logits, full.logits[:, [2, 5]])
    assert model(ids, return_logits=False).logits is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("write", [chunk_loss, fusible_chunk_loss])
def test_一块的损失与梯度_两种写法都与自动微分相同(write, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (8 * torch.randn(7, 50, generator=generator)).to(dtype)
    logits[2, 5] = 300.0  # 概率下溢成 0 的目标也有损失
    target = torch.tensor([3, 49, 4, 0, 0, 12, 13])
    weight = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0, 1.0, 0.25])
    leaf = logits.float().requires_grad_()
    want = (torch.nn.functional.cross_entropy(leaf, target, reduction="none") * weight).sum()
    want.backward()
    loss, grad = write(logits.clone(), target[:, None], weight[:, None], True)
    assert grad.dtype == dtype and grad[3].abs().sum() == 0
    torch.testing.assert_close(loss, want.detach(), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(
        grad.float(),
        leaf.grad,
        **({"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-3}),
    )
    assert write(logits.clone(), target[:, None], weight[:, None], False)[1] is None


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_编译成一个内核的一块_与逐算子的相同(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(33, 500, generator=generator).to(dtype)
    target, weight = (
        torch.randint(0, 500, (33, 1), generator=generator),
        torch.rand(33, 1, generator=generator),
    )
    loss, grad = torch.compile(fusible_chunk_loss, fullgraph=True)(logits, target, weight, True)
    want, want_grad = chunk_loss(logits, target, weight, True)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, want_grad)
