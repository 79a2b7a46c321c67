"""在 transformers 5 里能存、能读、能生成；能编译。"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from minimind.model import MiniMindConfig, MiniMindForCausalLM, count_parameters


def make(seed: int = 0, **extra) -> MiniMindForCausalLM:
    torch.manual_seed(seed)
    sizes = dict(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=97
    )
    model = MiniMindForCausalLM(MiniMindConfig(**(sizes | extra)))
    with torch.no_grad():  # 放大后各步的第一名拉得开，贪心不受舍入左右
        for p in model.parameters():
            p.mul_(4.0) if p.dim() > 1 else None
    return model.eval()


VARIANTS = [
    dict(),
    dict(arch="v3"),
    dict(use_moe=True),
    dict(arch="v3", use_moe=True),
    dict(flash_attn=False),
]


@torch.no_grad()
def naive(model, ids: torch.Tensor, steps: int) -> torch.Tensor:
    """没有缓存、逐步取最大的朴素循环。"""
    for _ in range(steps):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


@pytest.mark.parametrize("extra", VARIANTS)
@pytest.mark.compat
def test_generate_贪心等于没有缓存的朴素循环(extra):
    model = make(**extra)
    ids = torch.randint(3, 97, (2, 6))
    out = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(out, naive(model, ids, 12))


@pytest.mark.parametrize("extra", VARIANTS)
def test_generate_左补齐的一批等于各自单独(extra):
    model = make(**extra)
    prompts = [torch.randint(3, 97, (n,)) for n in (4, 9, 7)]
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for i, p in enumerate(prompts):
        ids[i, 9 - len(p) :], mask[i, 9 - len(p) :] = p, 1
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    for i, p in enumerate(prompts):
        assert torch.equal(out[i, 9:], naive(model, p.unsqueeze(0), 8)[0, len(p) :])


def test_generate_采样受种子控制且多样():
    model, ids = make(), torch.randint(3, 97, (4, 5))
    kw = dict(max_new_tokens=10, do_sample=True, temperature=1.5, top_k=0, eos_token_id=None, pad_token_id=0)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(model.generate(ids, **kw))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


def test_generate_遇到结束词元就停():
    model, ids = make(), torch.randint(3, 97, (1, 5))
    stop = naive(model, ids, 4)[0, -1].item()
    out = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=stop, pad_token_id=0)
    assert out[0, -1] == stop and out.shape[1] <= 9


def test_不认识的参数报错而不是吞掉():
    model, ids = make(), torch.randint(3, 97, (1, 5))
    with pytest.raises(TypeError, match="lables"):
        model(ids, lables=ids)
    with pytest.raises(ValueError, match="top_q"):
        model.generate(ids, max_new_tokens=2, top_q=3)


@pytest.mark.parametrize("extra", VARIANTS[:2])
@pytest.mark.compat
def test_generate_用_transformers_的静态缓存结果不变(extra):
    model, ids = make(**extra), torch.randint(3, 97, (2, 6))
    kw = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    out = model.generate(ids, cache_implementation="static", disable_compile=True, **kw)
    assert torch.equal(out, naive(model, ids, 8))


@pytest.mark.parametrize("extra", VARIANTS[:4])
@pytest.mark.compat
def test_存盘再读_结果逐位相同_共享权重仍共享(extra, tmp_path):
    model, ids = make(**extra), torch.randint(0, 97, (2, 9))
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).arch == model.config.arch
    for loaded in (
        MiniMindForCausalLM.from_pretrained(tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path),
    ):
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert count_parameters(loaded) == count_parameters(model)
        with torch.no_grad():
            assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)


def test_按半精度读入可以直接用(tmp_path):
    model, ids = make(), torch.randint(0, 97, (2, 9))
    model.save_pretrained(tmp_path)
    half = MiniMindForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        logits = half(ids).logits
        assert logits.dtype == torch.bfloat16
        assert (logits.float() - model(ids).logits).abs().mean() < 0.1 * model(ids).logits.std()


def test_公开格式的状态字典_两个共享键都在():
    model = make(use_moe=True)
    state = model.state_dict()
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    assert not [k for k in state if "rope" in k or "freq" in k]  # 公开版的位置编码表不进权重文件，我们也不进
    other = make(seed=1, use_moe=True)
    other.load_state_dict({k: v.half() for k, v in state.items()}, strict=True)
    ids = torch.randint(0, 97, (1, 9))
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, model(ids).logits, rtol=0, atol=0.1)


def test_在_meta_设备上建好再换成真权重也能前向():
    reference, ids = make(), torch.randint(0, 97, (2, 9))
    with torch.device("meta"):
        empty = MiniMindForCausalLM(reference.config)
    empty.load_state_dict(reference.state_dict(), assign=True)
    with torch.no_grad():
        torch.testing.assert_close(empty.eval()(ids).logits, reference(ids).logits)


@pytest.mark.compat
def test_稠密模型编译时不断图():
    model = make().train()
    ids = torch.randint(0, 97, (2, 140))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    a, b = compiled(ids, labels=ids), model(ids, labels=ids)
    torch.testing.assert_close(a.loss, b.loss)
    a.loss.backward()
    grad = model.model.layers[0].self_attn.q_proj.weight.grad.clone()
    model.zero_grad()
    b.loss.backward()
    torch.testing.assert_close(grad, model.model.layers[0].self_attn.q_proj.weight.grad, rtol=1e-4, atol=1e-6)


def test_打包的批在编译后结果不变且不逐批重编译():
    model = make().train()
    ids = torch.randint(0, 97, (2, 140))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    graphs = []
    for cuts in ([30], [99, 140], [1, 2, 150, 200], [140], [5, 77], [3, 4, 5, 6], [10], [11]):
        edges = torch.tensor([0, *cuts, 280], dtype=torch.int32)
        kw = dict(labels=ids, cu_seqlens=edges, max_seqlen=280)
        torch.testing.assert_close(compiled(ids, **kw).loss, model(ids, **kw).loss)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[2] > 0  # 头两批之后段数再怎么变都不再编译


def test_有_dropout_的打包批_编译时逐段的注意力留在图外():
    model = make(dropout=0.1).train()
    ids = torch.randint(0, 97, (2, 140))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    graphs = []
    for cuts in ([30], [99, 140], [1, 2, 150, 200], [140], [5, 77], [10]):
        kw = dict(labels=ids, cu_seqlens=torch.tensor([0, *cuts, 280], dtype=torch.int32), max_seqlen=280)
        torch.manual_seed(1)
        expected = model(ids, **kw).loss
        torch.manual_seed(1)
        torch.testing.assert_close(compiled(ids, **kw).loss, expected)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    if version > (2, 9):  # 2.9 断图之后接着的那一段按临时对象认图，批批重编译
        assert graphs[-1] == graphs[2] > 0
