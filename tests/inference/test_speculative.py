"""推测解码：谁来猜、猜得对不对，写出的都与照常解码相同；猜得对就省步数。"""

import random
from collections import Counter

import pytest
import torch
from engine_helpers import VOCAB, drain, hf_model, prompts_of, tiny

from minimind.errors import UserError
from minimind.inference import draft_model, speculative
from minimind.inference.cuda_graph import GraphedDecode
from minimind.inference.draft_model import DraftModel
from minimind.inference.engine import Engine, Request
from minimind.inference.requests import Row, Sequence
from minimind.inference.sampling import GREEDY, SamplingParams
from minimind.inference.shared import SharedModel
from minimind.inference.speculative import PromptLookup, Trace

EOS = {5, 9, 33}
ROWS = 4
PARAMS = (
    GREEDY,
    SamplingParams(temperature=1.0, seed=1),
    SamplingParams(temperature=0.7, top_k=8, seed=2),
    SamplingParams(temperature=1.3, top_p=0.8, seed=3),
    SamplingParams(temperature=1.0, min_p=0.05, seed=4),
    SamplingParams(temperature=0.9, top_k=20, top_p=0.9, min_p=0.01, seed=5),
    SamplingParams(temperature=0.8, repetition_penalty=1.3, seed=6),
    SamplingParams(temperature=0.0, repetition_penalty=1.2),
)


@pytest.fixture(autouse=True)
def several_rows(monkeypatch):
    """对不对与行数的界限无关：这里四行也猜。"""
    monkeypatch.setattr(speculative, "MOST_ROWS", ROWS)


@pytest.fixture(scope="module", params=["v2", "v3", "moe", "v3moe"])
def model(request):
    return tiny(request.param)


class Scripted:
    """照事先知道的答案猜，一次 ``width`` 个；``spoil`` 把猜的改坏。"""

    def __init__(self, answers, width=4, spoil=lambda draft, at: draft):
        self.answers, self.width, self.spoil = answers, width, spoil

    def guess(self, rows, rooms, state):
        return [self.one(row.sequence) for row in rows]

    def one(self, sequence):
        rest = self.answers[sequence.request_id, sequence.index][len(sequence.ids) :]
        return self.spoil(list(rest[: self.width]), len(sequence.ids))


def wrong(draft, at):
    return [(token + 1) % VOCAB for token in draft]


def half(draft, at):
    """有时对，有时从中间错起。"""
    return [token if (at + i) % 3 else (token + 7) % VOCAB for i, token in enumerate(draft)]


def noise(draft, at):
    rng = random.Random(at)
    return [rng.randrange(VOCAB) for _ in range(rng.randrange(7))]


def endings(draft, at):
    """夹着结束符。"""
    return [*draft[: at % 3], 5, *draft]


def too_long(draft, at):
    return draft + [7] * 200


SPOILS = {
    "全对": lambda draft, at: draft,
    "全错": wrong,
    "半对": half,
    "乱猜": noise,
    "结束符": endings,
    "太长": too_long,
}


class CountHook:
    """有状态的干预：写过的不许再写，写了 12 个就停。"""

    def __init__(self):
        self.written = []

    def adjust(self, logits):
        logits[self.written] = float("-inf")

    def accept(self, token):
        self.written.append(token)
        return len(self.written) == 12


def mixed_requests(seed, count=10):
    """长短、参数、个数各不相同。"""
    rng, prompts = random.Random(seed), prompts_of([4, 11, 30, 1, 20, 7, 44, 9, 3, 15], seed)
    return [
        Request(
            prompts[i],
            rng.choice(PARAMS),
            rng.randint(1, 40),
            n=rng.choice([1, 1, 2, 3]),
            top_logprobs=rng.choice([None, None, 0, 3]),
            hook=rng.choice([None, None, None, CountHook]),
        )
        for i in range(count)
    ]


def facts(sequence):
    return sequence.ids, sequence.finished, [tuple(t for t, _ in near) for _, near in sequence.top]


def write(engine, requests, meanwhile=None):
    """全部加进去写完；``meanwhile`` 每步叫一次。"""
    for request in requests:
        engine.add(request)
    done = {}
    while engine.has_unfinished:
        for sequence in engine.step():
            done[sequence.request_id, sequence.index] = sequence
        if meanwhile:
            meanwhile(engine)
    return done


