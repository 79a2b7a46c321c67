"""分块读提示：长提示进来时别人照写，文字一个不差，中途取消什么都不留下。"""

import pytest
import torch
from engine_helpers import any_model, drain, prompts_of, tiny

from minimind.inference.engine import Engine
from minimind.inference.generate import stream_tokens
from minimind.inference.sampling import GREEDY, SamplingParams

MODELS = ["v2", "v3", "moe", "v3moe", "Llama", "Qwen3", "Qwen2"]
SEEDED = SamplingParams(temperature=1.0, seed=7)


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return any_model(request.param)


def generated(model, prompt, limit):
    ids = torch.tensor([prompt])
    options = {
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }  # 写明掩码，提示里的 0 才不当成填充
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, **options)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("chunk", [None, 1, 7, 32])
@pytest.mark.parametrize("store", [0, 48, 512])
def test_贪心与generate逐个相同_拆不拆_共不共用前缀(model, chunk, store):
    """参差的一批、同样的开头、第二轮带着第一轮的历史；前缀库够用、只够一点、没有。"""
    shared = prompts_of([35])[0]
    prompts = [shared + rest for rest in prompts_of([3, 11, 1, 20], seed=2)] + prompts_of([1, 17])
    engine = Engine(model, eos_ids=(), max_slots=3, prefill_chunk=chunk, prefix_cache_tokens=store)
    for _ in range(2):
        ids = [engine.add_request(prompt, GREEDY, 9) for prompt in prompts]
        done = drain(engine)
        for request, prompt in zip(ids, prompts):
            assert done[request, 0].ids == generated(model, prompt, 9)
        prompts = [
            prompt + done[request, 0].ids + [5, 6]
            for request, prompt in zip(ids, prompts)
            if len(prompt) < 70
        ]
    _, reused = engine.prompt_tokens
    if store == 512 and type(engine.decoder).__name__ == "FusedDecoder":
        assert reused > 150, "第二轮的历史几乎全是抄来的"
    elif store == 0:
        assert reused == 0


def test_长提示读着的时候_别人每步都写一个():
    engine, read = Engine(tiny(), eos_ids=(), max_slots=3, prefill_chunk=8), []
    real = engine.decoder.prefill

    def spy(prompts, slots, starts):
        read.append(sum(map(len, prompts)))
        return real(prompts, slots, starts)

    engine.decoder.prefill = spy
    short, long = prompts_of([4, 60])
    first = engine.add_request(short, GREEDY, 30)
    engine.step()
    second = engine.add_request(long, GREEDY, 5)
    running = engine.running[0]
    for step in range(7):
        engine.step()
        assert [one.request_id for one in engine.running] == [first]
        assert len(running.ids) == 3 + step
    engine.step()
    assert {one.request_id for one in engine.running} == {first, second}
    assert max(read) <= 8 and sum(read) == 64


def test_拆开的提示要几个样本_也有干预与候选(model):
    """n 个样本、槽位不够而另存的提示、各样本的干预、候选的对数概率，都与不拆的一样。"""

    class Forbid:
        def adjust(self, logits):
            logits[10:20] = float("-inf")

        def accept(self, token):
            assert not 10 <= token < 20
            return token == 30

    def write(**options):
        engine = Engine(model, eos_ids=(), max_slots=3, **options)
        for index, prompt in enumerate(prompts_of([40, 3, 26])):
            params = SamplingParams(temperature=1.0, seed=index, repetition_penalty=1.1)
            engine.add_request(prompt, params, 8, n=4, hook=Forbid, top_logprobs=2)
        return drain(engine)

    want, got = write(), write(prefill_chunk=6, prefix_cache_tokens=256)
    assert want.keys() == got.keys()
    for key, sequence in got.items():
        assert (sequence.ids, sequence.finished) == (want[key].ids, want[key].finished)
        ours = [[p, *(value for _, value in near)] for p, near in sequence.top]
        theirs = [[p, *(value for _, value in near)] for p, near in want[key].top]
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=1e-4, rtol=0)


