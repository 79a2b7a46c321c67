"""与 transformers 自己的 Llama、Qwen3、Qwen3-MoE 逐位置核对，不依赖 ../shared。"""

from __future__ import annotations

import re

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from minimind.model import MiniMindConfig, MiniMindForCausalLM

SIZES = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=131)
TOL = dict(rtol=0, atol=1e-4)


def reference_for(ours: MiniMindForCausalLM):
    """同尺寸的 transformers 模型，装上同一份权重。"""
    c = ours.config
    common = dict(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads, head_dim=c.head_dim, rms_norm_eps=c.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}, tie_word_embeddings=True,
        max_position_embeddings=c.max_position_embeddings,
    )  # fmt: skip
    if c.arch == "v2":
        theirs = LlamaForCausalLM(LlamaConfig(**common))
    elif not c.use_moe:
        theirs = Qwen3ForCausalLM(Qwen3Config(**common))
    else:
        theirs = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **common, num_experts=c.n_routed_experts, num_experts_per_tok=c.num_experts_per_tok,
                moe_intermediate_size=c.moe_intermediate_size, norm_topk_prob=c.norm_topk_prob,
                decoder_sparse_step=1, mlp_only_layers=[],
            )
        )  # fmt: skip
    theirs.load_state_dict(fuse_experts(ours.state_dict(), theirs.state_dict()))
    return theirs


def fuse_experts(state, template):
    """transformers 5 把专家叠成 [E, …] 的两个张量；名字与它不同的先按专家叠起来。"""
    out = {k: v for k, v in state.items() if ".experts." not in k}
    for name in template:
        if match := re.match(r"(.*\.experts)\.(gate_up_proj|down_proj)$", name):
            prefix, kind = match.groups()
            count = template[name].shape[0]
            down = [state[f"{prefix}.{i}.down_proj.weight"] for i in range(count)]
            both = [
                torch.cat([state[f"{prefix}.{i}.gate_proj.weight"], state[f"{prefix}.{i}.up_proj.weight"]])
                for i in range(count)
            ]
            out[name] = torch.stack(down if kind == "down_proj" else both)
    return out


@pytest.fixture(params=["llama", "qwen3", "qwen3_moe"])
def pair(request):
    torch.manual_seed(0)
    extra = {
        "llama": dict(arch="v2"),
        "qwen3": dict(arch="v3", head_dim=32),
        "qwen3_moe": dict(
            arch="v3", use_moe=True, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=96
        ),
    }[request.param]
    ours = MiniMindForCausalLM(MiniMindConfig(**SIZES, **extra))
    with torch.no_grad():  # 默认初始化的注意力几乎均匀，看不出错；放大让每个头都尖锐，归一化权重也不是 1
        for name, p in ours.named_parameters():
            p.mul_(4.0) if p.dim() > 1 else p.copy_(1 + 0.3 * torch.randn(p.shape))
            if "gate.weight" in name:
                p.mul_(4.0)
    return ours.eval(), reference_for(ours).eval()


@torch.no_grad()
@pytest.mark.parametrize("length", [40, 200])  # 200 走 CPU 上的分块注意力
@pytest.mark.compat
def test_整段_logits_与_transformers_一致(pair, length):
    ours, theirs = pair
    ids = torch.randint(0, 131, (2, length))
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, **TOL)


@torch.no_grad()
@pytest.mark.compat
def test_左补齐与_transformers_一致(pair):
    ours, theirs = pair
    ids, mask = torch.randint(0, 131, (2, 30)), torch.ones(2, 30, dtype=torch.long)
    mask[0, :11] = 0
    position = (mask.cumsum(1) - 1).clamp_min(0)
    a = ours(ids, attention_mask=mask, position_ids=position).logits
    b = theirs(ids, attention_mask=mask, position_ids=position).logits
    torch.testing.assert_close(a[mask.bool()], b[mask.bool()], **TOL)


@pytest.mark.compat
def test_损失与梯度与_transformers_一致(pair):
    ours, theirs = (m.train() for m in pair)
    ids = torch.randint(0, 131, (2, 150))
    labels = ids.clone()
    labels[:, :20] = -100
    a, b = ours(ids, labels=labels).loss, theirs(ids, labels=labels).loss
    torch.testing.assert_close(a, b, **TOL)
    a.backward(), b.backward()
    mine = {n: p.grad for n, p in ours.named_parameters()}
    checked = 0
    for name, p in fuse_experts(mine | {"lm_head.weight": None}, dict(theirs.named_parameters())).items():
        if name != "lm_head.weight":
            torch.testing.assert_close(p, theirs.get_parameter(name).grad, **TOL)
            checked += 1
    assert checked >= 3 * 9
