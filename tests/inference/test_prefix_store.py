"""前缀库：找得到最长的相同开头，守住上限，先丢最久没用的，换了权重就作废。"""

import copy
import random

import pytest
import torch
from engine_helpers import drain, hf_model, prompts_of, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.inference.engine import Engine
from minimind.inference.prefix_store import BLOCK, PrefixStore
from minimind.inference.sampling import GREEDY, SamplingParams


def kv_of(ids):
    """每个位置的「K、V」由它与之前的 token 决定，抄错一处就看得出来。"""
    marks = [float(hash(tuple(ids[: i + 1])) % 2**20) for i in range(len(ids))]
    return torch.tensor(marks).view(1, 1, -1, 1)


def put(store, ids):
    store.insert(ids, lambda start, stop: kv_of(ids)[:, :, start:stop].clone())


def test_最长的相同开头_按整块():
    store = PrefixStore(1000)
    base = list(range(5 * BLOCK + 3))
    put(store, base)
    put(store, base[: 2 * BLOCK] + [7] * (2 * BLOCK))
    assert len(store) == 7 * BLOCK, "同一个开头只存一份"
    for ids, want in (
        (base, 5 * BLOCK),
        (base[: 3 * BLOCK + 1], 3 * BLOCK),
        (base[: 2 * BLOCK] + [7] * BLOCK + [1] * BLOCK, 3 * BLOCK),
        ([1, *base], 0),
        (base[: BLOCK - 1], 0),
    ):
        length, kv = store.match(ids)
        assert length == want
        assert kv is None if want == 0 else torch.equal(kv, kv_of(ids)[:, :, :want])


def test_放不下时丢最久没用的_常用的系统提示留着():
    store = PrefixStore(4 * BLOCK + 5)
    system = [1] * BLOCK
    for chat in range(2, 12):
        ids = system + [chat] * (2 * BLOCK)
        assert store.match(ids)[0] == (BLOCK if chat > 2 else 0)
        put(store, ids)
        assert len(store) <= 4 * BLOCK
    assert store.match(system + [11] * (2 * BLOCK))[0] == 3 * BLOCK
    assert store.match(system + [3] * (2 * BLOCK))[0] == BLOCK


def test_比整个库还长的提示_只存得下的开头():
    store = PrefixStore(3 * BLOCK)
    put(store, [9] * BLOCK)
    ids = list(range(10 * BLOCK))
    put(store, ids)
    assert len(store) == 3 * BLOCK and store.match(ids)[0] == 3 * BLOCK


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 8))
def test_随便存取_守住上限_认得出的都对(seed, blocks):
    """两种 token、少量长度，开头大量重合又常常被丢。"""
    rng, store = random.Random(seed), PrefixStore(blocks * BLOCK)
    for _ in range(40):
        path = [rng.randint(0, 1) for _ in range(rng.randint(0, 4))]
        ids = [token for token in path for _ in range(BLOCK)] + [5] * rng.randint(0, BLOCK - 1)
        if rng.random() < 0.5:
            put(store, ids)
        length, kv = store.match(ids)
        assert length <= len(ids) and (kv is None or torch.equal(kv, kv_of(ids)[:, :, :length]))
        assert len(store) <= blocks * BLOCK
        reachable, stack = 0, [store._root]
        while stack:
            node = stack.pop()
            reachable += len(node.children)
            stack += node.children.values()
        assert reachable * BLOCK == len(store), "留下的块都走得到"


def chat(engine, prompt, params=GREEDY, limit=20):
    request = engine.add_request(prompt, params, limit)
    return drain(engine)[request, 0]


def test_第二轮只算新的_数得清楚():
    engine = Engine(tiny(), eos_ids=(), max_slots=2, prefix_cache_tokens=256)
    prompt = prompts_of([30])[0]
    first = chat(engine, prompt)
    assert first.cached == 0 and engine.prompt_tokens == (30, 0)
    second = chat(engine, prompt + first.ids + [5, 6, 7])
    assert second.cached == (30 + 20 - 1) // BLOCK * BLOCK == 48, (
        "提示与回答都在库里，最后一个 token 没算过 KV"
    )
    assert engine.prompt_tokens == (30 + 53 - 48, 48)
    again = chat(engine, prompt[:16])
    assert again.cached == 0, "整条都在库里时也要留一个来算 logits"


def test_正在写的提示就可以共用():
    engine = Engine(tiny(), eos_ids=(), max_slots=2, prefix_cache_tokens=256)
    prompt = prompts_of([40])[0]
    engine.add_request(prompt, GREEDY, 30)
    engine.step()
    request = engine.add_request(prompt + [5, 6], GREEDY, 4)
    assert drain(engine)[request, 0].cached == 32


def test_取消的行写过的也留着_停止串就是这样结束的():
    engine = Engine(tiny(), eos_ids=(), max_slots=2, prefix_cache_tokens=256)
    prompt = prompts_of([20])[0]
    request = engine.add_request(prompt, GREEDY, 40)
    for _ in range(20):
        engine.step()
    engine.cancel(request)
    written = drain(engine)[request, 0].ids
    assert chat(engine, prompt + written + [5]).cached == 32


@pytest.mark.parametrize("when", ["空闲", "排队", "读到一半", "在写"])
def test_换了权重_旧的一概不用(when):
    """换权重时正在写的、读到一半的，之后也不许存进库里。"""
    model = copy.deepcopy(tiny())
    engine = Engine(model, eos_ids=(), max_slots=2, prefill_chunk=16, prefix_cache_tokens=512)
    prompt = prompts_of([50])[0]
    chat(engine, prompt, limit=5)
    if when != "空闲":
        blocker = prompts_of([4], seed=3)[0]
        for _ in range(2 if when == "排队" else 0):
            engine.add_request(blocker, GREEDY, 6)
            engine.step()
        engine.add_request([9, *prompt], GREEDY, 8, n=3)
        for _ in range({"排队": 1, "读到一半": 2, "在写": 5}[when]):
            engine.step()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)
    engine.refresh()
    fresh = Engine(model, eos_ids=())
    drain(engine)
    for ids in (prompt, [9, *prompt], prompt):
        params = SamplingParams(temperature=1.0, seed=3)
        got, want = chat(engine, [*ids, 8], params), chat(fresh, [*ids, 8], params)
        assert got.ids == want.ids
        torch.testing.assert_close(torch.tensor(got.logprobs), torch.tensor(want.logprobs), atol=1e-4, rtol=0)


def test_只靠forward的模型不用前缀库():
    engine = Engine(hf_model("Qwen2"), eos_ids=(), max_slots=2, prefix_cache_tokens=256)
    prompt = prompts_of([40])[0]
    assert chat(engine, prompt).ids == chat(engine, prompt).ids
    assert engine.prompt_tokens == (80, 0)