def same(got, want):
    assert {key: facts(one) for key, one in got.items()} == {key: facts(one) for key, one in want.items()}
    for key, one in got.items():
        other = want[key]
        torch.testing.assert_close(
            torch.tensor(one.logprobs), torch.tensor(other.logprobs), atol=1e-5, rtol=1e-5
        )
        mine, theirs = [own for own, _ in one.top], [own for own, _ in other.top]
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), atol=1e-4, rtol=0)
        assert len(one.top) in (0, len(one.ids))


def answers_of(done):
    return {key: one.ids for key, one in done.items()}


def slots_cache(engine):
    """卡上的缓存，在 CPU 上。"""
    engine.decoder.use_slots()
    return engine


def replayable(run):
    out = run()
    return (lambda: out.copy_(run())), out


def graphed(engine):
    engine._graphs = GraphedDecode(engine.decoder, engine.max_slots, replayable)
    return engine


def count_calls(engine, monkeypatch):
    """读了几次一个、核对了几次。"""
    calls = Counter()
    for name in ("decode", "verify"):
        real = getattr(engine.decoder, name)

        def spy(*args, real=real, name=name):
            calls[name] += 1
            return real(*args)

        monkeypatch.setattr(engine.decoder, name, spy)
    return calls


@pytest.mark.parametrize("spoil", SPOILS)
def test_不管猜得对不对_写出的与照常解码相同(model, spoil):
    """四种结构、各种采样参数、几行先后进出、几个候选、重复惩罚、有干预的在旁边。"""
    for seed in range(3):
        requests = mixed_requests(seed)
        want = write(Engine(model, eos_ids=EOS, max_slots=ROWS), requests)
        drafter = Scripted(answers_of(want), width=1 + 3 * seed, spoil=SPOILS[spoil])
        same(write(Engine(model, eos_ids=EOS, max_slots=ROWS, draft=drafter), requests), want)


@pytest.mark.parametrize("setup", [slots_cache, graphed])
@pytest.mark.parametrize("spoil", ["半对", "太长"])
def test_卡上的缓存与录制的解码旁边也一样(setup, spoil):
    model = tiny()
    for seed in range(3):
        requests = mixed_requests(seed)
        want = write(setup(Engine(model, eos_ids=EOS, max_slots=ROWS)), requests)
        drafter = Scripted(answers_of(want), spoil=SPOILS[spoil])
        engine = setup(Engine(model, eos_ids=EOS, max_slots=ROWS, draft=drafter))
        same(write(engine, requests), want)


@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
def test_同构的别家模型也行(name):
    model, requests = hf_model(name), mixed_requests(0)
    want = write(Engine(model, eos_ids=EOS, max_slots=3), requests)
    drafter = Scripted(answers_of(want), spoil=half)
    same(write(Engine(model, eos_ids=EOS, max_slots=3, draft=drafter), requests), want)


@pytest.mark.parametrize("chunk", [None, 4, 24])
def test_分块读提示与前缀库旁边也一样(chunk):
    model, requests = tiny(), mixed_requests(1) + mixed_requests(1)
    options = {"max_slots": ROWS, "prefill_chunk": chunk, "prefix_cache_tokens": 4000}
    want = write(Engine(model, eos_ids=EOS, **options), requests)
    for spoil in (half, too_long):
        engine = Engine(model, eos_ids=EOS, draft=Scripted(answers_of(want), spoil=spoil), **options)
        same(write(engine, requests), want)
        assert engine.prompt_tokens[1] > 0, "抄到了前缀库里的"


@pytest.mark.parametrize("setup", [lambda engine: engine, slots_cache])
def test_没猜中的K_V不进前缀库(setup):
    """一问一答（一路上都在猜错）之后，带着历史再问：抄来的 KV 逐个等于从头读的。"""
    model, first = tiny(), prompts_of([20])[0]
    plain = Engine(model, eos_ids=(), max_slots=1)
    plain.add_request(first, GREEDY, 40)
    answer = drain(plain)[0, 0].ids
    engine = setup(
        Engine(
            model,
            eos_ids=(),
            max_slots=1,
            prefix_cache_tokens=200,
            draft=Scripted({(0, 0): answer}, width=7, spoil=half),
        )
    )
    engine.add_request(first, GREEDY, 40)
    assert drain(engine)[0, 0].ids == answer
    engine._draft = None
    history = first + answer
    store = engine._admission.prefixes
    length, kv = store.match(history)
    assert length == 48, "59 个位置里的三个整块"
    fresh = Engine(model, eos_ids=(), max_slots=1).decoder
    with torch.inference_mode():
        fresh.prefill([history[:length]], [0])
    torch.testing.assert_close(kv, fresh.keep(0, length), atol=1e-5, rtol=0)
    follow = history + prompts_of([5], seed=9)[0]
    engine.add_request(follow, SamplingParams(temperature=1.0, seed=3), 20)
    got = drain(engine)[1, 0]
    alone = Engine(model, eos_ids=(), max_slots=1)
    alone.add_request(follow, SamplingParams(temperature=1.0, seed=3), 20)
    want = drain(alone)[0, 0]
    assert got.ids == want.ids and got.cached == 48


