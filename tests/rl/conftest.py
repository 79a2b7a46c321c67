"""采样的几组测试共用：随包的分词器，三种极小的模型。"""

from __future__ import annotations

import pytest
import torch

from minimind.model import MiniMindConfig, MiniMindForCausalLM
from minimind.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module", params=["v2", "v3", "moe"])
def model(request, tokenizer):
    """随机初始化的 v2、v3、混合专家；结束符常被抽到：长短参差，几回合也走得起来。"""
    torch.manual_seed(0)
    config = MiniMindConfig(
        arch="v3" if request.param == "v3" else "v2",
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        use_moe=request.param == "moe",
        initializer_range=0.3,
    )
    model = MiniMindForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 5
    return model.eval()
