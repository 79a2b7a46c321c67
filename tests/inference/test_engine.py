"""推理引擎：连续批处理不改变任何一个样本；对数概率是真的；提示只算一次；种子说了算。"""

from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from engine_helpers import drain, hf_model, prompts_of, tiny

from minimind.errors import UserError
from minimind.inference.decoder import ForwardDecoder, FusedDecoder
from minimind.inference.engine import Engine, Request
from minimind.inference.sampling import GREEDY, SamplingParams

EOS = {5, 9, 20, 23, 33}  # 常抽到的几个，长短才会参差


@pytest.fixture(scope="module", params=["v2", "v3", "moe", "v3moe"])
def model(request):
    return tiny(request.param)


@torch.no_grad()
def full_logprobs(model, sequence, temperature=1.0):
    """整段一次前向算出的对数概率，没有缓存。"""
    ids = torch.tensor([sequence.prompt_ids + sequence.ids])
    logp = (model(input_ids=ids).logits[0].float() / temperature).log_softmax(-1)
    start = len(sequence.prompt_ids) - 1
    return logp[start : start + len(sequence.ids)].gather(1, torch.tensor(sequence.ids)[:, None])[:, 0]


@pytest.mark.compat
def test_贪心与模型自己的generate逐个相同(model):
    prompts = prompts_of([3, 11, 1, 20, 7])
    engine = Engine(model, eos_ids=(), max_slots=2)
    for prompt in prompts:
        engine.add_request(prompt, GREEDY, 12)
    done = drain(engine)
    for i, prompt in enumerate(prompts):
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert done[i, 0].ids == out[0, len(prompt) :].tolist()
        assert done[i, 0].finished == "length"


@pytest.mark.parametrize("temperature", [0.6, 1.0])
@pytest.mark.compat
def test_对数概率等于整段前向(model, temperature):
    engine = Engine(model, eos_ids=EOS, max_slots=5)
    for i, prompt in enumerate(prompts_of([3, 17, 9, 1])):
        engine.add_request(prompt, SamplingParams(temperature=temperature, seed=i), 30, n=3)
    done = drain(engine)
    assert len(done) == 12 and len({len(s.ids) for s in done.values()}) > 3
    for sequence in done.values():
        want = full_logprobs(model, sequence, temperature)
        torch.testing.assert_close(torch.tensor(sequence.logprobs), want, atol=1e-4, rtol=0)
        stopped = sequence.ids[-1] in EOS
        assert sequence.finished == ("stop" if stopped else "length")
        assert not EOS & set(sequence.ids[:-1])


def test_同一个种子同一段文字_不管同时还有谁(model):
    params = SamplingParams(temperature=1.0, seed=123)
    prompt = prompts_of([6])[0]
    alone = Engine(model, eos_ids={5}, max_slots=1)
    alone.add_request(prompt, params, 40)
    want = drain(alone)[0, 0].ids
    crowd = Engine(model, eos_ids={5}, max_slots=4)
    for i, other in enumerate(prompts_of([2, 13, 8])):
        crowd.add_request(other, SamplingParams(temperature=0.7, top_k=8, seed=i), 15, n=2)
    for _ in range(3):
        crowd.step()
    mine = crowd.add_request(prompt, params, 40)
    crowd.add_request(prompt, SamplingParams(temperature=0.0), 5)
    assert drain(crowd)[mine, 0].ids == want


def test_没有种子时各次不同(model):
    engine = Engine(model, eos_ids=())
    for _ in range(2):
        engine.add_request([5, 6], SamplingParams(temperature=1.0), 20)
    done = drain(engine)
    assert done[0, 0].ids != done[1, 0].ids


