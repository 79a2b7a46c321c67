"""一步解码的编译版：与照常的一步相同，换行数、换长度不重编译，编译不了就录照常的。真的录制有卡才测。"""

import copy

import pytest
import torch
import torch._dynamo
from engine_helpers import any_model, drain, pinned, prompts_of, tiny

from minimind.inference import compiled_step, cuda_graph
from minimind.inference.compiled_step import FEW_ROWS, CompiledStep, attend_few, fits, gated, rotate_and_store
from minimind.inference.cuda_graph import GraphedDecode
from minimind.inference.engine import Engine
from minimind.inference.int8 import quantize_int8
from minimind.inference.sampling import GREEDY, SamplingParams

DENSE = ["v2", "v3", "Llama", "Qwen3"]


@pytest.fixture(autouse=True)
def captured(monkeypatch):
    """只捕获图、不生成代码：图断在哪里、重编译几次与 inductor 的相同，省下半分钟。"""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(cuda_graph, "CompiledStep", lambda decoder: CompiledStep(decoder, backend="eager"))
    yield
    torch._dynamo.reset()


def compiled(engine):
    """录的是编译版的引擎（替身）。"""
    engine._graphs = GraphedDecode(engine.decoder, engine.max_slots, pinned(engine), compile=True)
    return engine


def write(engine, lengths=(40, 3, 26, 60, 9), n=4):
    for index, prompt in enumerate(prompts_of(lengths)):
        params = GREEDY if index % 2 else SamplingParams(temperature=1.0, seed=index)
        engine.add_request(prompt, params, 20, n=n)
    return {key: (s.ids, torch.tensor(s.logprobs)) for key, s in drain(engine).items()}


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("slots", [1, 3, 20])
def test_与照常解码相同(name, slots):
    model, options = any_model(name), {"eos_ids": {5, 9}, "max_slots": slots}
    engine = compiled(Engine(model, **options))
    got, want = write(engine), write(Engine(model, **options))
    assert engine._graphs.compiled is not None and engine._graphs.graphs
    assert got.keys() == want.keys()
    for key, (ids, logprobs) in got.items():
        assert ids == want[key][0]
        torch.testing.assert_close(logprobs, want[key][1], atol=2e-5, rtol=0)


def test_换行数换长度不重编译():
    engine = compiled(Engine(tiny(max_position_embeddings=512), eos_ids=(), max_slots=20))
    write(engine, lengths=(3,), n=1)
    write(engine, lengths=(4, 4, 4), n=1)
    write(engine, lengths=(4, 4, 4), n=5)
    made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    # 旋转写缓存、几行的注意力、门控各一个；只有一行的另编
    assert 3 <= made <= 6
    write(engine, lengths=(150, 7, 90, 33), n=3)
    write(engine, lengths=(300, 12), n=2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == made
    assert torch._dynamo.utils.counters["graph_break"] == {}


def test_几行的注意力_与标准的相同_看不到自己之后的():
    generator = torch.Generator().manual_seed(0)
    q, key, value = (torch.randn(3, 2, n, 8, generator=generator) for n in (4, 10, 10))
    positions = torch.tensor([0, 4, 9])
    value[0, :, 1:] = 1e9  # 看了就看得出
    got = attend_few(q, key, value, positions)
    visible = torch.arange(10) <= positions[:, None]
    want = torch.nn.functional.scaled_dot_product_attention(q, key, value, visible[:, None, None])
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[0], value[0, :, :1].expand(2, 4, 8))


def test_旋转与门控_手算():
    qkv = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]])  # 一个查询头，一个键值头
    cos, sin = torch.tensor([[[0.5, 0.5]]]), torch.tensor([[[-2.0, 2.0]]])
    target = torch.zeros(1, 2, 4, 2)
    q = rotate_and_store(qkv, None, 1e-6, (cos, sin), target, torch.tensor([2]), 1)
    assert q.tolist() == [[[1 * 0.5 - 2 * 2, 2 * 0.5 + 1 * 2]]]
    assert target[0, :, 2].tolist() == [[3 * 0.5 - 4 * 2, 4 * 0.5 + 3 * 2], [5.0, 6.0]]
    assert target[:, :, [0, 1, 3]].abs().sum() == 0
    torch.testing.assert_close(
        gated(torch.tensor([[0.0, 2.0, 7.0, 3.0]])), torch.tensor([[0.0, 2 / (1 + 2.718281828**-2) * 3]])
    )


