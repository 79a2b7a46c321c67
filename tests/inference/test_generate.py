"""生成循环：与不带缓存的朴素做法逐 token 相同；填充、分批、提前结束都不改变结果。"""

import pytest
import torch
from engine_helpers import hf_model, prompts_of, tiny

from minimind.errors import UserError
from minimind.inference.generate import TextStream, generate_batch, stream_tokens
from minimind.inference.sampling import SamplingParams
from minimind.model import MiniMindConfig, MiniMindForCausalLM

EOS = 2
# 上下文短，好碰到尽头；标准差大，各步的选择才拉得开
SHORT = {"max_position_embeddings": 48, "initializer_range": 0.6}


@pytest.fixture(scope="module", params=["v2", "v3", "moe"])
def model(request):
    return tiny(request.param, **SHORT)


@torch.no_grad()
def naive_greedy(model, prompt, limit, eos=EOS):
    """每步把整段重新算一遍，没有缓存、没有填充。"""
    ids = list(prompt)
    for _ in range(limit):
        token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token == eos:
            break
        ids.append(token)
    return ids[len(prompt) :]


def pick_eos(model, prompts):
    """挑一个确实会在生成中途出现的 token 当结束符，让提前结束的路径被走到。"""
    written = [token for prompt in prompts for token in naive_greedy(model, prompt, 12, eos=-1)[2:8]]
    return max(set(written), key=written.count)


def test_流式生成等于朴素贪心(model):
    for prompt in prompts_of([1, 5, 17]):
        got = list(stream_tokens(model, prompt, max_new_tokens=12, eos_ids={EOS}))
        assert got == naive_greedy(model, prompt, 12)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_整批左填充等于逐条(model, batch_size):
    prompts = prompts_of([3, 11, 3, 7, 1, 20, 9, 2])
    eos = pick_eos(model, prompts)
    results = dict(generate_batch(model, prompts, max_new_tokens=12, eos_ids={eos}, batch_size=batch_size))
    expected = [naive_greedy(model, prompt, 12, eos) for prompt in prompts]
    assert [results[i].ids for i in range(len(prompts))] == expected
    assert [results[i].finished for i in range(len(prompts))] == [len(ids) < 12 for ids in expected]
    assert len({len(ids) for ids in expected}) > 1, "样例里应当有长有短，否则测不到提前结束"


def test_流式与整批在同一采样参数下可复现(model):
    prompt = prompts_of([6])[0]
    params = SamplingParams(temperature=1.0, top_p=0.9, seed=5, repetition_penalty=1.2)
    runs = [
        list(stream_tokens(model, prompt, max_new_tokens=15, eos_ids={EOS}, params=params)) for _ in range(2)
    ]
    assert runs[0] == runs[1]
    ((_, batch),) = generate_batch(model, [prompt], max_new_tokens=15, eos_ids={EOS}, params=params)
    assert batch.ids == runs[0]
    other = SamplingParams(temperature=1.0, top_p=0.9, seed=6, repetition_penalty=1.2)
    assert list(stream_tokens(model, prompt, max_new_tokens=15, eos_ids={EOS}, params=other)) != runs[0]


def test_重复惩罚看得见填充之外的提示(model):
    """填充用的 token 不算出现过：左填充的行与单独生成的行一致。"""
    prompts = prompts_of([2, 9])
    params = SamplingParams(temperature=0, repetition_penalty=1.5)
    together = dict(generate_batch(model, prompts, max_new_tokens=10, eos_ids={EOS}, params=params))
    for index, prompt in enumerate(prompts):
        alone = list(stream_tokens(model, prompt, max_new_tokens=10, eos_ids={EOS}, params=params))
        assert together[index].ids == alone


def test_提示超过上下文_说出两个长度(model):
    for call in (
        lambda: list(stream_tokens(model, [5] * 48, max_new_tokens=4, eos_ids={EOS})),
        lambda: list(generate_batch(model, [[5], [5] * 48], max_new_tokens=4, eos_ids={EOS})),
    ):
        with pytest.raises(UserError, match=r"提示有 48 个 token.*只有 48 个"):
            call()
    with pytest.raises(UserError, match="没有任何 token"):
        list(stream_tokens(model, [], max_new_tokens=4, eos_ids={EOS}))


def test_写满上下文就停(model):
    got = list(stream_tokens(model, [5] * 40, max_new_tokens=1000, eos_ids=set()))
    assert len(got) == 8


def test_流式文字等于整段解码():
    from minimind.tokenizer import load_tokenizer

    tokenizer = load_tokenizer()
    torch.manual_seed(0)
    config = MiniMindConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=len(tokenizer)
    )
    model = MiniMindForCausalLM(config).eval()
    params = SamplingParams(temperature=1.0, seed=3)
    prompt = [tokenizer.bos_token_id, 50, 60]
    options = {"max_new_tokens": 200, "params": params}
    ids = list(stream_tokens(model, prompt, eos_ids={tokenizer.eos_token_id}, **options))
    stream = TextStream(tokenizer)
    pieces = list(filter(None, [*map(stream.push, ids), stream.finish()]))
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    assert len(pieces) > 20


def test_外来结构的模型也能用():
    """从 HF 目录加载的 Llama 走 transformers 自己的缓存。"""
    llama = hf_model("Llama", **SHORT)
    prompts = prompts_of([4, 9])
    results = dict(generate_batch(llama, prompts, max_new_tokens=8, eos_ids={EOS}))
    for index, prompt in enumerate(prompts):
        expected = naive_greedy(llama, prompt, 8)
        assert results[index].ids == expected
        assert list(stream_tokens(llama, prompt, max_new_tokens=8, eos_ids={EOS})) == expected
