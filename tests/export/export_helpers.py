"""导出测试共用：各种结构的小权重，按训练时的样子存在 out/ 里。"""

from __future__ import annotations

from pathlib import Path

import torch

from minimind.model import MiniMindConfig, MiniMindForCausalLM
from minimind.runtime.checkpoint import config_dict, save_weights, weights_path
from minimind.tokenizer import load_tokenizer, tokenizer_fingerprint

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
KINDS = {
    "v2": {},
    "v3": {"arch": "v3"},
    "v3_moe": {"arch": "v3", "use_moe": True},
    "v3_moe_top2": {"arch": "v3", "use_moe": True, "num_experts_per_tok": 2},
    "v2_moe": {"use_moe": True},
    "v2_moe_two_shared": {"use_moe": True, "n_shared_experts": 2, "moe_intermediate_size": 96},
    "v2_moe_top1": {"use_moe": True, "num_experts_per_tok": 1},
    "v2_moe_unnormalised": {"use_moe": True, "norm_topk_prob": False},
    "v2_head_dim": {"head_dim": 32},
    "v2_untied": {"tie_word_embeddings": False},
}


def small_model(kind: str, **overrides) -> MiniMindForCausalLM:
    """随机权重，放大到各层都真的起作用；归一化的权重也不是 1。"""
    torch.manual_seed(7)
    model = MiniMindForCausalLM(MiniMindConfig(**{**SMALL, **KINDS[kind], **overrides})).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(1 + 0.3 * torch.randn(value.shape) if "norm" in name else 4 * value)
    return model


def save_small(folder: Path, kind: str, **overrides) -> MiniMindForCausalLM:
    """存成 ``folder/tiny_64[_moe].pth`` 与旁注；返回权重已舍入到 fp16 的同一个模型。"""
    model = small_model(kind, **overrides)
    model.load_state_dict({key: value.half().float() for key, value in model.state_dict().items()})
    sidecar = {
        "config": config_dict(model.config),
        "tokenizer_hash": tokenizer_fingerprint(load_tokenizer()),
        "recipe": "full_sft",
        "step": 12,
        "metrics": {"val_loss": 1.5},
    }
    save_weights(model, weights_path(model.config, "tiny", folder), sidecar)
    return model
