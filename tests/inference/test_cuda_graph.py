"""录制的解码：凑档、补的行与作废在 CPU 上用不录的替身测；真的录制有卡才测。"""

import copy
import inspect
import weakref

import pytest
import torch
from engine_helpers import any_model, drain, graphed, prompts_of, replayable, tiny

from minimind.inference import cuda_graph
from minimind.inference.cuda_graph import GraphedDecode, length_bucket, row_bucket
from minimind.inference.engine import Engine
from minimind.inference.sampling import GREEDY, SamplingParams
from minimind.serve.cli import EngineArguments


def write(engine, rounds=1):
    """参差的一批：长短、个数、贪心与抽样都有，前后两轮。"""
    texts = []
    for turn in range(rounds):
        for index, prompt in enumerate(prompts_of([40, 3, 26, 60, 9], seed=turn)):
            params = GREEDY if index % 2 else SamplingParams(temperature=1.0, seed=index)
            engine.add_request(prompt, params, 20, n=2)
        texts += [(key, s.ids) for key, s in sorted(drain(engine).items())]
    return texts


def test_凑档_单调_够用_浪费有限():
    assert [row_bucket(n, 48) for n in (1, 2, 3, 5, 8, 9, 17, 33, 48)] == [1, 2, 4, 8, 8, 16, 24, 40, 48]
    assert [row_bucket(n, 6) for n in (3, 5, 6)] == [4, 6, 6]
    buckets = [length_bucket(n) for n in range(1, 9000)]
    assert buckets == sorted(buckets) and len(set(buckets)) <= 30
    for used, bucket in enumerate(buckets, start=1):
        assert used <= bucket <= max(64, used * 1.25 + 64) and bucket % 64 == 0


@pytest.mark.parametrize("name", ["v2", "v3", "moe", "v3moe", "Llama", "Qwen3"])
@pytest.mark.parametrize("slots", [1, 3, 16])
@pytest.mark.parametrize("chunk", [None, 7])
def test_与照常解码逐个相同(name, slots, chunk):
    """补的行不碰读到一半的提示，也不碰以后要用的位置。"""
    model = any_model(name)
    options = {"max_slots": slots, "prefill_chunk": chunk, "prefix_cache_tokens": 128}
    engine = graphed(Engine(model, eos_ids={5, 9}, **options))
    assert write(engine, 2) == write(Engine(model, eos_ids={5, 9}, **options), 2)
    assert len(engine._graphs.graphs) >= 1


def test_补的行不碰读到一半的提示():
    """四个槽位三行在写，补的第四行正是长提示暂住的槽位；一块 8 个，读到容量边上（64）时也停一次。"""
    model, (long, *short) = tiny(), prompts_of([70, 4, 4, 4, 4])

    def run(engine):
        for index, prompt in enumerate(short):
            engine.add_request(prompt, GREEDY, 5 if index == 0 else 30)
        while len(engine.running) != 3 or engine._admission.queue:
            engine.step()
        engine.add_request(long, GREEDY, 6)
        return drain(engine)[4, 0].logprobs

    options = {"eos_ids": (), "max_slots": 4, "prefill_chunk": 8}
    got, want = run(graphed(Engine(model, **options))), run(Engine(model, **options))
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want), atol=1e-5, rtol=0)


@pytest.mark.parametrize("chunk", [8, 63, 64, 127, 128, 191])
@pytest.mark.parametrize("length", [129, 193, 300])
def test_补的行不碰读到一半的提示_读到容量边上的各种长度(length, chunk):
    """补的行从前写在容量的最后一个位置：129 个词元的提示，对数概率差 0.136；300 个的，文字都变了。"""
    model = tiny(max_position_embeddings=512)
    short, long = prompts_of([4], seed=2)[0], prompts_of([length], seed=3)[0]

    def run(engine):
        for _ in range(3):
            engine.add_request(short, GREEDY, 150)
        while len(engine.running) != 3:
            engine.step()
        engine.add_request(long, GREEDY, 6)
        done = drain(engine)[3, 0]
        return done.ids, torch.tensor(done.logprobs)

    options = {"eos_ids": (), "max_slots": 4, "prefill_chunk": chunk}
    got, want = run(graphed(Engine(model, **options))), run(Engine(model, **options))
    assert got[0] == want[0]
    torch.testing.assert_close(got[1], want[1], atol=1e-5, rtol=0)


def test_补的行写的那一列_谁也不读():
    """那一列写成 NaN，结果也不变：掩掉的 NaN 还是 NaN，读了就看得出。"""
    engine = graphed(Engine(tiny(), eos_ids=(), max_slots=4))
    engine.decoder.reserve(0, 96)
    cache = engine.decoder.cache
    walk, padded = engine.decoder.walk, []

    def spy(tokens, positions, used, ragged):
        assert used <= cache.capacity
        if len(tokens) == 4:
            padded.append(positions[3:].tolist())
        return walk(tokens, positions, used, ragged)

    engine.decoder.walk = spy
    cache.store[:, :, :, cache.capacity :] = float("nan")
    prompts = prompts_of([5, 9, 40])
    for prompt in prompts:
        engine.add_request(prompt, GREEDY, 8)
    done = drain(engine)
    plain = Engine(tiny(), eos_ids=(), max_slots=4)
    for prompt in prompts:
        plain.add_request(prompt, GREEDY, 8)
    assert {k: s.ids for k, s in done.items()} == {k: s.ids for k, s in drain(plain).items()}
    assert padded and all(one == [cache.capacity] for one in padded), "补的行确实写在那一列"


