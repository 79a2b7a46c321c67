"""注意力的几条路必须算同一件事；打包不泄漏；补齐不产生 NaN。"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from minimind.model import MiniMindConfig, MiniMindForCausalLM, cpu_attention, kernels
from minimind.model.cpu_attention import SegmentAttention
from minimind.model.kernels import attention
from minimind.model.model_minimind import plain_attention


def make(seed: int = 0, **extra) -> MiniMindForCausalLM:
    torch.manual_seed(seed)
    sizes = dict(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=97
    )
    model = MiniMindForCausalLM(MiniMindConfig(**(sizes | extra)))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0) if p.dim() > 1 else None
    return model.eval()


def pack(lengths, rows, row_length, vocab=97, seed=0):
    """随机文档按次序填进 rows × row_length；返回输入、位置、边界、每篇的切片。"""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (rows * row_length,), generator=generator)
    edges, position = [0], torch.zeros(rows * row_length, dtype=torch.long)
    for length in lengths:
        start = edges[-1]
        edges.append(start + length)
        position[start : start + length] = torch.arange(length)
    assert edges[-1] == rows * row_length
    shape = (rows, row_length)
    return ids.view(shape), position.view(shape), torch.tensor(edges, dtype=torch.int32)


@st.composite
def segment_lengths(draw):
    return draw(st.lists(st.integers(1, 150), min_size=1, max_size=5))


@settings(max_examples=25, deadline=None)
@given(segment_lengths(), st.sampled_from([(4, 4), (4, 2), (6, 1)]), st.sampled_from([8, 32]))
def test_分块注意力的值与梯度等于_SDPA(lengths, heads, dim):
    generator = torch.Generator().manual_seed(sum(lengths))
    total, (q_heads, kv_heads) = sum(lengths), heads
    q, k, v = (
        torch.randn(total, n, dim, generator=generator, requires_grad=True)
        for n in (q_heads, kv_heads, kv_heads)
    )
    edges = torch.tensor([0] + lengths).cumsum(0).tolist()
    segments = list(pairwise(edges))
    ours = SegmentAttention.apply(q, k, v, segments)
    parts = [
        F.scaled_dot_product_attention(
            *(t[a:b].transpose(0, 1).unsqueeze(0) for t in (q, k, v)), is_causal=True, enable_gqa=True
        )
        for a, b in segments
    ]
    reference = torch.cat(parts, 2).squeeze(0).transpose(0, 1)
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-5)
    grad = torch.randn(ours.shape, generator=generator)
    for a, b in zip(
        torch.autograd.grad(ours, (q, k, v), grad), torch.autograd.grad(reference, (q, k, v), grad)
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


@settings(max_examples=20, deadline=None)
@given(
    segment_lengths(),
    st.sampled_from([(8, 2, 64), (6, 2, 32), (4, 4, 32), (4, 1, 48)]),
    st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_半精度补齐或转精度之后_值与梯度离双精度不比舍入远(lengths, shape, dtype):
    """宽的补到 32 的整倍数，窄的转成 fp32 算；q、k、v 先舍成 bf16，再拿双精度算同一份作准。"""
    q_heads, kv_heads, dim = shape
    generator = torch.Generator().manual_seed(sum(lengths))
    total, edges = sum(lengths), torch.tensor([0] + lengths).cumsum(0)
    q, k, v = (
        torch.randn(total, n, dim, generator=generator).to(dtype).requires_grad_()
        for n in (q_heads, kv_heads, kv_heads)
    )
    plan = kernels.AttentionPlan("segments", list(pairwise(edges.tolist())), edges)
    grad = torch.randn(q.shape, generator=generator).to(dtype)
    with torch.inference_mode():  # 排法先在推理里用过，训练里照样能用
        kernels.segment_attention(q.detach(), k.detach(), v.detach(), plan)
    with torch.autocast("cpu", dtype=dtype):  # 训练里就是这样调用的
        ours = kernels.segment_attention(q, k, v, plan)
    assert ours.dtype == dtype
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    parts = [
        F.scaled_dot_product_attention(
            *(t[a:b].transpose(0, 1).unsqueeze(0) for t in exact), is_causal=True, enable_gqa=True
        )
        for a, b in plan.segments
    ]
    reference = torch.cat(parts, 2).squeeze(0).transpose(0, 1)
    torch.testing.assert_close(ours.double(), reference, rtol=0.02, atol=0.03)
    got = torch.autograd.grad(ours, (q, k, v), grad)
    want = torch.autograd.grad(reference, exact, grad.double())
    for a, b in zip(got, want):
        assert (a.double() - b).norm() < 0.02 * b.norm() + 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(8, 2, 64), (6, 2, 32)])
def test_半精度_只管几段时_别的行不碍事(dtype, shape):
    """推理里长的提示另有算法，安排里只有短的几条。"""
    heads, kv, dim = shape
    q, k, v = (torch.randn(200, n, dim).to(dtype) for n in (heads, kv, kv))
    whole = kernels.AttentionPlan("segments", [(0, 20), (20, 150), (150, 200)])
    part = kernels.AttentionPlan("segments", [(0, 20), (150, 200)])
    want, got = (kernels.segment_attention(q, k, v, plan) for plan in (whole, part))
    assert got.shape == q.shape
    for rows in (slice(0, 20), slice(150, 200)):
        torch.testing.assert_close(got[rows], want[rows], rtol=0, atol=0)


def test_半精度_段的长短怎样变_乘法的形状只有几种(monkeypatch):
    """oneDNN 给每种形状现编一个内核：四十批各不相同的长短，形状要数得清。"""
    shapes, plain = set(), cpu_attention._probability

    def noting(q, k, future):
        shapes.add((q.dtype, q.shape, k.shape))
        return plain(q, k, future)

    monkeypatch.setattr(cpu_attention, "_probability", noting)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        lengths = torch.randint(1, 200, (6,), generator=generator).tolist()
        edges = torch.tensor([0] + lengths).cumsum(0)
        plan = kernels.AttentionPlan("segments", list(pairwise(edges.tolist())), edges)
        q, k, v = (torch.randn(sum(lengths), n, 64).bfloat16() for n in (8, 2, 2))
        kernels.segment_attention(q, k, v, plan)
    # 一块 32 或 64 个查询，看到的键是 32 的倍数，不超过 224：32 个查询的 4 种（键 32、96、160、224），64 个的 3 种
    assert len(shapes) <= 7 and {dtype for dtype, *_ in shapes} == {torch.bfloat16}


def test_分块注意力通过数值梯度检查(monkeypatch):
    monkeypatch.setattr(cpu_attention, "BLOCK", 3)
    monkeypatch.setattr(torch.Tensor, "float", lambda t: t)  # 让内部保持双精度，数值微分才看得准
    monkeypatch.setattr(
        torch, "_softmax_backward_data", lambda g, p, dim, dtype: p * (g - (g * p).sum(dim, keepdim=True))
    )
    q, k, v = (torch.randn(9, n, 4, dtype=torch.float64, requires_grad=True) for n in (4, 2, 2))
    assert torch.autograd.gradcheck(lambda *t: SegmentAttention.apply(*t, [(0, 2), (2, 9)]), (q, k, v))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_写明白的注意力等于_SDPA(causal, masked):
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    mask = torch.rand(2, 1, 9, 9) > 0.4 if masked else None
    if masked:
        mask |= torch.eye(9, dtype=torch.bool)
    torch.testing.assert_close(
        attention(q, k, v, mask, causal), plain_attention(q, k, v, mask, causal), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("arch", ["v2", "v3"])
def test_flash_开关不改变结果(arch):
    fast, slow = make(arch=arch), make(arch=arch, flash_attn=False)
    slow.load_state_dict(fast.state_dict())
    ids = torch.randint(0, 97, (2, 140))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    with torch.no_grad():
        torch.testing.assert_close(fast(ids).logits, slow(ids).logits, rtol=0, atol=1e-4)
        a, b = fast(ids, attention_mask=mask).logits, slow(ids, attention_mask=mask).logits
        torch.testing.assert_close(a[mask.bool()], b[mask.bool()], rtol=0, atol=1e-4)


# ---------------------------------------------------------------- 打包


@torch.no_grad()
@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("arch", ["v2", "v3"])
def test_打包不泄漏跨文档注意力(arch, flash):
    """改动一篇文档，别的文档的 logits 一位都不变；被改的那篇之后的位置要变，证明不是什么都没算。"""
    model = make(arch=arch, flash_attn=flash)
    ids, position, edges = pack([70, 90, 40, 150, 50], 2, 200)
    kw = dict(position_ids=position, cu_seqlens=edges, max_seqlen=150)
    before = model(ids, **kw).logits.flatten(0, 1)
    changed = ids.flatten().clone()
    changed[70:80] = (changed[70:80] + 1) % 97
    after = model(changed.view_as(ids), **kw).logits.flatten(0, 1)
    same = (before == after).all(-1)
    assert same[:70].all() and same[160:].all()
    assert not same[70:160].any()


@torch.no_grad()
@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("use_moe", [True, False])
def test_打包的_logits_等于单独送入(use_moe, flash):
    model = make(use_moe=use_moe, flash_attn=flash)
    ids, position, edges = pack([70, 130, 1, 139, 60], 2, 200)
    packed = model(ids, position_ids=position, cu_seqlens=edges, max_seqlen=139).logits.flatten(0, 1)
    for a, b in pairwise(edges.tolist()):
        alone = model(ids.flatten()[a:b].unsqueeze(0)).logits[0]
        torch.testing.assert_close(packed[a:b], alone, rtol=0, atol=1e-4)


def test_打包的损失与梯度等于各篇单独之和():
    model = make().train()
    ids, position, edges = pack([70, 130, 1, 139, 60], 2, 200)
    labels = ids.flatten().clone()
    labels[edges[:-1].long()] = -100  # 每篇第一个词元不是目标
    out = model(ids, position_ids=position, cu_seqlens=edges, max_seqlen=139, labels=labels.view_as(ids))
    total, count = 0.0, 0
    for a, b in pairwise(edges.tolist()):
        one = ids.flatten()[a:b].unsqueeze(0)
        alone = model(one, labels=one)
        total, count = total + alone.loss_sum, count + alone.target_count
    assert out.target_count == count == 400 - 5
    torch.testing.assert_close(out.loss_sum, total, rtol=1e-5, atol=1e-3)
    weights = list(model.parameters())
    for a, b in zip(torch.autograd.grad(out.loss, weights), torch.autograd.grad(total / count, weights)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_打包时的丢弃率走另一条路也不泄漏():
    model = make(dropout=0.2).train()
    ids, position, edges = pack([30, 70], 1, 100)
    changed = ids.clone()
    changed[0, :30] = (changed[0, :30] + 1) % 97
    outs = []
    for x in (ids, changed):
        torch.manual_seed(7)
        outs.append(model(x, position_ids=position, cu_seqlens=edges, max_seqlen=70).logits[0, 30:])
    assert torch.equal(*outs)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"window_size", "enable_gqa"}, {"window_size"}, {"is_causal"}])
def test_变长内核分支用替身也不泄漏(monkeypatch, options):
    """显卡上的分支：替身按内核的约定（[N, heads, D]、累计边界）照算，三种签名对应 torch 2.10 到 2.13。"""

    def stand_in(q, k, v, edges_q, edges_k, longest_q, longest_k, **given):
        assert given.keys() <= options and longest_q == longest_k == 150
        assert given.get("window_size", (-1, 0)) == (-1, 0) and given.get("is_causal", True)
        assert given.get("enable_gqa") or k.shape[1] == q.shape[1]
        return SegmentAttention.apply(q, k, v, list(pairwise(edges_q.tolist())))

    monkeypatch.setattr(kernels, "varlen_attn", stand_in)
    monkeypatch.setattr(kernels, "_VARLEN_OPTIONS", options)
    model = make()
    ids, position, edges = pack([70, 90, 40, 150, 50], 2, 200)
    kw = dict(position_ids=position, cu_seqlens=edges, max_seqlen=150)
    expected = model(ids, **kw).logits
    monkeypatch.setattr(kernels, "varlen_available", lambda x: True)
    torch.testing.assert_close(model(ids, **kw).logits, expected, rtol=0, atol=1e-5)


def test_打包不能与补齐_mask_或缓存混用():
    model, ids = make(), torch.zeros(1, 8, dtype=torch.long)
    edges = torch.tensor([0, 3, 8], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens"):
        model(ids, cu_seqlens=edges, attention_mask=torch.ones_like(ids))
    with pytest.raises(ValueError, match="cu_seqlens"):
        model(ids, cu_seqlens=edges, past_key_values=DynamicCache())


# ---------------------------------------------------------------- 缓存、补齐、长度


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[140], [1] * 12, [5, 4, 3], [130, 1, 7]])
@pytest.mark.parametrize("padded", [True, False])
def test_带缓存分段送入等于一次送完(chunks, padded):
    model, total = make(arch="v3"), sum(chunks)
    ids = torch.randint(0, 97, (2, total))
    mask = torch.ones(2, total, dtype=torch.long)
    if padded:
        mask[0, :2] = 0
    whole = model(ids, attention_mask=mask).logits
    cache, out, seen = DynamicCache(), [], 0
    for n in chunks:
        seen += n
        part = ids[:, seen - n : seen]
        out.append(model(part, attention_mask=mask[:, :seen], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(out, 1)[mask.bool()], whole[mask.bool()], rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("flash", [True, False])
def test_左补齐在半精度下没有_NaN_也不影响真词元(dtype, flash):
    model = make(flash_attn=flash).to(dtype)
    ids = torch.randint(0, 97, (2, 20))
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    logits = model(ids, attention_mask=mask).logits
    assert torch.isfinite(logits).all()
    alone = model(ids[:1, 13:], position_ids=torch.arange(13, 20).unsqueeze(0)).logits
    torch.testing.assert_close(logits[:1, 13:], alone, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.1)


@torch.no_grad()
def test_全一的_mask_与没有_mask_同一结果():
    model, ids = make(), torch.randint(0, 97, (2, 150))
    assert torch.equal(model(ids).logits, model(ids, attention_mask=torch.ones_like(ids)).logits)


@torch.no_grad()
def test_绝对位置平移不改变结果():
    """RoPE 只看相对位置：左补齐不重排位置编号是安全的。"""
    model, ids = make(), torch.randint(0, 97, (1, 12))
    moved = model(ids, position_ids=torch.arange(100, 112).unsqueeze(0)).logits
    torch.testing.assert_close(model(ids).logits, moved, rtol=0, atol=1e-4)


def test_超过最大位置给出说明而不是形状错误():
    model, cache = make(max_position_embeddings=16), DynamicCache()
    model(torch.zeros(1, 16, dtype=torch.long))
    with pytest.raises(ValueError, match="max_position_embeddings=16"):
        model(torch.zeros(1, 17, dtype=torch.long))
    model(torch.zeros(1, 10, dtype=torch.long), past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="已有 10 个"):
        model(torch.zeros(1, 7, dtype=torch.long), past_key_values=cache, use_cache=True)


def test_mask_形状不对时说明应有的形状():
    with pytest.raises(ValueError, match=r"\(2, 8\)"):
        make()(torch.zeros(2, 8, dtype=torch.long), attention_mask=torch.ones(2, 7))


def test_旋转编码在半精度模型里仍用_fp32():
    """bf16 只有 8 位尾数，位置 5000 与 5001 用它就分不开。"""
    model = make().to(torch.bfloat16)
    position = torch.tensor([[5000, 5001]])
    cos, sin = model.model._rope(position)
    frequency = 1e6 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    exact = position.double().unsqueeze(-1) * frequency
    assert cos.dtype == torch.float32
    torch.testing.assert_close(cos[0, :, 0, :8].double(), exact[0].cos(), rtol=0, atol=2e-3)
    torch.testing.assert_close(sin[0, :, 0, 8:].double(), exact[0].sin(), rtol=0, atol=2e-3)


def test_推理模式里用过的模型接着能训练():
    model, ids = make(), torch.randint(0, 97, (2, 9))
    with torch.inference_mode():
        model(ids)
    model.train()(ids, labels=ids).loss.backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().max() > 0


def packed_row(lengths: list[int]) -> dict[str, torch.Tensor]:
    """几篇拼成一行，位置每篇从 0 起。"""
    torch.manual_seed(5)
    return {
        "input_ids": torch.randint(3, 97, (1, sum(lengths))),
        "position_ids": torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
    }


@pytest.mark.parametrize("known", [True, False])
def test_位置上限看最长的一篇_不看拼成的行(known):
    """一行 40 个词元、每篇不超过 16 个：与各篇单独算的相同；有一篇 17 个才拒绝。"""
    model, row = make(max_position_embeddings=16).eval(), packed_row([16, 9, 15])
    longest = {"max_seqlen": 16} if known else {}
    packed = model(**row, **longest).logits[0]
    alone = torch.cat([model(ids.unsqueeze(0)).logits[0] for ids in row["input_ids"][0].split([16, 9, 15])])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="17 个词元，超过 max_position_embeddings=16"):
        model(**packed_row([4, 17]), **({"max_seqlen": 17} if known else {}))


def test_只给位置编号时看最大的位置():
    model, row = make(max_position_embeddings=16).eval(), packed_row([16, 9, 15])
    del row["cu_seqlens"]
    assert model(**row).logits.shape[1] == 40
    with pytest.raises(ValueError, match="17 个词元"):
        model(row["input_ids"], position_ids=torch.arange(40).remainder(17).unsqueeze(0))
    with pytest.raises(ValueError, match="40 个词元"):
        model(row["input_ids"])
