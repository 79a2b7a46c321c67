"""整步录制（解码、抽样、推状态）：与只录 logits 的逐位相同，与不录的文字相同；录坏了认得出。CPU 上用不录的替身。"""

import random
import weakref

import pytest
import torch
from engine_helpers import any_model, drain, graphed, prompts_of, replayable, tiny
from torch.utils._python_dispatch import TorchDispatchMode

from minimind.inference import cuda_graph
from minimind.inference.cuda_graph import PATIENCE, RULES
from minimind.inference.engine import Engine
from minimind.inference.row_state import RowState
from minimind.inference.sampling import GREEDY, SamplingParams

RULE_POOL = [
    GREEDY,
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.8, top_k=5),
    SamplingParams(temperature=1.1, top_p=0.8, min_p=0.02),
    SamplingParams(temperature=0.7, repetition_penalty=1.3),
    SamplingParams(temperature=0.0, repetition_penalty=1.5),
]


def with_seed(rule, seed):
    return SamplingParams(
        rule.temperature, rule.top_k, rule.top_p, rule.min_p, rule.repetition_penalty, seed=seed
    )


def logits_only(engine):
    """只录到 logits，抽样照常。"""
    engine._graphs.write = lambda *args: None
    return engine


class Nudge:
    """一种干预。"""

    def adjust(self, logits):
        logits[7] += 3

    def accept(self, token):
        return token == 11


def churn(engine, seed):
    """乱来一通：进进出出、取消；一阵子一条规则，一阵子几条混着，偶尔有干预、要候选。``{(请求, 第几个): (文字, 对数概率, 怎么停的)}``"""
    rng, done = random.Random(seed), {}
    pool = prompts_of([1, 3, 20, 40], seed=seed)
    common, asked = rng.choice(RULE_POOL), []
    for _ in range(60):
        action = rng.random()
        if action < 0.06:
            common = rng.choice([*RULE_POOL, None])
        elif action < 0.4:
            rule = common or rng.choice(RULE_POOL)
            options = rng.choice([{}] * 6 + [{"hook": Nudge}, {"top_logprobs": 2}])
            params = with_seed(rule, rng.randint(0, 9))
            limit, n = rng.randint(1, 30), rng.choice([1, 1, 2, 5])
            asked.append(engine.add_request(rng.choice(pool), params, limit, n=n, **options))
        elif action < 0.48 and asked:
            engine.cancel(rng.choice(asked), rng.choice([None, 0, 1]))
        else:
            for one in engine.step():
                done[one.request_id, one.index] = one
    done |= drain(engine)
    return {key: (one.ids, one.logprobs, one.finished) for key, one in sorted(done.items())}


