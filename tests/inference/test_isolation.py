"""一个人不拖慢所有人：一条长的在场，短的看的、占的、等的都不变；打分与别的一样分块。"""

import pytest
import torch
import torch.nn.functional as F
from engine_helpers import any_model, drain, prompts_of, tiny

from minimind.inference.engine import Engine
from minimind.inference.grouped_cache import GroupedKVCache, room_for
from minimind.inference.sampling import GREEDY, SamplingParams

CONTEXT = 2048


@pytest.fixture(scope="module")
def model():
    return tiny(max_position_embeddings=CONTEXT)


def needed(engine):
    return sum(len(one.prompt_ids) + len(one.ids) for one in engine.running)


def bytes_per_position(engine):
    cache = engine.decoder.cache
    layers, heads, width = cache.shape
    return layers * 2 * heads * width * 4


def crowd(model, long, chunk=None, writers=24):
    engine = Engine(model, eos_ids=(), max_slots=writers + 1, prefill_chunk=chunk)
    prompts = prompts_of([60 + 3 * index for index in range(writers)])
    for index, prompt in enumerate(prompts):
        engine.add_request(prompt, SamplingParams(temperature=1.0, seed=index), 140)
    if long:
        engine.add_request(prompts_of([long], seed=9)[0], GREEDY, 140)
    return engine


def test_一条长的在场_短的文字不变_注意力多看的只是它自己的(model, monkeypatch):
    seen = []
    real = F.scaled_dot_product_attention

    def spy(query, key, value, **options):
        seen[-1] += key.shape[0] * key.shape[2]
        return real(query, key, value, **options)

    def run(long):
        engine, looked = crowd(model, long), []
        while not engine.running:
            engine.step()
        monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
        while engine.has_unfinished and len(looked) < 30:
            seen.append(0)
            engine.step()
            looked.append(seen[-1])
        monkeypatch.undo()
        return {key: s.ids for key, s in drain(engine).items() if key[0] < 24}, looked

    (alone, few), (beside, many) = run(0), run(1500)
    assert alone == beside
    layers = model.config.num_hidden_layers
    for before, after in zip(few, many):
        assert 0 < after - before <= layers * (1500 + 140), "补齐到最长的一行要看二十多倍"
    assert few[0] <= 1.3 * layers * sum(60 + 3 * index + 2 for index in range(24))


@pytest.mark.parametrize("chunk", [None, 100])
@pytest.mark.parametrize("long", [0, 700, 1500, 1900])
def test_占的内存不超过词元要的一点三倍(model, chunk, long):
    engine = crowd(model, long, chunk)
    while len(engine.running) < 24 + bool(long):
        engine.step()
    for _ in range(30):
        allowed = 1.3 * needed(engine) * bytes_per_position(engine)
        assert engine.decoder.cache.nbytes <= allowed
        engine.step()
    drain(engine)
    assert engine.decoder.cache.nbytes == 0, "都写完了，一个字节也不占"


def test_容量的档_够用_单调_空着的不多():
    rooms = [room_for(length) for length in range(1, 9000)]
    assert rooms == sorted(rooms)
    for length, room in enumerate(rooms, start=1):
        assert length <= room <= max(length + 31, length * 1.125)


def test_长大时只抄用到的_别的行一个字节也不动():
    cache = GroupedKVCache(2, 1, 4, dtype=torch.float32)
    for slot, length in ((0, 20), (1, 30), (2, 600)):
        cache.open(slot, length)
        cache.reserve(slot, length)
        cache.row(slot)[:, :, :length] = slot + 1
    untouched = cache.row(2).data_ptr()
    before = cache.nbytes
    cache.reserve(1, 5000)
    assert cache.row(2).data_ptr() == untouched
    assert cache.room(1) == room_for(5000) and cache.nbytes - before <= room_for(5000) * 2 * 2 * 4 * 4
    row = cache.row(1)
    assert (row[:, :, :30] == 2).all() and not row[:, :, 30:].any()
    assert (cache.row(0)[:, :, :20] == 1).all() and (cache.row(2)[:, :, :600] == 3).all()


