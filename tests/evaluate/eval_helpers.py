"""评测测试共用：装着同一份权重的 MiniMind 与 transformers 的 Llama。"""

from __future__ import annotations

from pathlib import Path

import torch

from minimind.export.twin import transformers_twin
from minimind.model import MiniMindConfig, MiniMindForCausalLM
from minimind.runtime.checkpoint import config_dict, save_weights, weights_path


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
    return ours, transformers_twin(ours).eval()


def saved_pair_argv(folder: Path, data: Path) -> list[str]:
    """把 :func:`make_pair` 里我们的那个存成 ``full_sft_32.pth``，返回在 ``folder`` 里考 ``data`` 的命令行。"""
    model, _ = make_pair()
    save_weights(model, weights_path(model.config, "full_sft", folder), {"config": config_dict(model.config)})
    flags = {"save_dir": folder, "data_path": data, "device": "cpu", "out_dir": folder}
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


@torch.no_grad()
def naive_logprob(model, context, continuation) -> float:
    """整句一次前向，逐个 token 取对数概率相加：没有缓存、没有树、没有补齐。"""
    ids = torch.tensor([[*context, *continuation]])
    logp = torch.log_softmax(model(input_ids=ids).logits[0].double(), dim=-1)
    start = len(context) - 1
    return sum(float(logp[start + i, token]) for i, token in enumerate(continuation))
