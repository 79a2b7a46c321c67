"""目标函数：逐个与手算的数对照。"""

from __future__ import annotations

import math

import pytest
import torch

from minimind.objectives import policy as obj


def close(a, b, atol=1e-6):
    torch.testing.assert_close(
        torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64), atol=atol, rtol=0
    )


# ---------------------------------------------------------------- 优势


def test_组内优势_手算():
    """两组各三条：(1, 0, 0) 平均 1/3、标准差 1/√3；(2, 2, 2) 全组同分。"""
    rewards = torch.tensor([1.0, 0, 0, 2, 2, 2])
    std = math.sqrt(1 / 3) + 1e-4
    expected = [2 / 3 / std, -1 / 3 / std, -1 / 3 / std, 0, 0, 0]
    close(obj.group_advantages(rewards, 3), expected)
    assert obj.zero_spread(rewards, 3).tolist() == [False, True]


def test_优势的三种缩放():
    rewards = torch.tensor([1.0, 0, 3, 1])
    close(obj.group_advantages(rewards, 2, "none"), [0.5, -0.5, 1, -1])
    # 整批：平均 1.25，方差 (0.0625·2 + 1.5625 + 3.0625) / 3
    std = math.sqrt(4.75 / 3) + 1e-4
    close(obj.group_advantages(rewards, 2, "batch"), [0.5 / std, -0.5 / std, 1 / std, -1 / std])
    std = math.sqrt(0.5) + 1e-4
    close(obj.group_advantages(rewards, 2)[:2], [0.5 / std, -0.5 / std])


def test_整批标准差按所有进程():
    mine, others = torch.tensor([1.0, 0.0]), torch.tensor([3.0, 1.0])
    totals = obj.moments(mine) + obj.moments(others)
    both = obj.group_advantages(torch.cat([mine, others]), 2, "batch")
    close(obj.group_advantages(mine, 2, "batch", totals), both[:2])


def test_只有一条的组没有优势也没有_NaN():
    close(obj.group_advantages(torch.tensor([1.0, 0.5]), 1), [0, 0])


def test_没有样本的进程():
    assert obj.group_advantages(torch.zeros(0), 4).shape == (0,)
    assert obj.zero_spread(torch.zeros(0), 4).shape == (0,)
    assert obj.gae(torch.zeros(0), torch.zeros(0), [])[0].shape == (0,)
    assert obj.token_rewards(torch.zeros(0), torch.zeros(0), torch.zeros(0), [], 0.1).shape == (0,)


def test_奖励整体加减乘不改变优势():
    torch.manual_seed(0)
    rewards = torch.rand(12)
    close(obj.group_advantages(10 * rewards - 3, 4), obj.group_advantages(rewards, 4), atol=5e-3)


def test_白化去掉平均且不加回去():
    x = torch.tensor([1.0, 2.0, 3.0, 6.0])
    white = obj.whiten(x, obj.moments(x))
    close(white.mean(), 0)
    close(white.std(), 1)
    halves = obj.moments(x[:1]) + obj.moments(x[1:])
    close(obj.whiten(x[:1], halves), white[:1])  # 分在两个进程上结果相同


def test_白化一个数与没有差别的数():
    assert obj.whiten(torch.tensor([5.0]), obj.moments(torch.tensor([5.0]))).tolist() == [0.0]
    same = torch.full((3,), 0.1)
    assert obj.whiten(same, obj.moments(same)).abs().max() < 1e-3


def test_逐词元奖励_得分只在各条最后一个词元():
    logp, ref = torch.tensor([-1.0, -2, -3, -1, -1]), torch.tensor([-1.0, -1, -1, -2, -1])
    got = obj.token_rewards(torch.tensor([1.0, -1.0]), logp, ref, [3, 2], 0.1)
    close(got, [0, 0.1, 0.2 + 1, -0.1, -1])