@pytest.mark.parametrize("seed", range(5))
def test_乱来一通_各行的内容都在_空了的都还(seed):
    generator = torch.Generator().manual_seed(seed)
    cache, want = GroupedKVCache(1, 1, 2, dtype=torch.float32), {}

    def pick(n):
        return int(torch.randint(n, (), generator=generator))

    for turn in range(400):
        slot, action = pick(12), pick(5)
        if action == 0 or slot not in want:
            length = 1 + pick(300)
            cache.open(slot, length, alone=pick(4) == 0)
            cache.reserve(slot, length)
            cache.row(slot)[:, :, :length] = turn
            want[slot] = [turn] * length
        elif action == 1:
            cache.free([slot])
            del want[slot]
        elif action == 2:
            target = 12 + pick(4)
            cache.move(slot, target)
            want[target] = want.pop(slot)
        elif action == 3:
            length = len(want[slot]) + pick(100)
            start = len(want[slot])
            cache.reserve(slot, length)
            cache.row(slot)[:, :, start:length] = turn
            want[slot] += [turn] * (length - start)
        else:
            cache.copy(slot, 20, len(want[slot]))
            want[20] = list(want[slot])
        for key, values in want.items():
            assert cache.row(key)[0, 0, : len(values), 0].tolist() == values
        owners = [owner for group in cache.groups for owner in group.owners]
        assert sorted(owners) == sorted(want)
        partial = [g.capacity for g in cache.groups if not g.full]
        assert len(partial) == len(set(partial)), "每一档至多一组没有住满"
    cache.free(list(want))
    assert cache.nbytes == 0


@pytest.mark.parametrize("name", ["v2", "v3moe", "Llama", "Qwen2"])
@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("store", [0, 128])
def test_打分_与整段前向相同_分几步读也一样(name, chunk, store):
    model = any_model(name)
    engine = Engine(model, eos_ids=(), max_slots=3, prefill_chunk=chunk, prefix_cache_tokens=store)
    prompts = prompts_of([40, 1, 2, 23])
    for _ in range(2):  # 第二轮前缀库里都有，也照样每个都打
        asked = [engine.add_request(prompt, GREEDY, 1, score=3) for prompt in prompts]
        other = engine.add_request(prompts[0], GREEDY, 9, n=2)
        done = drain(engine)
        assert done[other, 1].scored == []
        for request, prompt in zip(asked, prompts):
            with torch.no_grad():
                logp = model(input_ids=torch.tensor([prompt])).logits[0, :-1].float().log_softmax(-1)
            scored = done[request, 0].scored
            assert len(scored) == len(prompt) - 1
            for token, line, (own, near) in zip(prompt[1:], logp, scored):
                assert own == pytest.approx(line[token].item(), abs=1e-4) and len(near) == 3
                best = line.topk(3).values.tolist()
                assert [value for _, value in near] == pytest.approx(best, abs=1e-4)


def test_打分时别人照写_一步读的有上限(model):
    engine, read = Engine(model, eos_ids=(), max_slots=2, prefill_chunk=64), []
    real = engine.decoder.prefill

    def spy(prompts, slots, starts, **options):
        read.append(sum(map(len, prompts)))
        return real(prompts, slots, starts, **options)

    engine.decoder.prefill = spy
    engine.add_request(prompts_of([4])[0], GREEDY, 1000)
    engine.step()
    engine.add_request(prompts_of([1500])[0], GREEDY, 1, score=0)
    writer = engine.running[0]
    while len(engine.running) == 1 and sum(read) < 1504:
        before = len(writer.ids)
        engine.step()
        assert len(writer.ids) == before + 1
    assert max(read) <= 64 and sum(read) == 1504


def test_读得越深一步读得越少(model):
    """一个位置要看的键越来越多，别人等的时间却不该越来越长。"""
    engine, spans = Engine(model, eos_ids=(), max_slots=2, prefill_chunk=256), []
    real = engine.decoder.prefill

    def spy(prompts, slots, starts, **options):
        spans.extend((start, len(prompt)) for start, prompt in zip(starts, prompts))
        return real(prompts, slots, starts, **options)

    engine.decoder.prefill = spy
    engine.add_request(prompts_of([2000])[0], GREEDY, 1)
    drain(engine)
    assert spans[0] == (0, 256) and sum(n for _, n in spans) == 2000
    work = [n * (4096 + start) for start, n in spans]
    assert max(work) <= 256 * 4096 * 1.07
    assert all(start % 64 == 0 for start, _ in spans), "停在一块的边上：零头是新的形状，要现编内核"
