"""配置与尺寸：数字写死，换布局或改默认值时这里会响。"""

from __future__ import annotations

import json
import re

import pytest
import torch

from minimind.model import (
    PRESETS,
    MiniMindConfig,
    MiniMindForCausalLM,
    count_parameters,
    flops_per_token,
    preset,
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tiny", 3_590_592),
        ("small", 25_829_888),
        ("base", 104_030_976),
        ("moe", 145_029_760),
        ("minimind3", 63_912_192),
        ("minimind3_moe", 198_416_640),
    ],
)
def test_各尺寸的参数量(name, expected):
    with torch.device("meta"):
        assert count_parameters(MiniMindForCausalLM(preset(name))) == expected


def test_预设可以覆盖且不认识的名字说清有哪些():
    assert preset("small", arch="v3").num_key_value_heads == 4
    assert preset("small").num_key_value_heads == 2
    with pytest.raises(ValueError, match="small"):
        preset("huge")
    assert set(PRESETS) == {"tiny", "small", "base", "moe", "minimind3", "minimind3_moe"}


@pytest.mark.parametrize(
    ("name", "key"), [("minimind3", "minimind3_64m"), ("minimind3_moe", "minimind3_moe_198m")]
)
def test_minimind3的键与形状同公共权重(name, key, shared_dir):
    """公共权重的形状来自参考数据；每词元用到的参数 64M。"""
    public = json.loads((shared_dir / "golden" / "v3_param_counts.json").read_text())[key]
    with torch.device("meta"):
        model = MiniMindForCausalLM(preset(name))
    assert count_parameters(model) == public["params"]
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == public["state_dict"]


def test_minimind3_moe每词元用到64M():
    with torch.device("meta"):
        model = MiniMindForCausalLM(preset("minimind3_moe"))
    idle = sum(p.numel() for k, p in model.named_parameters() if re.search(r"\.experts\.[123]\.", k))
    assert count_parameters(model) - idle == 63_936_768


def test_两种布局的默认值():
    v2, v3 = MiniMindConfig(use_moe=True), MiniMindConfig(arch="v3", use_moe=True)
    assert (v2.intermediate_size, v3.intermediate_size) == (1408, 1664)
    assert (v2.rms_norm_eps, v3.rms_norm_eps) == (1e-5, 1e-6)
    assert (v2.num_experts_per_tok, v2.n_shared_experts, v2.aux_loss_alpha, v2.seq_aux) == (2, 1, 0.01, True)
    assert (v3.num_experts_per_tok, v3.n_shared_experts, v3.aux_loss_alpha, v3.seq_aux) == (1, 0, 5e-4, False)
    assert (v2.vocab_size, v2.max_position_embeddings, v2.rope_theta) == (6400, 32768, 1e6)


def test_公开的新名字是别名():
    config = MiniMindConfig(
        arch="v3", use_moe=True, num_experts=6, router_aux_loss_coef=0.3, moe_intermediate_size=96
    )
    assert (config.n_routed_experts, config.num_experts) == (6, 6)
    assert (config.aux_loss_alpha, config.router_aux_loss_coef) == (0.3, 0.3)
    model = MiniMindForCausalLM(config)
    assert len(model.model.layers[0].mlp.experts) == 6
    assert model.model.layers[0].mlp.experts[5].gate_proj.weight.shape == (96, 512)


def test_配置存盘再读不变(tmp_path):
    config = MiniMindConfig(
        arch="v3", hidden_size=64, head_dim=24, use_moe=True, num_experts=3, inference_rope_scaling=True,
        rope_scaling={"factor": 4.0}, router_aux_loss_coef=0.0, initializer_range=0.01,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    loaded = MiniMindConfig.from_pretrained(tmp_path)
    ours, theirs = config.to_dict(), loaded.to_dict()
    for skip in ("_name_or_path", "transformers_version"):
        ours.pop(skip, None), theirs.pop(skip, None)
    assert ours == theirs
    assert loaded.yarn["factor"] == 4.0 and loaded.yarn["beta_fast"] == 32.0
    assert loaded.aux_loss_alpha == 0.0


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        (dict(arch="v9"), "arch"),
        (dict(num_attention_heads=8, num_key_value_heads=3), "整数倍"),
        (dict(hidden_size=72, num_attention_heads=8), "偶数"),
        (dict(use_moe=True, num_experts=2, num_experts_per_tok=3), "n_routed_experts"),
        (dict(hidden_act="relu"), "silu"),
    ],
)
def test_矛盾的尺寸给出中文说明(bad, word):
    with pytest.raises(ValueError, match=word):
        MiniMindConfig(**bad)


def test_每词元浮点运算与逐层手算一致():
    config = MiniMindConfig(hidden_size=512, num_hidden_layers=8)
    matmul = 25_829_888 - 17 * 512  # 归一化以外的参数都在矩阵乘里；共享的词嵌入正好算输出头一次
    attention = 8 * 2 * 512 * (340 / 2)  # 层 × (q·k 与 p·v) × 宽度 × 平均键数
    assert flops_per_token(config, 340) == 6 * (matmul + attention)


def test_混合专家只计被选中的专家():
    config = preset("moe")
    expert = 3 * 640 * 1728
    dense = MiniMindConfig(hidden_size=640, num_hidden_layers=8, intermediate_size=1728)
    extra = 6 * 8 * (2 * expert + 640 * 4)  # 选 2 个加共享 1 个，比稠密多 2 个专家和一个门控
    assert flops_per_token(config, 512) == flops_per_token(dense, 512) + extra


def test_残差零初始化时每层起步是恒等映射_词嵌入减到四分之一():
    torch.manual_seed(0)
    model = MiniMindForCausalLM(
        MiniMindConfig(hidden_size=64, num_hidden_layers=2, use_moe=True, zero_init_residual=True)
    )
    for name, p in model.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            assert p.abs().max() == 0, name
    embed = model.model.embed_tokens.weight
    assert embed.std().item() == pytest.approx(0.005, rel=0.05)
    assert model.model.layers[0].mlp.experts[0].up_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    ids = torch.randint(0, 6400, (1, 8))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).hidden_states, model.model.norm(embed[ids]))