def test_GAE_手算():
    """γ = 0.9，λ = 0.8；第二条只有一个词元，不能看到第一条。"""
    rewards, values = torch.tensor([0.0, 0, 1, 2]), torch.tensor([0.5, 0.4, 0.3, 0.7])
    a2 = 1 - 0.3
    a1 = 0.9 * 0.3 - 0.4 + 0.72 * a2
    a0 = 0.9 * 0.4 - 0.5 + 0.72 * a1
    advantages, returns = obj.gae(rewards, values, [3, 1], gamma=0.9, lam=0.8)
    close(advantages, [a0, a1, a2, 2 - 0.7])
    close(returns, [a0 + 0.5, a1 + 0.4, 1, 2])


def test_GAE_的两个极端():
    """λ = 1 时回报就是余下奖励之和；λ = 0 时优势就是一步的时差。"""
    torch.manual_seed(0)
    rewards, values, lengths = torch.rand(9), torch.rand(9), [4, 2, 3]
    _, returns = obj.gae(rewards, values, lengths, 1.0, 1.0)
    parts = [part.flip(0).cumsum(0).flip(0) for part in rewards.split(lengths)]
    close(returns, torch.cat(parts))
    advantages, _ = obj.gae(rewards, values, lengths, 1.0, 0.0)
    nexts = torch.cat([torch.cat([part[1:], torch.zeros(1)]) for part in values.split(lengths)])
    close(advantages, rewards + nexts - values)


def test_解释方差():
    returns = torch.tensor([1.0, 2, 3])

    def explained(values, returns):
        return obj.explained_variance(obj.moments(returns - values), obj.moments(returns))

    assert explained(returns, returns) == 1
    assert explained(torch.full((3,), 2.0), returns) == pytest.approx(0)
    assert explained(returns + 5, returns) == pytest.approx(1)  # 差一个常数不算
    assert explained(-returns, returns) == pytest.approx(-3)
    assert explained(returns, torch.ones(3)) == 0


# ---------------------------------------------------------------- 损失


def test_截断_四种情形的值与梯度():
    """比值 2 与 0.5，优势正负各一：该截断的没有梯度。"""
    logp = torch.tensor([2.0, 2.0, 0.5, 0.5]).log().requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss, clipped = obj.clipped_loss(logp, torch.zeros(4), advantages, 0.2, 0.28)
    close(loss.detach(), [-1.28, 2.0, -0.5, 0.8])
    assert clipped.tolist() == [True, False, False, True]
    loss.sum().backward()
    close(logp.grad, [0, 2.0, -0.5, 0])  # d(−ρA)/dlogp = −ρA


def test_比值为一时损失接近零而梯度不是零():
    """一次采样只更新一次时：打印的损失近 0，学习照样发生。"""
    logp = torch.tensor([-1.0, -2.0]).requires_grad_()
    advantages = torch.tensor([1.0, -1.0])
    loss, _ = obj.clipped_loss(logp, logp.detach(), advantages)
    loss.sum().backward()
    close(loss.sum().detach(), 0)
    close(logp.grad, [-1, 1])


def test_CISPO_权重截断而每个词元都有梯度():
    logp = torch.tensor([10.0, 0.5]).log().requires_grad_()
    loss, clipped = obj.cispo_loss(logp, torch.zeros(2), torch.tensor([1.0, -2.0]), 5.0)
    close(loss.detach(), [-5 * math.log(10), 0.5 * 2 * math.log(0.5)])
    assert clipped.tolist() == [True, False]
    loss.sum().backward()
    close(logp.grad, [-5, 1])


def test_k3_不为负_相等时为零_期望等于_KL():
    torch.manual_seed(0)
    p, q = torch.randn(50).log_softmax(0), torch.randn(50).log_softmax(0)
    assert (obj.k3(p, q) >= 0).all() and obj.k3(p, p).abs().max() == 0
    close((p.exp() * obj.k3(p, q)).sum(), (p.exp() * (p - q)).sum())


