"""强化学习的速度基准：两边写的词元数相同，强制的长度真的起作用。"""

import importlib
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("bench_rl")
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_采样两边写的一样多(bench):
    args = bench.RLBenchArguments(
        prompts=2, num_generations=2, prompt_length=6, max_new_tokens=8, repeats=1, grpo_steps=0
    )
    result = bench.measure_rollout(args, "tiny", torch.device("cpu"))
    assert result["equal"]["tokens"] == 32
    assert result["varying"]["tokens"] == sum(bench.forced_lengths(args))
    for kind in ("equal", "varying"):
        rates = {name: result[kind][name]["tokens_per_second"] for name in ("ours", "generate")}
        assert result[kind]["ratio"] == pytest.approx(rates["ours"] / rates["generate"])


def test_强制的长度在四分之一到全长之间(bench):
    args = bench.RLBenchArguments(prompts=8, num_generations=8, max_new_tokens=64)
    lengths = bench.forced_lengths(args)
    assert len(lengths) == 64 and min(lengths) >= 16 and max(lengths) <= 64