def test_混合专家_int8_叠了LoRA的不编译():
    def decoder(model, **options):
        return Engine(model, eos_ids=(), **options).decoder

    assert fits(decoder(tiny())) and fits(decoder(tiny("v3"), dtype=torch.bfloat16))
    assert not fits(decoder(tiny("moe")))
    assert not fits(decoder(quantize_int8(copy.deepcopy(tiny()))))
    engine = Engine(tiny("moe"), eos_ids=(), max_slots=3)
    assert compiled(engine)._graphs.compiled is None
    assert write(engine) and not engine._graphs.trouble


def refuses(self, *args):
    raise RuntimeError("没有编译器\n第二行")


def wrong(self, tokens, positions, used):
    return self.decoder.walk(tokens, positions, used, True) * 1.5 + 1


@pytest.mark.parametrize("step", [refuses, wrong])
def test_编译不了或算得不对_说一句_改录照常的(monkeypatch, caplog, step):
    monkeypatch.setattr(CompiledStep, "__call__", step)
    model = tiny()
    engine = compiled(Engine(model, eos_ids=(), max_slots=4))
    got, want = write(engine), write(Engine(model, eos_ids=(), max_slots=4))
    assert {key: ids for key, (ids, _) in got.items()} == {key: ids for key, (ids, _) in want.items()}
    said = [record.message for record in caplog.records]
    assert len(said) == 1 and "改录不编译的" in said[0] and "第二行" not in said[0]
    assert engine._graphs.graphs and not engine._graphs.trouble and engine._graphs.compiled is None


def test_引擎_服务_采样_都传到录制的地方(monkeypatch):
    from minimind.rl.conversations import EngineWriter
    from minimind.rl.rollout import LocalRollout
    from minimind.serve.cli import EngineArguments
    from minimind.serve.runner import EngineRunner
    from minimind.tokenizer import load_tokenizer

    asked = []
    original = Engine.__init__

    def spy(self, *args, compile=False, **options):
        asked.append(compile)
        original(self, *args, compile=compile, **options)

    monkeypatch.setattr(Engine, "__init__", spy)
    model, tokenizer = tiny(), load_tokenizer()
    for wanted in (False, True):
        LocalRollout(model, tokenizer, max_new_tokens=4, compile=wanted)
        EngineWriter(model, tokenizer, max_slots=2, room=8, temperature=1.0, dtype=None, compile=wanted)
        EngineRunner(model, set(), max_slots=2, max_queue=2, max_length=8, compile=wanted)
    assert asked == [False] * 3 + [True] * 3
    assert EngineArguments().use_compile == 0, "头一次要等，问了才编译"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v2", "v3"])
def test_真的生成代码_与照常解码相同(monkeypatch, name):
    monkeypatch.setattr(cuda_graph, "CompiledStep", CompiledStep)
    model, options = any_model(name), {"eos_ids": (), "max_slots": 12}
    engine = compiled(Engine(model, **options))
    got, want = write(engine, n=3), write(Engine(model, **options), n=3)
    assert engine._graphs.compiled is not None
    for key, (ids, logprobs) in got.items():
        assert ids == want[key][0]
        torch.testing.assert_close(logprobs, want[key][1], atol=2e-5, rtol=0)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="没有 CUDA 显卡")
@pytest.mark.parametrize("name", ["v2", "v3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_显卡上录编译过的_与不录制的相同(monkeypatch, name, dtype):
    monkeypatch.setattr(cuda_graph, "CompiledStep", CompiledStep)
    model = any_model(name).to("cuda", dtype)
    options = {"eos_ids": (), "max_slots": 12, "stride": 4}
    engine = Engine(model, compile=True, **options)
    got = write(engine, n=3)
    assert engine._graphs.compiled is not None and engine._graphs.graphs and not engine._graphs.trouble
    want = write(Engine(model, cuda_graphs=False, **options), n=3)
    if dtype == torch.float32:
        assert {key: ids for key, (ids, _) in got.items()} == {key: ids for key, (ids, _) in want.items()}
    rows = FEW_ROWS + 4
    with torch.inference_mode():
        tokens, positions = torch.randint(3, 60, (rows,), device="cuda"), torch.arange(rows, device="cuda")
        plain = engine.decoder.walk(tokens, positions, 64, True)
        for count in (1, 3, rows):
            one = compiled_step.CompiledStep(engine.decoder)(tokens[:count], positions[:count], 64)
            gap = float((one.float() - plain[:count].float()).abs().max() / plain.float().abs().max())
            assert gap < (1e-4 if dtype == torch.float32 else 5e-2)
