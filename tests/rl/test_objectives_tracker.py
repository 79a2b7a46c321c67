"""SPO 的记分牌：逐步与手算的数对照。"""

from __future__ import annotations

import pytest
import torch

from minimind.rl.tracker import PromptTracker


def see(tracker, prompt, reward, divergence=0.0):
    tracker.update(prompt, reward, divergence, torch.tensor([5, 2]), torch.tensor([-1.0, -2.0]))


def test_没有先验时从一半开始():
    assert PromptTracker(3).values([0, 2]).tolist() == [0.5, 0.5]


def test_先验_八次观察的分量():
    tracker = PromptTracker(2)
    tracker.start(1, [1.0, 0.0, 1.0])
    assert (tracker.alpha[1] + tracker.beta[1]).item() == 8
    assert tracker.values([1]).item() == pytest.approx((2 + 0.5) / 4)
    assert tracker.values([0]).item() == 0.5


def test_更新_手算():
    """头一次 D = 0，ρ 取上限 0.96；再一次 D = 0.06，2⁻¹ 低于下限，取 0.875。"""
    tracker = PromptTracker(1)
    see(tracker, 0, 1.0)
    assert tracker.values([0]).item() == pytest.approx((0.96 * 0.5 + 1) / (0.96 + 1))
    see(tracker, 0, 0.25, divergence=0.06)
    alpha, beta = 0.875 * (0.48 + 1) + 0.25, 0.875 * 0.48 + 0.75
    assert tracker.alpha[0].item() == pytest.approx(alpha) and tracker.beta[0].item() == pytest.approx(beta)


def test_保留率随策略走远而降_有上下限():
    tracker = PromptTracker(1)
    assert tracker.rho(0.0) == 0.96 and tracker.rho(1.0) == 0.875
    assert tracker.rho(0.006) == pytest.approx(2**-0.1)
    assert tracker.rho(0.006) > tracker.rho(0.009)


def test_策略走得远_旧账忘得快():
    far, near = PromptTracker(1), PromptTracker(1)
    for tracker in (far, near):
        tracker.start(0, [0.0] * 8)
        for _ in range(10):
            see(tracker, 0, 1.0, divergence=1.0 if tracker is far else 0.0)
    assert far.values([0]) > near.values([0]) > 0.5


def test_反复观察收敛到成功率():
    tracker = PromptTracker(1)
    generator = torch.Generator().manual_seed(0)
    seen = []
    for _ in range(500):
        see(tracker, 0, float(torch.rand((), generator=generator) < 0.3))
        seen.append(tracker.values([0]).item())
    assert sum(seen[100:]) / 400 == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize("reward", [-0.1, 1.5, float("nan")])
def test_得分出界报错(reward):
    with pytest.raises(ValueError, match="0 到 1"):
        see(PromptTracker(1), 0, reward)


def test_抽提示_拿不准的多_种子相同则相同():
    tracker = PromptTracker(200)
    for prompt in range(100):  # 前一半次次都对
        tracker.start(prompt, [1.0] * 200)
    weights = tracker.sampling_weights()
    assert weights[150].item() == pytest.approx(0.55)
    assert weights[0].item() < 0.12
    drawn = tracker.draw(40, seed=1)
    assert len(set(drawn)) == 40
    assert sum(prompt >= 100 for prompt in drawn) > 28
    assert drawn == tracker.draw(40, seed=1) != tracker.draw(40, seed=2)


def test_提示不够时一轮轮地抽():
    assert sorted(PromptTracker(3).draw(6, seed=0)) == [0, 0, 1, 1, 2, 2]


def test_存取之后一模一样(tmp_path):
    tracker = PromptTracker(4)
    see(tracker, 2, 1.0)
    see(tracker, 0, 0.5, 0.03)
    torch.save(tracker.state_dict(), tmp_path / "t.pt")
    other = PromptTracker(4)
    other.load_state_dict(torch.load(tmp_path / "t.pt", weights_only=True))
    assert torch.equal(other.alpha, tracker.alpha) and torch.equal(other.beta, tracker.beta)
    assert other.previous.keys() == tracker.previous.keys()
    assert other.previous[2][0].tolist() == [5, 2]
    assert torch.equal(other.previous[0][1], tracker.previous[0][1])
    empty = PromptTracker(4)
    empty.load_state_dict(PromptTracker(4).state_dict())
    assert empty.previous == {}
    with pytest.raises(ValueError, match="4 个提示"):
        PromptTracker(5).load_state_dict(tracker.state_dict())
