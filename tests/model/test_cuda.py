"""显卡上的分支：变长内核、分组矩阵乘、混合精度、编译，与 CPU 的 fp32 结果核对。没有显卡时跳过。"""

from __future__ import annotations

import pytest
import torch

from minimind.model import MiniMindConfig, MiniMindForCausalLM, kernels, model_minimind
from minimind.model.kernels import varlen_available

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="没有 CUDA 显卡"),
]


def pair(**extra):
    """CPU 上的 fp32 模型与显卡上的同一份权重，加一批打包数据。"""
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=512
    )
    reference = MiniMindForCausalLM(MiniMindConfig(**(sizes | extra))).train()
    card = MiniMindForCausalLM(reference.config).train()
    card.load_state_dict(reference.state_dict())
    lengths = [70, 130, 56, 200, 56]
    batch = dict(
        input_ids=torch.randint(0, 512, (2, 256)),
        position_ids=torch.cat([torch.arange(n) for n in lengths]).view(2, 256),
        cu_seqlens=torch.tensor([0] + lengths).cumsum(0).to(torch.int32),
    )
    batch["labels"] = batch["input_ids"]
    return reference, card.cuda(), batch


def on_card(batch):
    return {k: v.cuda() for k, v in batch.items()} | {"max_seqlen": 200}


@pytest.mark.parametrize("extra", [dict(), dict(arch="v3"), dict(use_moe=True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiled", [False, True])
def test_打包训练一步的损失与梯度接近_CPU(extra, dtype, compiled):
    if compiled and (extra or dtype != torch.bfloat16):
        pytest.skip("编译只核对最常用的一种")
    reference, card, batch = pair(**extra)
    expected = reference(**batch, max_seqlen=200)
    (expected.loss + expected.aux_loss).backward()
    forward = torch.compile(card) if compiled else card
    with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
        out = forward(**on_card(batch))
    (out.loss + out.aux_loss).backward()
    close = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.loss.cpu(), expected.loss, rtol=0, atol=close)
    torch.testing.assert_close(out.aux_loss.cpu(), expected.aux_loss, rtol=0, atol=close)
    for (name, a), b in zip(card.named_parameters(), reference.parameters()):
        similarity = torch.nn.functional.cosine_similarity(a.grad.cpu().flatten(), b.grad.flatten(), dim=0)
        assert similarity > (0.9999 if dtype == torch.float32 else 0.97), name


def test_半精度打包走变长内核_改一篇不影响别篇():
    _, card, batch = pair()
    card = card.eval().bfloat16()
    batch = on_card(batch)
    assert varlen_available(torch.zeros(1, device="cuda", dtype=torch.bfloat16))
    with torch.no_grad():
        before = card(**batch).logits.flatten(0, 1)
        batch["input_ids"].view(-1)[70:80] += 1
        after = card(**{k: v for k, v in batch.items()}).logits.flatten(0, 1)
    assert torch.equal(before[:70], after[:70]) and torch.equal(before[200:], after[200:])
    assert not torch.equal(before[70:200], after[70:200])


def test_bf16_混合专家用分组矩阵乘(monkeypatch):
    _, card, batch = pair(use_moe=True)
    calls = []
    original = kernels.grouped_swiglu
    monkeypatch.setattr(model_minimind, "grouped_swiglu", lambda *a: calls.append(1) or original(*a))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        card(**on_card(batch))
    assert len(calls) == 2


def test_逐词元解码等于整段():
    _, card, batch = pair(arch="v3")
    card, ids = card.eval(), batch["input_ids"].cuda()[:, :20]
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        whole = card(ids, attention_mask=mask).logits
        out = card(ids[:, :10], attention_mask=mask[:, :10], use_cache=True)
        cache, logits = out.past_key_values, [out.logits]
        for t in range(10, 20):
            logits.append(
                card(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache).logits
            )
    torch.testing.assert_close(torch.cat(logits, 1)[mask.bool()], whole[mask.bool()], rtol=0, atol=1e-3)