def test_取消在写的_别的行不受影响():
    model, requests = tiny(), mixed_requests(2)

    def cancels(engine):
        running = engine.running
        if len(running) > 1 and len(running[0].ids) > 6:
            engine.cancel(running[0].request_id)

    want = write(Engine(model, eos_ids=EOS, max_slots=ROWS), requests)
    drafter = Scripted(answers_of(want), spoil=half)
    got = write(Engine(model, eos_ids=EOS, max_slots=ROWS, draft=drafter), requests, cancels)
    assert any(one.finished == "cancelled" for one in got.values())
    for key, one in got.items():
        assert one.ids == want[key].ids[: len(one.ids)]
        assert one.finished == "cancelled" or one.finished == want[key].finished


def test_结束符与上限落在猜中的一段里_正好停在那里():
    model = tiny()
    params = SamplingParams(temperature=1.0, seed=7)
    long = Engine(model, eos_ids=(), max_slots=1)
    long.add_request([3, 4, 6], params, 60)
    text = drain(long)[0, 0].ids
    for at in range(2, 14):
        eos = text[at]
        stop = text.index(eos)
        engine = Engine(model, eos_ids={eos}, max_slots=1, draft=Scripted({(0, 0): text}, width=9))
        engine.add_request([3, 4, 6], params, 60)
        done = drain(engine)[0, 0]
        assert (done.ids, done.finished, len(done.logprobs)) == (text[: stop + 1], "stop", stop + 1)
        engine = Engine(model, eos_ids=(), max_slots=1, draft=Scripted({(0, 0): text}, width=9))
        engine.add_request([3, 4, 6], params, at)
        done = drain(engine)[0, 0]
        assert (done.ids, done.finished, len(done.logprobs)) == (text[:at], "length", at)


def test_写满上下文_不越过位置表(model):
    engine = Engine(model, eos_ids=(), max_slots=1)
    engine.add_request(prompts_of([10])[0], GREEDY, 10**6)
    want = drain(engine)[0, 0]
    engine = Engine(model, eos_ids=(), max_slots=1, draft=Scripted({(0, 0): want.ids}, spoil=too_long))
    engine.add_request(prompts_of([10])[0], GREEDY, 10**6)
    got = drain(engine)[0, 0]
    assert got.ids == want.ids and len(got.ids) == 96 - 10
    assert engine.decoder.cache.capacity <= 96


@pytest.mark.parametrize("width", [1, 3, 8])
def test_全猜中时步数是几分之一(width, monkeypatch):
    """60 个词元：第一个随提示来，其后每次核对写 ``width + 1`` 个。"""
    model, answers = tiny(), {}
    for rows in (1, 3):
        prompts = prompts_of([5] * rows)
        plain = Engine(model, eos_ids=(), max_slots=4)
        for prompt in prompts:
            plain.add_request(prompt, SamplingParams(temperature=1.0, seed=1), 60)
        answers = answers_of(drain(plain))
        engine = Engine(model, eos_ids=(), max_slots=4, draft=Scripted(answers, width))
        calls = count_calls(engine, monkeypatch)
        for prompt in prompts:
            engine.add_request(prompt, SamplingParams(temperature=1.0, seed=1), 60)
        assert answers_of(drain(engine)) == answers
        full, rest = divmod(59, width + 1)
        assert calls["verify"] + calls["decode"] == full + (rest > 0)


def test_没有提议的一步就是照常的解码_逐位相同(monkeypatch):
    model, requests = tiny(), mixed_requests(3)

    class Silent:
        def guess(self, rows, rooms, state):
            return [[] for _ in rows]

    plain, quiet = (Engine(model, eos_ids=EOS, max_slots=4, draft=draft) for draft in (None, Silent()))
    calls = count_calls(quiet, monkeypatch)
    want, got = write(plain, requests), write(quiet, requests)
    assert {k: (s.ids, s.logprobs, s.top) for k, s in got.items()} == {
        k: (s.ids, s.logprobs, s.top) for k, s in want.items()
    }
    assert calls["verify"] == 0 and calls["decode"] > 0