@pytest.mark.parametrize("name", ["v2", "v3", "moe", "v3moe", "Qwen3"])
@pytest.mark.parametrize("seeds", [range(3), pytest.param(range(3, 36), marks=pytest.mark.slow)])
def test_随机的进进出出_与只录logits的逐位相同_与不录的文字相同(name, seeds):
    model, kinds = any_model(name), set()
    for seed in seeds:
        stride, slots, chunk = (1, 3, 8)[seed % 3], (3, 5, 9)[(seed + seed // 3) % 3], (None, 8)[seed % 2]
        options = {"max_slots": slots, "prefill_chunk": chunk, "prefix_cache_tokens": (0, 96)[seed % 4 > 1]}
        engine = graphed(Engine(model, eos_ids={5, 9}, **options), stride=stride)
        other = logits_only(graphed(Engine(model, eos_ids={5, 9}, **options), stride=stride))
        plain = Engine(model, eos_ids={5, 9}, **options)
        plain.stride = stride
        got, want = churn(engine, seed), churn(plain, seed)
        assert not engine._graphs.trouble
        assert got == churn(other, seed), "逐位相同"
        assert {k: (v[0], v[2]) for k, v in got.items()} == {k: (v[0], v[2]) for k, v in want.items()}
        for key, (_, logprobs, _) in got.items():
            torch.testing.assert_close(torch.tensor(logprobs), torch.tensor(want[key][1]), atol=1e-4, rtol=0)
        kinds |= {len(key) for key in engine._graphs.graphs}
    assert kinds == {2, 3}, "两种图都录过"


@pytest.mark.parametrize("rule", RULE_POOL)
def test_抽样的设备一半_与照常的逐位相同_补的行一动不动(rule):
    torch.manual_seed(0)
    a, b = (RowState(8, 300, torch.device("cpu")) for _ in range(2))
    for state in (a, b):
        generator = torch.Generator().manual_seed(3)
        state.uniforms = torch.rand(8, 12, generator=generator)
        state.tokens.copy_(torch.arange(8))
        state.positions.copy_(torch.arange(8) * 3)
        state.seen = torch.rand(8, 300, generator=generator) < 0.2
    rest = [one[5:].clone() for one in a._changing()]
    row = type("R", (), {"request": type("Q", (), {"params": rule, "top_logprobs": None}), "hook": None})
    live = torch.arange(8) < 5
    for _ in range(10):
        logits = torch.randn(8, 300) * 3
        ids, logp = a.advance(logits, rule, live)
        want_ids, want_logp = b.sample(logits[:5], [row] * 5, 0)
        assert torch.equal(ids[:5], want_ids) and torch.equal(logp[:5], want_logp)
    assert all(torch.equal(one[:5], other[:5]) for one, other in zip(a._changing(), b._changing()))
    assert all(torch.equal(one[5:], old) for one, old in zip(a._changing(), rest))


def test_补的行是NaN_不越界_别的行不变():
    torch.manual_seed(0)
    state = RowState(4, 200, torch.device("cpu"))  # 200 不是一块 128 的整倍数
    state.uniforms = torch.rand(4, 3)
    logits = torch.randn(4, 200)
    want = RowState.advance(copy_of(state), logits, RULE_POOL[1], torch.arange(4) < 3)[0]
    logits[3] = float("nan")
    ids, _ = state.advance(logits, RULE_POOL[1], torch.arange(4) < 3)
    assert torch.equal(ids[:3], want[:3]) and 0 <= int(ids[3]) < 200 and int(state.tokens[3]) == 0


def copy_of(state):
    twin = RowState(state.max_slots, state.vocab_size, state.device)
    twin.uniforms = state.uniforms.clone()
    return twin


# ---------------------------------------------------------------- 录坏了


def spoiled(spoil):
    """照常重放，之后弄坏一样：``spoil(引擎, 这一步之前的状态, logits)``。"""

    def make(engine):
        def recorder(run):
            out = run()

            def replay():
                before = engine._state.snapshot(engine.max_slots), engine._graphs.ids.clone()
                out.copy_(run())
                spoil(engine, before, out)

            return replay, out

        return recorder

    return make


def stale_ids(engine, before, out):
    engine._graphs.ids.copy_(before[1])


def other_ids(engine, before, out):
    engine._graphs.ids.add_(1).remainder_(64)


def wrong_row(engine, before, out):
    engine._graphs.ids.copy_(engine._graphs.ids.roll(1, 1))


def wrong_logp(engine, before, out):
    engine._graphs.logp.sub_(0.01)


def nan_logp(engine, before, out):
    engine._graphs.logp.fill_(float("nan"))


def nan_logits(engine, before, out):
    out.fill_(float("nan"))


def stale_state(engine, before, out):
    engine._state.restore(before[0])


def twice(engine, before, out):
    engine._state.written.add_(1)


def neighbour(engine, before, out):
    """补的行（四档里只有三行在写）也往前走了。"""
    engine._state.positions[3] += 1


def unseen(engine, before, out):
    if engine._state.seen is not None:
        engine._state.seen.copy_(before[0][-1])


def stuck_turn(engine, before, out):
    engine._graphs.turn.sub_(1)


def wrong_cache(engine, before, out):
    """K、V 写坏了，logits 也就不对：照常解码要从这一步重写。"""
    engine.decoder.cache.store[:, :3, :, :40] += 1
    out.add_(1.0)


SPOILS = [stale_ids, other_ids, wrong_row, wrong_logp, nan_logp, nan_logits, stale_state, twice, neighbour]
SPOILS += [unseen, stuck_turn]


def refuses(engine):
    def recorder(run):
        run()
        raise RuntimeError("operation not permitted when stream is capturing\n第二行不要")

    return recorder


def raises_in_replay(engine):
    def recorder(run):
        def replay():
            run()
            raise RuntimeError("CUDA error: 重放失败")

        return replay, run()

    return recorder


def nothing(engine):
    return lambda run: ((lambda: None), run())


def dead_from_second(engine):
    """头一张好好的，第二张起什么也不做。"""
    made = []

    def recorder(run):
        made.append(1)
        return replayable(run) if len(made) == 1 else ((lambda: None), run())

    return recorder


def right_by_chance(engine):
    """词元从不写进台账，而台账里恰好已经是对的。"""

    def recorder(run):
        out, state, graphs = run(), engine._state, engine._graphs
        before = state.snapshot(4)
        graphs.count.fill_(3)
        run()
        state.restore(before)

        def replay():
            old = graphs.ids.clone()
            out.copy_(run())
            graphs.ids.copy_(old)

        return replay, out

    return recorder


FAULTS = [*map(spoiled, SPOILS), right_by_chance, refuses, raises_in_replay, nothing, dead_from_second]


def three_rows(engine):
    """三行，都有惩罚，写过两档长度。"""
    for seed, prompt in enumerate(prompts_of([4, 9, 30])):
        params = SamplingParams(temperature=0.9, repetition_penalty=1.2, seed=seed)
        engine.add_request(prompt, params, 50)
    return [(key, one.ids, one.logprobs) for key, one in sorted(drain(engine).items())]


@pytest.mark.parametrize("stride", [1, 4])
@pytest.mark.parametrize(
    "fault", FAULTS, ids=[s.__name__ for s in SPOILS] + [f.__name__ for f in FAULTS[len(SPOILS) :]]
)
def test_录得不对或录不成_说一句_此后照常解码_文字不变(fault, stride, caplog):
    model = tiny(max_position_embeddings=200)
    engine, plain = (Engine(model, eos_ids=(), max_slots=4) for _ in range(2))
    plain.decoder.use_slots()
    graphed(engine, fault(engine), stride)
    got, want = three_rows(engine), three_rows(plain)
    assert [one[:2] for one in got] == [one[:2] for one in want]
    for one, other in zip(got, want):
        torch.testing.assert_close(torch.tensor(one[2]), torch.tensor(other[2]), atol=1e-5, rtol=0)
    said = [record.message for record in caplog.records if "录成图" in record.message]
    assert len(said) == 1 and "照常解码" in said[0] and "第二行" not in said[0]
    assert not engine._graphs.graphs and engine._graphs.trouble


@pytest.mark.parametrize("name", ["v2", "moe"])
def test_专家的定形写法不对_也说一句_照路由分组写(name, caplog):
    """权重放错了：逐层比得出；此后不录，也不再用它。"""
    model = tiny(name)
    engine, plain = graphed(Engine(model, eos_ids=(), max_slots=4)), Engine(model, eos_ids=(), max_slots=4)
    plain.decoder.use_slots()
    for layer in engine.decoder.layers:
        if layer.stacked is not None:
            layer.stacked.down.mul_(1.02)
    got, want = three_rows(engine), three_rows(plain)
    assert [one[:2] for one in got] == [one[:2] for one in want]
    assert ("专家" in engine._graphs.trouble) == (name == "moe")
    assert len([r for r in caplog.records if "录成图" in r.message]) == (name == "moe")
    assert engine.decoder.steady == (name != "moe")


def test_缓存写坏了的一步_照常解码时重写():
    """从前录坏的一步只丢掉它的 logits，它写下的 K、V 留着给后面的看。"""
    model = tiny(max_position_embeddings=200)

    def bad_cache(run):
        out = run()

        def replay():
            run()
            engine.decoder.cache.store[:, :3, :, 30] = 7.0  # 最长一行这一步写的位置
            out.fill_(0.0)

        return replay, out

    for only_logits in (False, True):
        engine, plain = (Engine(model, eos_ids=(), max_slots=4) for _ in range(2))
        plain.decoder.use_slots()
        graphed(engine, bad_cache)
        if only_logits:
            logits_only(engine)
        for one in (engine, plain):
            for seed, prompt in enumerate(prompts_of([30, 30, 30])):
                one.add_request(prompt, SamplingParams(temperature=1.0, seed=seed), 20)
        got, want = drain(engine), drain(plain)
        assert engine._graphs.trouble
        assert {k: v.ids for k, v in got.items()} == {k: v.ids for k, v in want.items()}


# ---------------------------------------------------------------- 作废、几条规则、占多少


def test_状态换了地方就重录_文字不变():
    """随机数的表加长、头一次有重复惩罚：旧的图读写的是旧张量。"""
    model = tiny(max_position_embeddings=200)
    engine, plain = (
        graphed(Engine(model, eos_ids=(), max_slots=4), stride=2),
        Engine(model, eos_ids=(), max_slots=4),
    )
    texts = []
    for one in (engine, plain):
        found = []
        for limit, rule in ((6, RULE_POOL[1]), (90, RULE_POOL[1]), (20, RULE_POOL[4]), (20, RULE_POOL[1])):
            for seed, prompt in enumerate(prompts_of([4, 9, 30])):
                one.add_request(prompt, with_seed(rule, seed), limit)
            found += [s.ids for _, s in sorted(drain(one).items())]
        texts.append(found)
    assert texts[0] == texts[1] and not engine._graphs.trouble
    assert engine._state.uniforms.shape[1] >= 90 and engine._state.seen is not None


def test_规则至多记几条_满了照常抽_久没用的让位(monkeypatch):
    assert RULES == 4 and PATIENCE >= 100
    monkeypatch.setattr(cuda_graph, "PATIENCE", 60)
    model = tiny(max_position_embeddings=200)
    engine, plain = graphed(Engine(model, eos_ids=(), max_slots=2)), Engine(model, eos_ids=(), max_slots=2)
    rules = [SamplingParams(temperature=0.5 + 0.1 * i) for i in range(7)]

    def ask(index, limit=8):
        texts = []
        for one in (engine, plain):
            one.add_request(prompts_of([5])[0], with_seed(rules[index], 3), limit)
            texts.append([s.ids for s in drain(one).values()])
        assert texts[0] == texts[1]
        return {key[2] for key in engine._graphs.graphs if len(key) == 3}

    for index in range(4):
        kept = ask(index)
    assert kept == set(rules[:4])
    assert ask(4) == set(rules[:4]), "满了：第五条照常抽"
    for _ in range(9):
        kept = ask(3)
    assert ask(5) == {*rules[1:4], rules[5]}, "头一条最久没用，让位"
    assert len(engine._graphs.rules) == RULES and not engine._graphs.trouble


def test_带抽样的图核对完不留logits_只录logits的共用一份():
    """从前每档一份 ``[行数, V]``：强化学习的几十档加起来上百 MB。"""
    held = []

    def letting_go(run):
        """图不拿着结果：结果还有人要才写回去，与显卡的内存池一样。"""
        strong = run()
        out = weakref.ref(strong)
        held.append(out)

        def replay():
            fresh, old = run(), out()
            if old is not None and old is not fresh:
                old.copy_(fresh)

        return replay, strong

    model = tiny(max_position_embeddings=200)
    engine = graphed(Engine(model, eos_ids=(), max_slots=9), letting_go)
    for limit in (3, 20, 60, 90, 120):
        engine.add_request(prompts_of([4])[0], with_seed(RULE_POOL[1], limit), limit, n=2)
    drain(engine)
    graphs = engine._graphs
    assert len(held) >= 5 and len(graphs.graphs) >= 3 and not graphs.trouble
    assert all(one() is None for one in held) and not graphs.logits.numel()
    for seed in range(3):
        engine.add_request(prompts_of([4])[0], with_seed(RULE_POOL[seed], seed), 60 * seed + 5)
    drain(engine)
    outs = [graph.out for key, graph in graphs.graphs.items() if len(key) == 2]
    assert len(outs) >= 2 and {one.data_ptr() for one in outs} == {graphs.logits.data_ptr()}
    assert graphs.logits.shape == (9, 64)


class Launches(TorchDispatchMode):
    """数算子；重放里面的不算，那是一次发射。"""

    def __init__(self):
        super().__init__()
        self.count, self.inside = 0, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.inside and not func.is_view:
            self.count += 1
        return func(*args, **(kwargs or {}))


def launches_per_token(rule, whole, stride=8, tokens=64):
    """稳定地写的时候，主机每个词元发几个算子（看视图的不算），重放算一个。"""
    counter = Launches()

    def recorder(run):
        replay, out = replayable(run)

        def counted():
            counter.count, counter.inside = counter.count + 1, True
            replay()
            counter.inside = False

        return counted, out

    engine = graphed(Engine(tiny(max_position_embeddings=300), eos_ids=(), max_slots=4), recorder, stride)
    if not whole:
        logits_only(engine)
    for _ in range(2):
        for seed, prompt in enumerate(prompts_of([65, 70, 80])):
            engine.add_request(prompt, with_seed(rule, seed), tokens + 1)
        engine.step()
        for _ in range(tokens // stride - 2):  # 头一步与末一步之间
            counter.count = 0
            with counter:
                engine.step()
        found = counter.count / stride
        drain(engine)
    return found


@pytest.mark.parametrize("rule", RULE_POOL)
def test_主机每个词元发射的算子(rule):
    """八步对一次账。与层数、词表无关，26M 也是这么多：重放一次，每段另有两个（有几行、从第几步记起）。"""
    before, after = launches_per_token(rule, False), launches_per_token(rule, True)
    assert after == 1.25 and before >= (13 if rule.greedy else 40)


# ---------------------------------------------------------------- 显卡


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="没有 CUDA 显卡")
@pytest.mark.parametrize("name", ["v2", "v3moe"])
@pytest.mark.parametrize("rule", RULE_POOL)
def test_显卡上整步录制_与只录logits的文字相同(name, rule):
    """同样的形状、同样的核，只差谁来发射。"""
    model = any_model(name).cuda()
    texts = []
    for whole in (True, False):
        engine = Engine(model, eos_ids={5, 9}, max_slots=6, prefill_chunk=16, stride=4, cuda_graphs=True)
        if not whole:
            logits_only(engine)
        for seed, prompt in enumerate(prompts_of([40, 3, 26, 60, 9])):
            engine.add_request(prompt, with_seed(rule, seed), 30, n=2)
        texts.append({key: one.ids for key, one in drain(engine).items()})
        assert not engine._graphs.trouble and {len(key) for key in engine._graphs.graphs} == {
            3 if whole else 2
        }
    assert texts[0] == texts[1]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="没有 CUDA 显卡")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["v2", "moe", "v3moe"])
def test_显卡上半精度也录得成_核对得过(name, dtype):
    model = any_model(name).to("cuda", dtype)
    engine = Engine(model, eos_ids=(), max_slots=24, stride=8)
    for rule in RULE_POOL:
        for seed, prompt in enumerate(prompts_of([40, 3, 26, 60, 9])):
            engine.add_request(prompt, with_seed(rule, seed), 30, n=5)
        assert all(len(one.ids) == 30 for one in drain(engine).values())
    assert engine._graphs.graphs and not engine._graphs.trouble