def test_同一种子同一段文字_不管同时谁在读长提示(model):
    prompt, *others = prompts_of([30, 50, 2, 44, 9])
    alone = Engine(model, eos_ids=(), max_slots=1)
    alone.add_request(prompt, SEEDED, 20)
    want = drain(alone)[0, 0].ids
    crowd = Engine(model, eos_ids=(), max_slots=4, prefill_chunk=5, prefix_cache_tokens=64)
    for index, other in enumerate(others):
        crowd.add_request(other, SamplingParams(temperature=0.9, seed=index), 12, n=2)
    for _ in range(4):
        crowd.step()
    mine = [crowd.add_request(prompt, SEEDED, 20) for _ in range(2)]
    done = drain(crowd)
    assert [done[request, 0].ids for request in mine] == [want, want]


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_读到一半取消_槽位空出_别人不受影响(model, steps):
    engine = Engine(model, eos_ids=(), max_slots=2, prefill_chunk=8)
    short, long, after = prompts_of([6, 40, 30])
    kept = engine.add_request(short, GREEDY, 20)
    engine.step()
    gone = engine.add_request(long, GREEDY, 20, n=3)
    for _ in range(steps):
        engine.step()
    engine.cancel(gone)
    last = [engine.add_request(prompt, GREEDY, 6) for prompt in (after, long)]
    done = drain(engine)
    assert [done[gone, index].finished for index in range(3)] == ["cancelled"] * 3
    assert done[kept, 0].ids == generated(model, short, 20)
    assert done[last[0], 0].ids == generated(model, after, 6)
    assert done[last[1], 0].ids == generated(model, long, 6)
    assert not engine.has_unfinished and not engine.running


def test_读到一半只取消其中一个样本():
    engine = Engine(tiny(), eos_ids=(), max_slots=4, prefill_chunk=8)
    request = engine.add_request(prompts_of([40])[0], SEEDED, 6, n=3)
    engine.step()
    engine.cancel(request, 1)
    done = drain(engine)
    assert [done[request, index].finished for index in range(3)] == ["length", "cancelled", "length"]
    whole = Engine(tiny(), eos_ids=())
    whole.add_request(prompts_of([40])[0], SEEDED, 6, n=3)
    want = drain(whole)
    assert all(done[request, index].ids == want[0, index].ids for index in (0, 2))


def test_短的不必等长的读完_长的也饿不着():
    """一步 8 个：长的 60 个单独要 8 步；短的源源不断时它每步仍得 4 个。"""
    model, long, short = tiny(), *prompts_of([60, 4])
    engine = Engine(model, eos_ids=(), max_slots=4, prefill_chunk=8)
    slow = engine.add_request(long, GREEDY, 5)
    engine.step()
    finished, steps = {}, 0
    while slow not in finished:
        quick = engine.add_request(short, GREEDY, 2)
        for sequence in engine.step():
            finished[sequence.request_id] = sequence.ids
        if not any(one.request_id == slow for one in engine.running) and slow not in finished:
            assert quick in finished, "当步就进场，两个 token 写完"
            steps += 1
    assert steps == 11, "剩下 52 个，每步 4 个，最后 8 个一步读完"
    assert finished.pop(slow) == generated(model, long, 5)
    assert len(finished) >= 11 and all(ids == generated(model, short, 2) for ids in finished.values())


def test_逐个产出的入口_等得起拆开的提示():
    model, prompt = tiny(), prompts_of([40])[0]
    engine = Engine(model, eos_ids=(), max_slots=1, prefill_chunk=8)
    got = list(stream_tokens(model, prompt, max_new_tokens=6, eos_ids=(), engine=engine))
    assert got == generated(model, prompt, 6)


def test_没在写的时候不拆的引擎一次读完_与从前一样(monkeypatch):
    engine, read = Engine(tiny(), eos_ids=(), max_slots=8), []
    real = engine.decoder.prefill

    def spy(prompts, slots, starts):
        read.append((len(prompts), starts))
        return real(prompts, slots, starts)

    monkeypatch.setattr(engine.decoder, "prefill", spy)
    for prompt in prompts_of([40, 3, 70, 9]):
        engine.add_request(prompt, GREEDY, 4, n=2)
    engine.step()
    assert read == [(4, [0, 0, 0, 0])] and len(engine.running) == 8


def test_参数越界说清楚():
    with pytest.raises(ValueError, match="prefill_chunk=0"):
        Engine(tiny(), eos_ids=(), prefill_chunk=0)
    with pytest.raises(ValueError, match="prefix_cache_tokens=-1"):
        Engine(tiny(), eos_ids=(), prefix_cache_tokens=-1)