def test_同一个提示只算一次_槽位不够时也是(monkeypatch):
    model, read = tiny(), []
    engine = Engine(model, eos_ids={5}, max_slots=3)
    real = engine.decoder.prefill

    def spy(prompts, slots, starts):
        read.extend(map(tuple, prompts))
        return real(prompts, slots, starts)

    monkeypatch.setattr(engine.decoder, "prefill", spy)
    prompts = prompts_of([9, 4])
    for i, prompt in enumerate(prompts):
        engine.add_request(prompt, SamplingParams(temperature=1.0, seed=i), 12, n=5)
    done = drain(engine)
    assert sorted(read) == sorted(map(tuple, prompts))
    roomy = Engine(model, eos_ids={5}, max_slots=10)
    for i, prompt in enumerate(prompts):
        roomy.add_request(prompt, SamplingParams(temperature=1.0, seed=i), 12, n=5)
    assert {key: s.ids for key, s in drain(roomy).items()} == {key: s.ids for key, s in done.items()}


def test_写完的行立刻让位(monkeypatch):
    """同时在写的从不超过槽位，空出的槽位下一步就有人用。"""
    engine, widths = Engine(tiny(), eos_ids=(), max_slots=2), []
    real = engine.decoder.decode
    monkeypatch.setattr(
        engine.decoder, "decode", lambda t, p, n: (widths.append((len(t), list(n))), real(t, p, n))[1]
    )
    for limit in (2, 8, 3, 2):
        engine.add_request([5, 6, 7], GREEDY, limit)
    drain(engine)
    assert [rows for rows, _ in widths] == [2] * 4 + [1] * 3
    assert all(max(lengths) < 3 + 8 for _, lengths in widths), "注意力只看用到的长度"


def test_取消_排队的与在写的(model):
    engine = Engine(model, eos_ids=(), max_slots=2)
    prompts = prompts_of([4, 6, 3])
    ids = [engine.add_request(prompt, GREEDY, 10) for prompt in prompts]
    engine.step()
    engine.cancel(ids[0])
    engine.cancel(ids[2])
    assert len(engine.running) == 1
    done = drain(engine)
    assert [done[i, 0].finished for i in ids] == ["cancelled", "length", "cancelled"]
    assert len(done[ids[0], 0].ids) == 2 and done[ids[2], 0].ids == []
    alone = Engine(model, eos_ids=())
    alone.add_request(prompts[1], GREEDY, 10)
    assert drain(alone)[0, 0].ids == done[ids[1], 0].ids, "别人被取消不该影响留下的"
    assert not engine.has_unfinished and engine.running == []


def test_缓存长大不丢内容(model):
    """起始容量 64 个位置，写到 90 要翻倍一次。"""
    engine = Engine(model, eos_ids=())
    engine.add_request(prompts_of([10])[0], SamplingParams(temperature=1.0, seed=1), 80)
    sequence = drain(engine)[0, 0]
    assert len(sequence.ids) == 80
    want = full_logprobs(model, sequence)
    torch.testing.assert_close(torch.tensor(sequence.logprobs), want, atol=1e-4, rtol=0)


def test_每几步才对一次账_结果不变():
    """卡上的走法：写出结束符的行陪跑到对账，多写的丢掉。"""
    model = tiny()

    def write(stride):
        engine = Engine(model, eos_ids={5, 9, 11}, max_slots=4)
        engine.stride = stride
        for i, prompt in enumerate(prompts_of([3, 8, 5])):
            engine.add_request(prompt, SamplingParams(temperature=1.0, seed=i), 21, n=3)
        return {key: (s.ids, s.finished) for key, s in drain(engine).items()}

    assert write(8) == write(1)


def test_换了权重_刷新之后跟得上(model):
    import copy

    changed = copy.deepcopy(model)
    engine = Engine(changed, eos_ids=())
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(1.1)
    engine.refresh()
    engine.add_request([5, 6, 7], SamplingParams(temperature=1.0, seed=1), 10)
    sequence = drain(engine)[0, 0]
    want = full_logprobs(changed, sequence)
    torch.testing.assert_close(torch.tensor(sequence.logprobs), want, atol=1e-4, rtol=0)