def test_行多了就不猜_逐位相同(monkeypatch):
    model, rows = tiny(), ROWS + 1

    def run(draft):
        engine = Engine(model, eos_ids=(), max_slots=rows, draft=draft)
        calls = count_calls(engine, monkeypatch)
        for i, prompt in enumerate(prompts_of([6] * rows)):
            engine.add_request(prompt, SamplingParams(temperature=1.0, seed=i), 20)
        return {key: (one.ids, one.logprobs) for key, one in drain(engine).items()}, calls

    want, _ = run(None)
    got, calls = run(Scripted({key: ids for key, (ids, _) in want.items()}))
    assert got == want and calls["verify"] == 0


def test_有干预的行不猜_旁边的照猜():
    model, asked = tiny(), []
    plain = Engine(model, eos_ids=(), max_slots=2)
    plain.add_request([3, 4, 6], GREEDY, 30, hook=CountHook)
    plain.add_request([7, 8], GREEDY, 30)
    want = drain(plain)

    class Spy(Scripted):
        def guess(self, rows, rooms, state):
            asked.extend(row.sequence.request_id for row, room in zip(rows, rooms) if room > 0)
            return super().guess(rows, rooms, state)

    engine = Engine(model, eos_ids=(), max_slots=2, draft=Spy(answers_of(want)))
    engine.add_request([3, 4, 6], GREEDY, 30, hook=CountHook)
    engine.add_request([7, 8], GREEDY, 30)
    assert answers_of(drain(engine)) == answers_of(want)
    assert set(asked) == {1} and len(want[0, 0].ids) == 12


def test_换了权重_接着猜也对():
    import copy

    model = copy.deepcopy(tiny())
    engine = Engine(model, eos_ids=(), max_slots=2, prefix_cache_tokens=96, draft=PromptLookup())
    engine.add_request([5, 6, 7] * 6, GREEDY, 30)
    drain(engine)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    engine.refresh()
    engine.add_request([5, 6, 7] * 6, GREEDY, 30)
    plain = Engine(model, eos_ids=(), max_slots=2)
    plain.add_request([5, 6, 7] * 6, GREEDY, 30)
    assert drain(engine)[1, 0].ids == drain(plain)[0, 0].ids


def test_别的结构不会核对_说清楚():
    with pytest.raises(UserError, match=r"Qwen2ForCausalLM 不能用推测解码"):
        Engine(hf_model("Qwen2"), eos_ids=(), draft=PromptLookup())


# ---------------------------------------------------------------- 提示查找


def trace_of(tokens):
    trace = Trace()
    trace.extend(tokens)
    return trace


def test_查的是最近一次_先三元再二元():
    trace = trace_of([1, 2, 3, 4, 9, 2, 3, 5, 8, 1, 2, 3])
    assert trace.ahead(3) == [4, 9, 2], "三元组 1 2 3 在前，二元组 2 3 更近也不看"
    trace = trace_of([7, 2, 3, 4, 9, 2, 3, 5, 8, 6, 2, 3])
    assert trace.ahead(2) == [5, 8], "三元组没有，二元组取最近的"
    assert trace_of([1, 2, 3]).source is None and trace_of([]).source is None
    assert trace_of([4, 4]).source is None, "不查到自己"


def test_一直重复的_抄到末尾就接着抄刚抄的():
    assert trace_of([9, 1, 2, 3, 1, 2, 3]).ahead(8) == [1, 2, 3, 1, 2, 3, 1, 2]
    assert trace_of([5, 5, 5]).ahead(4) == [5, 5, 5, 5]


def test_一个一个来与一起来_记的一样():
    rng = random.Random(0)
    tokens = [rng.randrange(6) for _ in range(300)]
    whole, one = trace_of(tokens), Trace()
    for token in tokens:
        one.extend([token])
    assert vars(whole) == vars(one)


def row_of(prompt, ids, limit=100):
    sequence = Sequence(0, 0, prompt, ids)
    return Row(sequence, Request(prompt, GREEDY, limit))


def test_抄对了就多猜_头一个常猜错的等抄对了才猜():
    lookup = PromptLookup()
    row = row_of([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16], [1, 2])
    assert lookup.guess([row], [50], None) == [[3, 4, 5, 6]]
    row.sequence.ids += [3, 4, 5, 6]
    assert lookup.guess([row], [50], None) == [[7, 8, 9, 10, 11, 12, 13, 14]]
    assert lookup.guess([row], [3], None) == [[7, 8, 9]] and lookup.guess([row], [0], None) == [[]]
    row = row_of([1, 2, 3, 4, 5, 6, 7, 8], [1, 2])
    assert lookup.guess([row], [50], None) != [[]]
    row.sequence.ids += [8, 4, 5]  # 猜 3 写的是 8
    assert lookup.guess([row], [50], None) == [[]], "刚猜错过，先不猜"
    row.sequence.ids += [6]
    assert lookup.guess([row], [50], None) == [[7, 8, 1, 2]], "暗中对了一个"


