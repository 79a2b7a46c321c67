"""int8 权重：误差在量化步长之内，一行的结果与同批无关，引擎与模型的前向一致。"""

import copy

import pytest
import torch
from torch import nn

from minimind.errors import UserError
from minimind.inference.engine import Engine
from minimind.inference.int8 import Int8Linear, int8_available, quantize_int8
from minimind.inference.linear import JoinedLinear
from minimind.inference.loading import load_for_inference
from minimind.inference.sampling import GREEDY, SamplingParams
from minimind.model import MiniMindConfig, MiniMindForCausalLM
from minimind.runtime.checkpoint import config_dict, save_weights, weights_path
from minimind.tokenizer import load_tokenizer, tokenizer_fingerprint

pytestmark = pytest.mark.skipif(not int8_available(), reason="这台机器没有精确的 int8 矩阵乘")


def tiny(**options):
    torch.manual_seed(0)
    config = MiniMindConfig(
        hidden_size=64, num_hidden_layers=2, vocab_size=80, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=96, initializer_range=0.2, **options,
    )  # fmt: skip
    return MiniMindForCausalLM(config).eval()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 7])
def test_误差在量化步长之内(rows, bias):
    torch.manual_seed(0)
    linear, x = nn.Linear(96, 40, bias=bias), torch.randn(rows, 96)
    with torch.inference_mode():
        layer = Int8Linear(linear)
        assert layer.codes.dtype == torch.int8
        assert (layer.weight - linear.weight).abs().max() <= layer.scale.max() * 0.501
        got, want = layer(x), linear(x)
        assert (got - want).norm() / want.norm() < 0.02
        assert not torch.equal(got, want)


def test_全零的行与全零的通道():
    linear = nn.Linear(16, 8, bias=False)
    with torch.inference_mode():
        linear.weight[3] = 0
        out = Int8Linear(linear)(torch.stack((torch.zeros(16), torch.ones(16))))
    assert out.isfinite().all() and (out[0] == 0).all() and out[1, 3] == 0


def test_一行的结果与同批无关():
    torch.manual_seed(0)
    layer, x = (
        Int8Linear(nn.Linear(96, 40, bias=False)),
        torch.randn(9, 96) * torch.logspace(-3, 3, 9)[:, None],
    )
    with torch.inference_mode():
        assert torch.equal(layer(x), torch.cat([layer(row[None]) for row in x]))


def test_合并等于逐个算():
    torch.manual_seed(0)
    layers, x = [Int8Linear(nn.Linear(32, n)) for n in (16, 8)], torch.randn(3, 32)
    with torch.inference_mode():
        assert torch.equal(JoinedLinear(layers, torch.float32)(x), torch.cat([one(x) for one in layers], -1))


@pytest.mark.parametrize("arch", ["v2", "v3"])
def test_引擎与换过的模型一致(arch):
    exact = tiny(arch=arch)
    model = quantize_int8(copy.deepcopy(exact))
    assert model.model.embed_tokens.weight.dtype == torch.float32
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    engine = Engine(model, eos_ids=(), max_slots=3)
    for seed in range(4):
        engine.add_request([5, 6, 7 + seed], SamplingParams(temperature=1.0, seed=seed), 20)
    done = []
    while engine.has_unfinished:
        done += engine.step()
    assert len(done) == 4
    far = 0.0
    for sequence in done:
        ids = torch.tensor([sequence.prompt_ids + sequence.ids])
        with torch.no_grad():
            logp, true = (one(input_ids=ids).logits[0, 2:-1].log_softmax(-1) for one in (model, exact))
        picked = torch.tensor(sequence.ids)[:, None]
        # 舍入到整数的边界两边可能差一格，所以不是 1e-4
        torch.testing.assert_close(
            torch.tensor(sequence.logprobs), logp.gather(1, picked)[:, 0], atol=0.05, rtol=0
        )
        far = max(far, (logp - true).abs().max().item())
    assert 1e-3 < far < 1.0, "确实量化了，又离原来不远"


def test_损失也能算():
    """分块的交叉熵直接取输出头的权重。"""
    exact = tiny()
    model, ids = quantize_int8(copy.deepcopy(exact)), torch.randint(3, 80, (2, 20))
    with torch.no_grad():
        got, want = (one(input_ids=ids, labels=ids).loss for one in (model, exact))
    assert got != want
    torch.testing.assert_close(got, want, atol=0.05, rtol=0)


def test_不能用时说清楚():
    with pytest.raises(UserError, match="混合专家"):
        quantize_int8(tiny(use_moe=True))
    with pytest.raises(UserError, match="只在 CPU"):
        quantize_int8(tiny().to("meta"))


def test_机器不行时说清楚(monkeypatch):
    monkeypatch.setattr("minimind.inference.int8.int8_available", lambda: False)
    with pytest.raises(UserError, match="int8 矩阵乘"):
        quantize_int8(tiny())


def test_贪心能写完():
    engine = Engine(quantize_int8(tiny()), eos_ids=())
    engine.add_request([5, 6], GREEDY, 10)
    done = []
    while engine.has_unfinished:
        done += engine.step()
    assert len(done[0].ids) == 10


def test_打开时就量化(tmp_path):
    config = MiniMindConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    model, tokenizer = MiniMindForCausalLM(config), load_tokenizer()
    sidecar = {"config": config_dict(config), "tokenizer_hash": tokenizer_fingerprint(tokenizer)}
    save_weights(model, weights_path(config, "full_sft", tmp_path), sidecar)
    options = dict(save_dir=str(tmp_path), weight="full_sft", device="cpu")
    exact, loaded = load_for_inference(**options).model, load_for_inference(**options, quantize="int8").model
    assert isinstance(loaded.lm_head, Int8Linear)
    assert isinstance(loaded.model.layers[0].mlp.down_proj, Int8Linear)
    assert torch.equal(loaded.model.embed_tokens.weight, exact.model.embed_tokens.weight)
