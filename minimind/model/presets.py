"""尺寸：有名字的几种，以及参数量与运算量怎么数。"""

from __future__ import annotations

from typing import Any

from torch import nn

from minimind.model.model_minimind import MiniMindConfig

# 行尾是参数个数，测试里逐个核对
PRESETS: dict[str, dict[str, Any]] = {
    # 3,590,592：演示与测试。同样的演示语料，六层 192 宽留出题答对 83 %，四层 256 宽只有 61 %：
    # 从上文里找答案的题靠层数
    "tiny": dict(hidden_size=192, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=2),
    "small": dict(hidden_size=512, num_hidden_layers=8),  # 25,829,888
    "base": dict(hidden_size=768, num_hidden_layers=16),  # 104,030,976
    "moe": dict(hidden_size=640, num_hidden_layers=8, use_moe=True),  # 145,029,760
    # 公共 minimind-3 的两个：布局是 v3，权重与它的文件通用
    "minimind3": dict(arch="v3", hidden_size=768, num_hidden_layers=8),  # 63,912,192
    "minimind3_moe": dict(
        arch="v3", hidden_size=768, num_hidden_layers=8, use_moe=True
    ),  # 198,416,640，每词元用到 63,936,768
}


def preset(name: str, **overrides: Any) -> MiniMindConfig:
    """按名字取配置，`overrides` 覆盖其中的项（例如 `arch="v3"`）。

    Raises:
        ValueError: 没有这个名字。
    """
    return MiniMindConfig(**{**preset_sizes(name), **overrides})


def preset_sizes(name: str) -> dict[str, Any]:
    """这个名字的尺寸，一份可以改的拷贝；没有写 ``arch`` 的两种布局都行。

    Raises:
        ValueError: 没有这个名字。
    """
    if name not in PRESETS:
        raise ValueError(f"没有叫 {name!r} 的尺寸，可选：{'、'.join(PRESETS)}")
    return dict(PRESETS[name])


def count_parameters(model: nn.Module) -> int:
    """参数个数，共享的词嵌入只算一次。"""
    return sum(p.numel() for p in model.parameters())


def flops_per_token(config: MiniMindConfig, seq_len: int) -> float:
    """训练一个词元的浮点运算（前向 + 反向 = 3 倍前向），只计矩阵乘：投影、注意力（因果取一半）、输出头；
    混合专家只计被选中的与共享的。"""
    H, D = config.hidden_size, config.head_dim
    attn = 2 * H * D * (config.num_attention_heads + config.num_key_value_heads)  # q、o 与 k、v
    if config.use_moe:
        active = config.num_experts_per_tok + config.n_shared_experts
        mlp = 3 * H * config.moe_intermediate_size * active + H * config.n_routed_experts
    else:
        mlp = 3 * H * config.intermediate_size
    score = seq_len * D * config.num_attention_heads  # q·k 与 p·v 各 seq_len/2 个键
    per_layer = attn + mlp + score
    return 6.0 * (config.num_hidden_layers * per_layer + H * config.vocab_size)