def test_图全部作废之后_不再往销毁了的内存池里录(monkeypatch):
    """替身照显卡的规矩：一个池子里录过的图都没了，池子就没了，再往里录是错。"""

    class Recorder:
        pools = 0

        def __init__(self, device):
            Recorder.pools += 1
            self.graphs = None

        def __call__(self, run):
            assert self.graphs is None or len(self.graphs), "池子已经销毁"
            replay, out = replayable(run)
            self.graphs = weakref.WeakSet() if self.graphs is None else self.graphs
            self.graphs.add(replay)
            return replay, out

    monkeypatch.setattr(cuda_graph, "CudaRecorder", Recorder)
    engine = Engine(tiny(max_position_embeddings=400), eos_ids=(), max_slots=2)
    engine._graphs = GraphedDecode(engine.decoder, 2)
    engine.add_request(prompts_of([10])[0], GREEDY, 300)
    drain(engine)
    engine.refresh()
    engine.add_request(prompts_of([10])[0], GREEDY, 5)
    drain(engine)
    assert Recorder.pools >= 3, "长大与换权重各换一个"


def test_缓存长大与换了权重都重录():
    model = copy.deepcopy(tiny(max_position_embeddings=400))
    engine = graphed(Engine(model, eos_ids=(), max_slots=2))
    engine.add_request(prompts_of([10])[0], GREEDY, 300)
    got = drain(engine)[0, 0].ids
    plain = Engine(model, eos_ids=(), max_slots=2)
    plain.add_request(prompts_of([10])[0], GREEDY, 300)
    assert got == drain(plain)[0, 0].ids
    assert engine.decoder.cache.capacity > 310
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)
    model.lm_head.weight.data = model.lm_head.weight.data.clone()
    engine.refresh()
    assert engine._graphs.graphs == {}
    plain = Engine(model, eos_ids=(), max_slots=2)
    assert [ids for _, ids in write(engine)] == [ids for _, ids in write(plain)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["v2", "moe", "Qwen3"])
def test_权重就地变了_图照用_写的是新权重的(name, dtype, monkeypatch):
    """强化学习每一步都换权重：重录一遍要几十张图。"""
    monkeypatch.setattr("minimind.inference.linear.packing_available", lambda dtype: False)
    model = copy.deepcopy(any_model(name))
    engine = graphed(Engine(model, eos_ids=(), max_slots=4, dtype=dtype))
    before = write(engine)
    graphs = dict(engine._graphs.graphs)
    assert graphs
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    engine.refresh()
    after = [ids for _, ids in write(engine)]
    assert all(engine._graphs.graphs[key] is graph for key, graph in graphs.items()), "一张也没有重录"
    fresh = graphed(Engine(model, eos_ids=(), max_slots=4, dtype=dtype))
    assert after == [ids for _, ids in write(fresh)] and after != [ids for _, ids in before]


def broken(run):
    """录出来的是错的：重放时各行挪了一位。"""
    out = run()
    return (lambda: out.copy_(run().roll(1, -1))), out


def stale(run):
    """重放什么也不做：还是录制时的那一遍。"""
    return (lambda: None), run()


def nan(run):
    out = run()
    return (lambda: out.fill_(float("nan"))), out


def refuses(run):
    raise RuntimeError("operation not permitted when stream is capturing\n第二行不要")


@pytest.mark.parametrize("recorder", [broken, stale, nan, refuses])
def test_录得不对或录不成_说一句_此后照常解码_结果不变(recorder, caplog):
    engine, plain = (Engine(tiny(), eos_ids=(), max_slots=4) for _ in range(2))
    engine._graphs = GraphedDecode(engine.decoder, 4, recorder)
    plain.decoder.use_slots()
    assert write(engine, 2) == write(plain, 2)
    said = [record.message for record in caplog.records if "录成图" in record.message]
    assert len(said) == 1 and "照常解码" in said[0] and "第二行" not in said[0]
    assert not engine._graphs.graphs and engine._graphs.trouble


def test_CUDA上默认录_别的设备上不起作用():
    assert inspect.signature(Engine).parameters["cuda_graphs"].default is True
    assert EngineArguments().cuda_graphs == 1
    assert Engine(tiny(), eos_ids=())._graphs is None
    assert Engine(tiny(), eos_ids=(), cuda_graphs=True)._graphs is None
    decoder = Engine(tiny("moe"), eos_ids=()).decoder
    assert decoder.static and not decoder.steady and not decoder.layers[0].stacked.ready, "不录就不另放一份"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="没有 CUDA 显卡")
@pytest.mark.parametrize("name", ["v2", "v3", "moe", "v3moe"])
def test_显卡上录制与不录制文字相同(name):
    model = any_model(name).cuda()
    options = {"eos_ids": {5, 9}, "max_slots": 6, "prefill_chunk": 16, "stride": 4}
    engine = Engine(model, cuda_graphs=True, **options)
    assert write(engine, 2) == write(Engine(model, cuda_graphs=False, **options), 2)
    assert engine._graphs.graphs and not engine._graphs.trouble
