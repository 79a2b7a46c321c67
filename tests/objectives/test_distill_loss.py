"""蒸馏损失：对手算的值，对 TRL 的广义 JSD，对不分块的算法（值与梯度）。"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from minimind.objectives.distillation import DIVERGENCES, chunked_loss, distillation_loss, divergence


def logits_of(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities]).log()


def test_手算的值():
    """p = (1/2, 1/2)，q = (1/4, 3/4)，m = (3/8, 5/8)。"""
    teacher, student = logits_of(0.5, 0.5), logits_of(0.25, 0.75)
    forward = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    reverse = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert float(divergence(student, teacher, "forward")) == pytest.approx(forward, abs=1e-6)
    assert float(divergence(student, teacher, "reverse")) == pytest.approx(reverse, abs=1e-6)
    jsd = 0.5 * (0.5 * math.log(4 / 3) + 0.5 * math.log(0.8)) + 0.5 * (
        0.25 * math.log(2 / 3) + 0.75 * math.log(1.2)
    )
    assert float(divergence(student, teacher, "jsd")) == pytest.approx(jsd, abs=1e-6)


def test_交叉熵与散度按份量相加_散度乘温度平方():
    student, teacher = torch.randn(4, 9), torch.randn(4, 9)
    targets = torch.tensor([0, 3, 8, 1])
    loss, parts = distillation_loss(student, teacher, targets, alpha=0.3, temperature=2.0)
    ce = F.cross_entropy(student, targets, reduction="sum")
    kl = F.kl_div(
        F.log_softmax(student / 2, -1), F.log_softmax(teacher / 2, -1), reduction="sum", log_target=True
    )
    assert float(loss) == pytest.approx(float(0.3 * ce + 0.7 * 4 * kl), abs=1e-5)
    assert float(parts["ce"]) == pytest.approx(float(ce), abs=1e-5)
    assert float(parts["divergence"]) == pytest.approx(float(kl), abs=1e-5)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_分布相同时散度为零_不同时为正(kind):
    logits = torch.randn(5, 11)
    assert divergence(logits, logits + 3.0, kind).abs().max() < 1e-6
    assert (divergence(logits, torch.randn(5, 11), kind) > 0).all()


def test_温度再高梯度的大小也相近():
    """乘 T² 的用处：高温下软标签的梯度是 1/T² 量级，乘回来才与交叉熵相称。"""
    teacher, targets = torch.randn(8, 20), torch.zeros(8, dtype=torch.long)
    sizes = []
    for temperature in (1.0, 10.0):
        student = torch.zeros(8, 20, requires_grad=True)
        distillation_loss(student, teacher, targets, alpha=0.0, temperature=temperature)[0].backward()
        sizes.append(float(student.grad.norm()))
    assert 0.5 < sizes[1] / sizes[0] < 2.0


@pytest.mark.parametrize("kind, beta", [("forward", 0.0), ("reverse", 1.0), ("jsd", 0.3), ("jsd", 0.5)])
def test_与TRL的广义JSD一致(kind, beta):
    pytest.importorskip("trl")
    gkd = pytest.importorskip("trl.experimental.gkd")
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 31, requires_grad=True), torch.randn(6, 31)
    ours = divergence(student / 1.7, teacher / 1.7, kind, jsd_beta=beta or 0.5).sum()
    (ours_grad,) = torch.autograd.grad(ours, student)
    theirs = gkd.GKDTrainer.generalized_jsd_loss(
        student[None], teacher[None], beta=beta, temperature=1.7, reduction="sum"
    )
    (theirs_grad,) = torch.autograd.grad(theirs, student)
    assert float(ours) == pytest.approx(float(theirs), abs=1e-5)
    torch.testing.assert_close(ours_grad, theirs_grad, atol=1e-5, rtol=0)


def heads(n: int, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)

    def make(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    targets = torch.randint(0, 29, (n,), generator=generator)
    return make(n, 8).requires_grad_(), make(29, 8).requires_grad_(), make(n, 12), make(29, 12), targets


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_分块与整块的值和梯度相同(kind, chunk):
    def loss_of(student, teacher, targets):
        return distillation_loss(student, teacher, targets, alpha=0.4, temperature=1.5, kind=kind)

    hidden, weight, teacher_hidden, teacher_weight, targets = heads(10)
    whole, whole_parts = loss_of(hidden @ weight.t(), teacher_hidden @ teacher_weight.t(), targets)
    expected = torch.autograd.grad(whole * 0.7, (hidden, weight))
    loss, parts = chunked_loss(hidden, weight, teacher_hidden, teacher_weight, targets, loss_of, chunk=chunk)
    got = torch.autograd.grad(loss * 0.7, (hidden, weight))
    torch.testing.assert_close(loss, whole, atol=1e-4, rtol=1e-6)
    for name, value in whole_parts.items():
        torch.testing.assert_close(parts[name], value, atol=1e-4, rtol=1e-6)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_没有目标时损失为零_梯度也为零():
    hidden, weight, teacher_hidden, teacher_weight, targets = heads(0)
    loss, parts = chunked_loss(hidden, weight, teacher_hidden, teacher_weight, targets, None)
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert float(loss) == 0 and all(float(v) == 0 for v in parts.values())
    assert all(float(g.abs().sum()) == 0 for g in grads)


def test_不求梯度时只算值():
    hidden, weight, *rest = heads(6)
    with torch.no_grad():
        loss, _ = chunked_loss(hidden, weight, *rest, lambda s, t, y: distillation_loss(s, t, y))
    assert not loss.requires_grad and float(loss) > 0


def test_取值不对():
    with pytest.raises(ValueError, match="forward"):
        divergence(torch.zeros(1, 2), torch.zeros(1, 2), "backward")
    with pytest.raises(ValueError, match="jsd_beta"):
        divergence(torch.zeros(1, 2), torch.zeros(1, 2), "jsd", jsd_beta=1.0)
