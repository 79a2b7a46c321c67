"""混合专家：分组矩阵乘与逐专家一致、辅助损失的尺度、补齐不计、闲置专家对 DDP 安全。"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from minimind.model import MiniMindConfig, MiniMindForCausalLM
from minimind.model.kernels import grouped_swiglu
from minimind.model.model_minimind import MoE


def config(**extra) -> MiniMindConfig:
    sizes = dict(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=97
    )
    return MiniMindConfig(**(sizes | dict(use_moe=True) | extra))


def layer(seed: int = 0, **extra) -> MoE:
    torch.manual_seed(seed)
    moe = MoE(config(**extra)).train()
    with torch.no_grad():
        moe.gate.weight.mul_(5)
    return moe


def by_hand(moe: MoE, x: torch.Tensor) -> torch.Tensor:
    """逐词元照定义算：Σ_选中 w_e·专家_e(x) + Σ 共享(x)。"""
    out = torch.zeros_like(x)
    for b, t in [(b, t) for b in range(x.shape[0]) for t in range(x.shape[1])]:
        score = (moe.gate.weight @ x[b, t]).softmax(-1)
        weight, chosen = score.topk(moe.top_k)
        if moe.norm_topk and (moe.top_k > 1 or moe.norm_single):
            weight = weight / weight.sum()
        out[b, t] = sum(w * moe.experts[int(e)](x[b, t]) for w, e in zip(weight, chosen))
        out[b, t] += sum(shared(x[b, t]) for shared in moe.shared_experts or ())
    return out


@pytest.mark.parametrize(
    "extra",
    [dict(), dict(num_experts_per_tok=1, n_shared_experts=0), dict(arch="v3"), dict(norm_topk_prob=False)],
)
def test_输出等于逐词元照定义计算(extra):
    moe, x = layer(**extra), torch.randn(2, 7, 64)
    torch.testing.assert_close(moe(x, None)[0], by_hand(moe, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("empty", [True, False])
def test_分组矩阵乘与逐专家循环的值和梯度一致(empty):
    """显卡上走的分支；这个算子在 CPU 上有同义实现，数学因此能在没有显卡时测到。"""
    if not hasattr(F, "grouped_mm"):
        pytest.skip("torch 低于 2.10，没有 grouped_mm")
    moe = layer()
    count = torch.tensor([5, 0, 11, 3] if empty else [4, 4, 4, 7])
    x = torch.randn(19, 64, requires_grad=True)
    grad = torch.randn(19, 64)
    weights = [x, *moe.experts.parameters()]
    loop, grouped = moe._experts(x, count), grouped_swiglu(moe.experts, x, count)
    torch.testing.assert_close(grouped, loop, rtol=1e-4, atol=1e-5)
    for a, b in zip(torch.autograd.grad(grouped, weights, grad), torch.autograd.grad(loop, weights, grad)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_派发与还原的反向等于自动微分():
    moe, x = layer(num_experts_per_tok=3), torch.randn(2, 5, 64, requires_grad=True)
    grad = torch.randn(2, 5, 64)
    weights = [x, *moe.parameters()]
    ours = torch.autograd.grad(moe(x, None)[0], weights, grad)
    for a, b in zip(ours, torch.autograd.grad(by_hand(moe, x), weights, grad)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("grouped", [True, False])
def test_没有词元的专家得到零梯度而不是_None(grouped, monkeypatch):
    """DDP 等每个参数的梯度；None 会让它报错或卡住。"""
    if grouped:
        if not hasattr(F, "grouped_mm"):
            pytest.skip("torch 低于 2.10，没有 grouped_mm")
        monkeypatch.setattr(MoE, "_experts", lambda moe, x, count: grouped_swiglu(moe.experts, x, count))
    torch.manual_seed(0)
    model = MiniMindForCausalLM(config(num_experts=8, num_experts_per_tok=1)).train()
    ids = torch.randint(0, 97, (1, 2))  # 两个词元，八个专家，至少六个闲着
    out = model(ids, labels=ids)
    (out.loss + out.aux_loss).backward()
    idle = 0
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        idle += int("experts" in name and p.grad.abs().max() == 0)
    assert idle >= 2 * 6 * 3


@pytest.mark.parametrize("seq_aux", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_均匀路由时辅助损失恰为_alpha_不随_top_k_变(seq_aux, top_k):
    moe = layer(num_experts_per_tok=top_k, seq_aux=seq_aux, aux_loss_alpha=0.5)
    with torch.no_grad():
        moe.gate.weight.zero_()  # 概率全为 1/E，则 Σ f_e·P_e = 1/E，与怎么选无关
    assert moe(torch.randn(3, 8, 64), None)[1].item() == pytest.approx(0.5, abs=1e-6)


def test_路由塌缩时辅助损失最大():
    moe = layer(num_experts_per_tok=1, seq_aux=False, aux_loss_alpha=1.0)
    with torch.no_grad():
        moe.gate.weight.zero_()[2] = 10.0
    assert moe(torch.ones(2, 8, 64), None)[1].item() == pytest.approx(4.0, abs=1e-3)
    assert moe.last_load.tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize("seq_aux", [True, False])
def test_补齐位置不计入辅助损失与负载(seq_aux):
    moe, x = layer(seq_aux=seq_aux), torch.randn(2, 6, 64)
    _, exact = moe(x, None)
    load = moe.last_load
    junk = torch.cat([torch.randn(2, 4, 64) * 9, x], 1)
    valid = torch.ones(2, 10, dtype=torch.bool)
    valid[:, :4] = False
    _, padded = moe(junk, valid)
    torch.testing.assert_close(padded, exact)
    torch.testing.assert_close(moe.last_load, load)
    assert not torch.allclose(moe(junk, None)[1], exact)


def test_模型级的补齐_mask_传到路由():
    torch.manual_seed(0)
    model = MiniMindForCausalLM(config(seq_aux=False)).train()
    ids = torch.randint(0, 97, (2, 12))
    mask = torch.ones_like(ids)
    mask[:, :5] = 0
    other = torch.where(mask.bool(), ids, (ids + 3) % 97)
    kw = dict(attention_mask=mask)
    torch.testing.assert_close(model(ids, **kw).aux_loss, model(other, **kw).aux_loss)
    assert model(ids).aux_loss != model(other).aux_loss


def test_负载指标每层一份且和为一_稠密模型没有():
    model = MiniMindForCausalLM(config()).eval()
    model(torch.randint(0, 97, (2, 12)))
    loads = model.moe_load()
    assert len(loads) == 2 and all(x.shape == (4,) and not x.requires_grad for x in loads)
    assert all(x.sum().item() == pytest.approx(1.0) for x in loads)
    dense = MiniMindForCausalLM(config(use_moe=False)).train()
    out = dense(torch.randint(0, 97, (2, 12)))
    assert dense.moe_load() is None and out.aux_loss == 0


def test_推理时没有辅助损失():
    assert MiniMindForCausalLM(config()).eval()(torch.randint(0, 97, (2, 12))).aux_loss == 0


def test_系数为零时辅助损失为零且门控只从主损失得梯度():
    model = MiniMindForCausalLM(config(aux_loss_alpha=0.0)).train()
    ids = torch.randint(0, 97, (2, 12))
    out = model(ids, labels=ids)
    assert out.aux_loss == 0
    (out.loss + out.aux_loss).backward()
    assert model.model.layers[0].mlp.gate.weight.grad.abs().max() > 0


@pytest.mark.parametrize("seq_aux", [True, False])
def test_打包行尾的补齐不计入辅助损失(seq_aux):
    """一行 12 个词元补齐到 20：补齐自成一段，路由与真词元无关，不该拉偏均衡。"""
    torch.manual_seed(0)
    model = MiniMindForCausalLM(config(seq_aux=seq_aux)).train()
    ids = torch.randint(3, 97, (2, 12))

    def forward(width: int):
        padded = F.pad(ids, (0, width - 12), value=model.config.pad_token_id)
        starts = [0, 5, 12, *([width] if width > 12 else [])]  # 每行两篇，补齐另成一段
        segments = [row * width + start for row in range(2) for start in starts[:-1]] + [2 * width]
        position = torch.cat([torch.arange(b - a) for a, b in pairwise(starts)]).repeat(2, 1)
        out = model(padded, position_ids=position, cu_seqlens=torch.tensor(segments, dtype=torch.int32))
        return out.aux_loss, model.moe_load()

    exact, load = forward(12)
    padded, padded_load = forward(20)
    torch.testing.assert_close(padded, exact)
    torch.testing.assert_close(padded_load, load)
