"""健康提示：每种毛病说一句对得上的话，健康时一句不说。"""

from __future__ import annotations

import pytest

from minimind.recipes.health import RLHealth

HEALTHY = {
    "reward": 0.4, "reward_std": 0.3, "zero_spread": 0.3, "kl": 0.02, "approx_kl": 0.01, "truncated": 0.02,
    "kept": 1.0, "entropy": 0.5, "clip_share": 0.02, "explained_variance": 0.3,
}  # fmt: skip


def test_健康时不说话():
    health = RLHealth(64)
    assert health(HEALTHY) == [] and health({}) == []


@pytest.mark.parametrize(
    "change, words",
    [
        ({"zero_spread": 0.95}, ["95%", "全组同分", "--num_generations"]),
        ({"reward_std": 0.0}, ["得分相同", "--reward"]),
        ({"kl": 2.5}, ["KL 已到 2.50", "--beta"]),
        ({"approx_kl": 0.9}, ["0.90", "--ppo_epochs"]),
        ({"truncated": 0.8}, ["80%", "写满 64 个词元", "--max_gen_len"]),
        ({"kept": 0.0}, ["全被遮掉", "--mask_truncated"]),
        ({"clip_share": 0.6}, ["60%", "截断"]),
        ({"explained_variance": -2.0}, ["-2.00", "--critic_learning_rate"]),
        ({"tracker_explained": -1.5, "tracker_bias": 0.6}, ["-1.50", "+0.60", "--offline_samples"]),
        ({"entropy": 0.005}, ["0.005", "--temperature"]),
    ],
)
def test_每种毛病一句话(change, words):
    sentences = RLHealth(64)({**HEALTHY, **change})
    assert len(sentences) == 1
    assert all(word in sentences[0] for word in words)


def test_熵与开头相比():
    health = RLHealth(64)
    assert health({"entropy": 2.0}) == []
    assert health({"entropy": 0.3}) == []
    assert "开始时 2.000" in health({"entropy": 0.15})[0]


def test_几种毛病一起说():
    assert len(RLHealth(64)({"zero_spread": 1.0, "truncated": 1.0, "kl": 9.0})) == 3