def test_价值损失_手算():
    values = torch.tensor([1.0, 0.1, 3.0]).requires_grad_()
    loss = obj.value_loss(values, torch.tensor([0.0, 0.0, 3.0]), torch.tensor([2.0, 1.0, 2.5]), 0.2)
    # 第一个被截在 0.2，误差 1.8 比 1 大；第二个没截；第三个没动
    close(loss.detach(), [0.5 * 1.8**2, 0.5 * 0.81, 0.5 * 0.25])
    loss.sum().backward()
    close(values.grad, [0, -0.9, 0.5])


def test_各种归约_手算():
    """两条回答，长 1 与 3，各词元损失 1、2、3、4。"""
    losses = torch.tensor([1.0, 2, 3, 4])
    expected = {"dapo": 10 / 4, "cispo": 10 / 4, "grpo": (1 + 3) / 2, "bnpo": 10 / 4, "dr_grpo": 10 / (2 * 8)}
    for loss_type, value in expected.items():
        weights, count = obj.token_weights([1, 3], loss_type, 8)
        assert float((weights * losses).sum()) / count == pytest.approx(value), loss_type


def test_归约跨微批次():
    """dapo 与 grpo 切成两个微批次结果不变；bnpo 是微批次平均的平均。"""
    losses = {(1,): torch.tensor([1.0]), (3,): torch.tensor([2.0, 3, 4])}

    def total(loss_type):
        parts = [(obj.token_weights(list(n), loss_type, 8), x) for n, x in losses.items()]
        return sum(float((w * x).sum()) for (w, _), x in parts) / sum(count for (_, count), _ in parts)

    assert total("dapo") == pytest.approx(10 / 4)
    assert total("grpo") == pytest.approx(2)
    assert total("bnpo") == pytest.approx((1 + 3) / 2)


def test_没有回答的微批次():
    for loss_type in obj.LOSS_TYPES:
        weights, count = obj.token_weights([], loss_type, 8)
        assert len(weights) == 0 and count == 0


def test_不认识的_loss_type():
    with pytest.raises(ValueError, match="没有 loss_type 'ppo'"):
        obj.token_weights([1], "ppo", 8)


def test_gspo_整条一个比值_手算():
    """两条，长 2 与 1：log ρ = (0.3, −0.1) 与 −0.5，平均 0.1 与 −0.5，A = 2 与 −1。

    s = e^0.1 = 1.105 在 1.28 以内，梯度是 −A·s/|y| 摊给每个词元，第二个词元自己的比值不到 1 也一样；
    s = e^−0.5 = 0.607 低于 0.8 而 A < 0：截断，没有梯度。
    """
    old = torch.zeros(3)
    logp = torch.tensor([0.3, -0.1, -0.5], requires_grad=True)
    advantages, lengths = torch.tensor([2.0, 2.0, -1.0]), [2, 1]
    weights, count = obj.token_weights(lengths, "gspo", 8)
    assert weights.tolist() == [0.5, 0.5, 1.0] and count == 2
    total, sums = obj.grpo_loss(
        logp, old, advantages, weights, loss_type="gspo", epsilon=0.2, epsilon_high=0.28, lengths=lengths
    )
    close(total, -2 * math.exp(0.1) + 0.8)
    total.backward()
    close(logp.grad, [-math.exp(0.1), -math.exp(0.1), 0])
    assert int(sums["clip_share"]) == 1
    # 没有写明时按文中的 3e-4 与 4e-4：1.105 早已超过，两条都截断
    _, sums = obj.grpo_loss(logp, old, advantages, weights, loss_type="gspo", lengths=lengths)
    assert int(sums["clip_share"]) == 3


def test_gspo_不给长度就说():
    with pytest.raises(ValueError, match="lengths"):
        obj.grpo_loss(torch.zeros(1), torch.zeros(1), torch.ones(1), torch.ones(1), loss_type="gspo")


def test_gspo_比值都是一时与grpo同样的梯度():
    torch.manual_seed(1)
    old, advantages, lengths = torch.randn(6), torch.tensor([1.0] * 4 + [-1.0] * 2), [4, 2]
    grads = []
    for loss_type in ("grpo", "gspo"):
        logp = old.clone().requires_grad_()
        weights, _ = obj.token_weights(lengths, loss_type, 8)
        obj.grpo_loss(logp, old, advantages, weights, loss_type=loss_type, lengths=lengths)[0].backward()
        grads.append(logp.grad)
    close(*grads)