def test_训练状态与dropout不影响采样():
    model = tiny(dropout=0.5)
    runs = []
    for training in (True, False):
        engine = Engine(model.train(training), eos_ids=())
        engine.add_request([5, 6, 7], GREEDY, 10)
        runs.append(drain(engine)[0, 0].ids)
    assert runs[0] == runs[1]


def test_yarn外推():
    model = tiny(inference_rope_scaling=True, rope_scaling={"original_max_position_embeddings": 16})
    engine = Engine(model, eos_ids=())
    engine.add_request(prompts_of([20])[0], SamplingParams(temperature=1.0, seed=1), 30)
    sequence = drain(engine)[0, 0]
    want = full_logprobs(model, sequence)
    torch.testing.assert_close(torch.tensor(sequence.logprobs), want, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "decoder"), [("Llama", FusedDecoder), ("Qwen3", FusedDecoder), ("Qwen2", ForwardDecoder)]
)
def test_别家的模型_同构的走快路_其余走forward(name, decoder):
    model = hf_model(name)
    engine = Engine(model, eos_ids={5}, max_slots=3)
    assert type(engine.decoder) is decoder
    for i, prompt in enumerate(prompts_of([4, 12, 7])):
        engine.add_request(prompt, SamplingParams(temperature=0.8, seed=i), 10, n=2)
    done = drain(engine)
    assert len(done) == 6
    for sequence in done.values():
        want = full_logprobs(model, sequence, 0.8)
        torch.testing.assert_close(torch.tensor(sequence.logprobs), want, atol=1e-4, rtol=0)


def test_半精度的采样与自动混合精度的训练一致():
    """权重 fp32、计算 bf16：残差仍是 fp32，对数概率只差 bf16 的舍入。"""
    model = tiny()
    engine = Engine(model, eos_ids=(), dtype=torch.bfloat16)
    engine.add_request([5, 6, 7], SamplingParams(temperature=1.0, seed=1), 12)
    sequence = drain(engine)[0, 0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = full_logprobs(model, sequence)
    assert (torch.tensor(sequence.logprobs) - want).abs().mean() < 0.1


def test_提示不合适_说清楚():
    engine = Engine(tiny(), eos_ids=())
    with pytest.raises(UserError, match=r"提示有 96 个 token.*只有 96 个"):
        engine.add_request([5] * 96, GREEDY, 4)
    with pytest.raises(UserError, match="没有任何 token"):
        engine.add_request([], GREEDY, 4)
    with pytest.raises(ValueError, match="至少为 1"):
        engine.add_request([5], GREEDY, 0)
    assert not engine.has_unfinished


def test_一个请求从排队到写着的一行是同一份记录_谁也改不了(model):
    request = Request([5, 6, 7], SamplingParams(temperature=1.0, seed=1), 10**6, n=2, top_logprobs=1)
    engine = Engine(model, eos_ids=set(), max_slots=4)
    engine.add(request)
    engine.step()
    held = [row.request for row in engine._rows]
    room = model.config.max_position_embeddings - 3
    assert held[0] is held[1] and held[0] == replace(request, limit=room), "只有上限随上下文收紧"
    with pytest.raises(FrozenInstanceError):
        request.limit = 1
    engine.cancel(0)
    short = Engine(model, eos_ids=set(), max_slots=4)
    number = short.add_request([5, 6, 7], request.params, 6, n=2, top_logprobs=1)
    same = Engine(model, eos_ids=set(), max_slots=4)
    assert same.add(replace(request, limit=6)) == number
    mine, theirs = drain(short), drain(same)
    assert {key: (one.ids, one.top) for key, one in mine.items()} == {
        key: (one.ids, one.top) for key, one in theirs.items()
    }
    with pytest.raises(TypeError, match="top_logprob"):
        short.add_request([5], request.params, 1, top_logprob=1)
