"""评测测试共用：装着同一份权重的 MiniMind 与 transformers 的 Llama。"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from minimind.model import MiniMindConfig, MiniMindForCausalLM


def make_pair(context: int = 512):
    """``(我们的, transformers 的)``，随机权重，标准差放大，各选项的差别才看得出。"""
    torch.manual_seed(0)
    config = MiniMindConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=context,
        initializer_range=0.3,
    )
    ours = MiniMindForCausalLM(config).eval()
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=True,
            max_position_embeddings=context,
        )
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@torch.no_grad()
def naive_logprob(model, context, continuation) -> float:
    """整句一次前向，逐个 token 取对数概率相加：没有缓存、没有树、没有补齐。"""
    ids = torch.tensor([[*context, *continuation]])
    logp = torch.log_softmax(model(input_ids=ids).logits[0].double(), dim=-1)
    start = len(context) - 1
    return sum(float(logp[start + i, token]) for i, token in enumerate(continuation))