# ---------------------------------------------------------------- 与 TRL 对照

SHAPE, LENGTHS = (4, 6), [6, 2, 4, 1]


def trl_loss(loss_type, logp, old, ref, advantages, mask, beta, epsilon_high):
    """直接调用 TRL 的 ``GRPOTrainer._compute_loss``，只把它的前向换成现成的对数概率。"""
    from types import SimpleNamespace
    from unittest.mock import MagicMock

    trainer_module = pytest.importorskip("trl.trainer.grpo_trainer")
    stub = MagicMock()
    stub._get_per_token_logps_and_entropies = lambda *a, **k: (logp, torch.zeros_like(logp.detach()), None)
    settings = {
        "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None,
        "importance_sampling_level": "sequence" if loss_type == "gspo" else "token",
        "beta": beta, "loss_type": "grpo" if loss_type == "gspo" else loss_type,
        "epsilon_low": 0.2, "epsilon_high": epsilon_high, "use_vllm": False,
        "max_completion_length": 8, "current_gradient_accumulation_steps": 1, "aux_loss_enabled": False,
        "_entropy_bonus_enabled": False,
    }  # fmt: skip
    for name, value in settings.items():
        setattr(stub, name, value)
    stub.args = SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1)
    stub.accelerator.num_processes = 1
    stub.accelerator.reduce = lambda x, **_: x
    stub.accelerator.gather = lambda x: x
    inputs = {
        "prompt_ids": torch.zeros(4, 1, dtype=torch.long), "prompt_mask": torch.ones(4, 1),
        "completion_ids": torch.zeros(SHAPE, dtype=torch.long), "completion_mask": mask,
        "advantages": advantages, "old_per_token_logps": old, "ref_per_token_logps": ref,
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    return trainer_module.GRPOTrainer._compute_loss(stub, MagicMock(), inputs)


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("loss_type", obj.LOSS_TYPES)
def test_与_TRL_的值和梯度一致(loss_type, beta):
    torch.manual_seed(3)
    dense = (torch.randn(SHAPE) - 2).requires_grad_()
    old, ref = dense.detach() + 0.4 * torch.randn(SHAPE), dense.detach() + 0.4 * torch.randn(SHAPE)
    mask = (torch.arange(6) < torch.tensor(LENGTHS)[:, None]).float()
    advantages = torch.tensor([1.2, -0.7, 0.4, -1.5])
    high = 5.0 if loss_type == "cispo" else 0.28
    expected = trl_loss(loss_type, dense, old, ref, advantages, mask, beta, high)
    (expected_grad,) = torch.autograd.grad(expected, dense)

    flat = mask.bool()
    logp = dense.detach()[flat].requires_grad_()
    weights, count = obj.token_weights(LENGTHS, loss_type, 8)
    per_token = advantages.repeat_interleave(torch.tensor(LENGTHS))
    total, _ = obj.grpo_loss(
        logp, old[flat], per_token, weights, loss_type=loss_type, beta=beta, ref_logp=ref[flat],
        epsilon=0.2, epsilon_high=high, lengths=LENGTHS,
    )  # fmt: skip
    loss = total / count
    (grad,) = torch.autograd.grad(loss, logp)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(grad, expected_grad[flat], atol=1e-5, rtol=0)
    assert grad.abs().max() > 0.01


def test_优势与_TRL_的标准差一致():
    """TRL 用自己的 ``nanstd``，除以 n − 1。"""
    nanstd = pytest.importorskip("trl.trainer.grpo_trainer").nanstd
    torch.manual_seed(0)
    rewards = torch.rand(12)
    groups = rewards.view(-1, 4)
    expected = (groups - groups.mean(1, keepdim=True)) / (nanstd(groups, dim=1)[:, None] + 1e-4)
    torch.testing.assert_close(obj.group_advantages(rewards, 4), expected.flatten(), atol=1e-6, rtol=0)
