"""混合专家的定形写法：与照路由分组的只差舍入，不从设备读，权重就地刷新。"""

import copy

import pytest
import torch
from engine_helpers import tiny

from minimind.inference.decoder import FusedDecoder
from minimind.inference.int8 import Int8Linear
from minimind.inference.shared import SharedModel
from minimind.inference.stacked_experts import StackedExperts
from minimind.model import MiniMindConfig
from minimind.model.model_lora import Adapter, apply_lora, lora_layers
from minimind.model.model_minimind import MoE


def mixture(arch="v2", top_k=2, experts=4, shared=1, norm=True, dtype=torch.float32):
    torch.manual_seed(top_k * 100 + experts * 10 + shared)
    config = MiniMindConfig(
        arch=arch,
        hidden_size=32,
        num_attention_heads=4,
        use_moe=True,
        n_routed_experts=experts,
        num_experts_per_tok=top_k,
        n_shared_experts=shared,
        norm_topk_prob=norm,
    )
    moe = MoE(config).eval()
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return moe.to(dtype)


def stacked(moe):
    result = StackedExperts(moe, next(moe.parameters()).dtype)
    result.build()
    return result


@pytest.mark.parametrize("arch", ["v2", "v3"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("shared", [0, 1, 2])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("experts", [4, 8, 40])
@torch.inference_mode()
def test_与照路由分组的相同(arch, top_k, shared, norm, experts):
    """几十个专家时，一行、几行走只取选中的那条路。"""
    moe = mixture(arch, top_k, experts, shared, norm)
    twin = stacked(moe)
    for rows in (1, 2, 3, 17, 100):
        x = torch.randn(rows, 32)
        want = moe(x.unsqueeze(0), None)[0][0]
        torch.testing.assert_close(twin(x), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("experts", [4, 40])
@torch.inference_mode()
def test_两条路的结果相同_按读写的字节选(experts, monkeypatch):
    moe = mixture(experts=experts)
    twin, taken = stacked(moe), []
    whole, chosen = twin._all, twin._chosen
    monkeypatch.setattr(twin, "_all", lambda *args: taken.append("全部") or whole(*args))
    monkeypatch.setattr(twin, "_chosen", lambda *args: taken.append("选中") or chosen(*args))
    for rows in (1, 6, 7, 64):
        x = torch.randn(rows, 32)
        twin(x)
        score, weight, expert = moe.route(x)
        torch.testing.assert_close(
            chosen(x, weight, expert), whole(x, score, weight, expert), atol=1e-5, rtol=1e-5
        )
    assert taken == (["全部"] * 4 if experts == 4 else ["选中", "选中", "全部", "全部"])


@torch.inference_mode()
def test_半精度_与照路由分组的差在舍入之内():
    moe = mixture(dtype=torch.bfloat16)
    twin, x = stacked(moe), torch.randn(50, 32, dtype=torch.bfloat16)
    want = moe(x.unsqueeze(0), None)[0][0].float()
    exact = copy.deepcopy(moe).float()(x.float().unsqueeze(0), None)[0][0]
    ours, theirs = ((one.float() - exact).abs().mean() for one in (twin(x), want))
    assert ours <= 1.5 * theirs


@torch.inference_mode()
def test_一行的结果与同批还有谁无关():
    moe = mixture()
    twin, x = stacked(moe), torch.randn(9, 32)
    together = twin(x)
    for row in range(9):
        torch.testing.assert_close(twin(x[row : row + 1])[0], together[row], atol=1e-4, rtol=1e-4)


def test_权重就地刷新_地址不变():
    model = tiny("moe")
    shared = SharedModel(model)
    decoder = FusedDecoder(shared, 2)
    bare = len(shared.places())
    decoder.use_static()
    places = shared.places()
    assert len(places) == bare + 2 * len(shared.layers)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    layer, x = shared.layers[1], torch.randn(5, 32)
    with torch.inference_mode():
        before = layer.stacked(x)
        shared.refresh()
        want = layer.experts(x.unsqueeze(0), None)[0][0]
        torch.testing.assert_close(layer.stacked(x), want, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(before, want, atol=1e-3)
    # 预排的矩阵乘每次换一份，别的都在原地
    stacked_places = [place for layer in shared.layers for place in layer.stacked.places()]
    assert set(stacked_places) <= set(places)
    assert not any(one.requires_grad for one in (layer.stacked.gate_up, layer.stacked.down))


def test_没合并的LoRA增量也算在内():
    model = tiny("moe")
    apply_lora(model, rank=4)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora.B.weight, std=0.2)
    moe = model.model.layers[0].mlp
    x = torch.randn(6, 32)
    with torch.inference_mode():
        want = moe(x.unsqueeze(0), None)[0][0]
        torch.testing.assert_close(stacked(moe)(x), want, atol=1e-5, rtol=1e-5)


def test_几个引擎共用一份_增量加在专家上的不录():
    model = tiny("moe")
    shared = SharedModel(model)
    state = {}
    for name, width in (("q_proj", 32), ("o_proj", 32)):
        prefix = f"model.layers.0.self_attn.{name}"
        state |= {
            f"{prefix}.lora.A.weight": torch.randn(2, 32),
            f"{prefix}.lora.B.weight": torch.randn(width, 2),
        }
    names = tuple(sorted({key.split(".lora.")[0] for key in state}))
    outside = shared.adapted(Adapter(state, 2, 4.0, names))
    base, adapted = FusedDecoder(shared, 2), FusedDecoder(outside, 2)
    assert base.static and adapted.static
    base.use_static()
    adapted.use_static()
    assert base.layers[0].stacked is adapted.layers[0].stacked and base.layers[0].stacked.ready
    inside = "model.layers.1.mlp.experts.0.up_proj"
    wide = model.model.layers[1].mlp.experts[0].up_proj.out_features
    state = {f"{inside}.lora.A.weight": torch.randn(2, 32), f"{inside}.lora.B.weight": torch.randn(wide, 2)}
    assert not FusedDecoder(shared.adapted(Adapter(state, 2, 4.0, (inside,))), 2).static


def test_int8的专家不能并排放_不录():
    model = tiny("moe")
    expert = model.model.layers[1].mlp.experts[2]
    expert.down_proj = Int8Linear(expert.down_proj)
    assert not FusedDecoder(model, 2).static


def test_CPU上的引擎不另放一份_照旧分组():
    decoder = FusedDecoder(tiny("moe"), 2)
    assert decoder.grouped and not decoder.steady
    assert all(not layer.stacked.ready and not layer.stacked.places() for layer in decoder.layers)