def test_行多时抄对了一个才猜():
    lookup, rows = PromptLookup(), [row_of([1, 2, 3, 4, 5], [1, 2]) for _ in range(speculative.BOLD_ROWS + 1)]
    assert not any(lookup.guess(rows, [50] * len(rows), None))
    rows[1].sequence.ids.append(3)
    assert lookup.guess(rows, [50] * len(rows), None) == [[], [4, 5, 1, 2], []]


@pytest.mark.parametrize("setup", [lambda engine: engine, slots_cache])
def test_提示查找写出的也相同(model, setup):
    for seed in range(3):
        requests = mixed_requests(seed)
        want = write(setup(Engine(model, eos_ids=EOS, max_slots=ROWS)), requests)
        engine = setup(Engine(model, eos_ids=EOS, max_slots=ROWS, draft=PromptLookup()))
        same(write(engine, requests), want)


def test_重复的文字_步数少一半以上(monkeypatch):
    """词嵌入与输出共享、各层几乎不起作用的模型总把刚写的再写一遍。"""
    model = tiny(initializer_range=0.01, tie_word_embeddings=True)
    plain, engine = (Engine(model, eos_ids=(), max_slots=1, draft=one) for one in (None, PromptLookup()))
    calls = count_calls(engine, monkeypatch)
    request = Request([3, 4, 6, 8], GREEDY, 60)
    want = write(plain, [request])
    same(write(engine, [request]), want)
    assert len(set(want[0, 0].ids)) < 5 and sum(calls.values()) < 30


# ---------------------------------------------------------------- 小模型


@pytest.mark.parametrize("setup", [lambda engine: engine, slots_cache])
@pytest.mark.parametrize("small", ["自己", "别的"])
def test_小模型来猜_写出的相同(model, small, setup, monkeypatch):
    monkeypatch.setattr(draft_model, "MOST_ROWS", ROWS)
    other = model if small == "自己" else tiny("v3", initializer_range=0.2)
    for seed in range(3):
        requests = mixed_requests(seed)
        want = write(setup(Engine(model, eos_ids=EOS, max_slots=ROWS)), requests)
        engine = setup(Engine(model, eos_ids=EOS, max_slots=ROWS, draft=DraftModel(SharedModel(other))))
        same(write(engine, requests), want)


@pytest.mark.parametrize("params", [GREEDY, *PARAMS[1:6]])
def test_小的与大的是同一个_猜的全中_抽样时也是(params, monkeypatch):
    """两边用同一步的随机数抽，所以温度 1 也全中；一次写 WIDTH + 1 个。"""
    model = tiny()
    engine = Engine(model, eos_ids=(), max_slots=2, draft=DraftModel(SharedModel(model)))
    calls = count_calls(engine, monkeypatch)
    requests = [Request(prompt, params, 61) for prompt in prompts_of([5, 20])]
    same(write(engine, requests), write(Engine(model, eos_ids=(), max_slots=2), requests))
    assert calls == {"verify": 60 // (draft_model.WIDTH + 1)}


def test_小的总猜错_歇着(monkeypatch):
    model = tiny()
    engine = Engine(
        model, eos_ids=(), max_slots=1, draft=DraftModel(SharedModel(tiny(initializer_range=0.9)))
    )
    calls = count_calls(engine, monkeypatch)
    engine.add_request([3, 4, 6], SamplingParams(temperature=1.0, seed=1), 90)
    drain(engine)
    assert calls["verify"] < 20 and calls["verify"] + calls["decode"] > 70


def test_小的上下文不够_到头就不猜():
    model, short = tiny(), tiny(max_position_embeddings=40)
    engine = Engine(model, eos_ids=(), max_slots=1, draft=DraftModel(SharedModel(short)))
    plain = Engine(model, eos_ids=(), max_slots=1)
    requests = [Request(prompts_of([20])[0], GREEDY, 70), Request(prompts_of([50])[0], GREEDY, 30)]
    same(write(engine, requests), write(plain, requests))
    assert engine._draft.decoder.cache.capacity <= 64
