"""采样参数的含义与可复现性。"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.errors import UserError
from minimind.inference.sampling import (
    GREEDY,
    SamplingParams,
    apply_repetition_penalty,
    filter_logits,
    sample_rows,
    uniforms,
)

LOGITS = torch.log(torch.tensor([[0.5, 0.25, 0.15, 0.07, 0.03]]))


def kept(logits: torch.Tensor) -> list[int]:
    return torch.isfinite(logits[0]).nonzero().squeeze(-1).tolist()


def test_温度为零就是贪心():
    logits = torch.randn(16, 50)
    assert torch.equal(sample_rows(logits, [GREEDY] * 16, None)[0], logits.argmax(-1))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"top_k": 2}, [0, 1]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        # 0.5 + 0.25 = 0.75 还差一点，再留一个才跨过 0.8
        ({"top_p": 0.8}, [0, 1, 2]),
        ({"top_p": 0.01}, [0]),
        # 0.5 × 0.2 = 0.1：低于它的丢掉
        ({"min_p": 0.2}, [0, 1, 2]),
        ({"top_k": 4, "top_p": 0.6}, [0, 1]),
    ],
)
def test_截断留下的集合(options, expected):
    assert kept(filter_logits(LOGITS, **options)) == expected


@settings(max_examples=60, deadline=None)
@given(
    top_k=st.integers(0, 30),
    top_p=st.floats(0.001, 1.0),
    min_p=st.floats(0, 0.99),
    scale=st.floats(0, 60),
    seed=st.integers(0, 2**31),
)
def test_任何参数下最大者都留着且概率有效(top_k, top_p, min_p, scale, seed):
    logits = torch.randn(4, 20, generator=torch.Generator().manual_seed(seed)) * scale
    filtered = filter_logits(logits, top_k, top_p, min_p)
    # 并列第一时留下哪一个都行
    assert torch.equal(filtered.amax(-1), logits.amax(-1))
    assert torch.isfinite(torch.softmax(filtered, -1)).all()


def test_与_transformers_的截断一致():
    from transformers.generation.logits_process import (
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = torch.randn(8, 100) * 3
    ids = torch.randint(0, 100, (8, 12))
    seen = torch.zeros(8, 100, dtype=torch.bool).scatter_(1, ids, True)
    for theirs, ours in (
        (TopKLogitsWarper(7)(ids, logits), filter_logits(logits, top_k=7)),
        (TopPLogitsWarper(0.7)(ids, logits), filter_logits(logits, top_p=0.7)),
        (MinPLogitsWarper(0.1)(ids, logits), filter_logits(logits, min_p=0.1)),
        (RepetitionPenaltyLogitsProcessor(1.3)(ids, logits), apply_repetition_penalty(logits, seen, 1.3)),
    ):
        torch.testing.assert_close(ours, theirs)


def test_同一随机数同一结果_不动全局随机数():
    logits, params = torch.randn(64, 200), [SamplingParams(temperature=1.0)] * 64
    draws = torch.from_numpy(uniforms(7, 0, 64))
    before = torch.get_rng_state()
    first, second = (sample_rows(logits, params, draws)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)
    other = sample_rows(logits, params, torch.from_numpy(uniforms(8, 0, 64)))[0]
    assert not torch.equal(first, other)


def test_抽样频率符合温度():
    params = [SamplingParams(temperature=0.5)] * 20000
    draws, _ = sample_rows(LOGITS.expand(20000, 5), params, torch.from_numpy(uniforms(1, 0, 20000)))
    expected = torch.softmax(LOGITS[0] / 0.5, -1)
    torch.testing.assert_close(torch.bincount(draws, minlength=5) / 20000, expected, atol=0.015, rtol=0)


@pytest.mark.parametrize(
    "options",
    [{"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}, {"min_p": 1.0}],
)
def test_越界的参数说出名字与取值(options):
    (name,) = options
    with pytest.raises(UserError, match=name):
        SamplingParams(**options)


@pytest.mark.parametrize("scale", [8.0, 1.0])
def test_topp_只看前几名与整行排序选出同样的词(scale, monkeypatch):
    """尖的分布前几名就够，平的不够而改为整行排序；同一批里两种都有时各走各的。"""
    generator = torch.Generator().manual_seed(0)
    sharp, flat = (torch.randn(3, 2000, generator=generator) * s for s in (scale, 0.1))
    logits = torch.cat((sharp, flat))
    both = filter_logits(logits, top_p=0.9)
    monkeypatch.setattr("minimind.inference.sampling.HEAD", 2000)
    assert torch.equal(both, filter_logits(logits, top_p=0.9))
    assert (both[3:] > float("-inf")).sum(-1).min() > 256
    probs = logits.softmax(-1)
    kept = probs.masked_fill(both == float("-inf"), 0.0)
    smallest = probs.masked_fill(both == float("-inf"), 2.0).amin(-1)
    assert (kept.sum(-1) >= 0.9 - 1e-5).all() and (kept.sum(-1) - smallest < 0.9 + 1e-5).all(), "刚好跨过"


def test_topp_与末一名并列的一起留():
    assert kept(filter_logits(torch.zeros(1, 8), top_p=0.3)) == list(range(8))


def test_分组时不看种子():
    one, other = (SamplingParams(temperature=0.7, seed=seed) for seed in (1, 2))
    assert one != other and one.rule == other.rule and one.rule.seed is None


@pytest.mark.parametrize("temperature", [1e-42, 1e-320, 5e-324, 1e-30, 1e-7])
def test_温度低到会溢出_就是贪心_没有NaN(temperature):
    logits = torch.randn(8, 300, generator=torch.Generator().manual_seed(0)) * 20
    params = SamplingParams(temperature=temperature, top_k=5, top_p=0.9, min_p=0.1, seed=1)
    assert params.greedy
    ids, logp = sample_rows(logits, [params] * 8, torch.rand(8))
    assert torch.equal(ids, logits.argmax(-1)) and torch.isfinite(logp).all()


def test_温度再高一点照样抽_也没有NaN():
    logits = torch.randn(8, 300, generator=torch.Generator().manual_seed(0)) * 1000
    params = SamplingParams(temperature=2e-5)
    ids, logp = sample_rows(logits, [params] * 8, torch.rand(8))
    assert not params.greedy and torch.equal(ids, logits.argmax(-1)) and torch.isfinite(logp).all()


MIXED = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.0, top_k=3, repetition_penalty=1.3),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7, top_k=5),
    SamplingParams(temperature=1.3, top_k=9999),
    SamplingParams(temperature=0.9, top_p=0.5),
    SamplingParams(temperature=0.9, top_p=0.999),  # 前 256 名不够
    SamplingParams(temperature=1.1, min_p=0.1),
    SamplingParams(temperature=0.8, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=1.2),
    SamplingParams(temperature=0.8, top_p=0.9, repetition_penalty=0.8),
]


@pytest.mark.parametrize("vocab", [64, 6400])
def test_各行参数不同_与各自单独算逐位相同(vocab):
    generator = torch.Generator().manual_seed(3)
    params = MIXED * 3
    logits = torch.randn(len(params), vocab, generator=generator) * 2
    uniform = torch.rand(len(params), generator=generator)
    seen = torch.rand(len(params), vocab, generator=generator) < 0.3
    ids, logp = sample_rows(logits, params, uniform, seen)
    for row, one in enumerate(params):
        only = slice(row, row + 1)
        want_ids, want_logp = sample_rows(logits[only], [one], uniform[only], seen[only])
        assert (ids[row], logp[row]) == (want_ids[0], want_logp[0]), one


def test_参数有多少种_算子的个数都一样():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Count.calls += 1
            return func(*args, **(kwargs or {}))

    def calls(kinds):
        params = [SamplingParams(temperature=0.5 + i % kinds / 100, top_k=2 + i % kinds) for i in range(32)]
        Count.calls = 0
        with Count():
            sample_rows(torch.randn(32, 6400), params, torch.rand(32))
        return Count.calls

    assert calls(2) == calls(32) < 100


def test_都贪心而别的参数不同_不要随机数():
    logits = torch.randn(2, 64)
    ids, _ = sample_rows(
        logits, [SamplingParams(temperature=0.0), SamplingParams(temperature=0.0, top_k=3)], None
    )
    assert ids.tolist() == logits.argmax(-1).tolist()
