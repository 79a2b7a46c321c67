"""自检用的小模型与小批次：两层，宽 128，几百个词元；每种设备、每种精度都拿同一份比。"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from minimind.dataset import collate_packed
from minimind.model import MiniMindConfig, MiniMindForCausalLM

T = TypeVar("T")
VOCAB, HIDDEN, EXPERTS = 512, 128, 4
KINDS: dict[str, dict[str, Any]] = {
    "v2": {"arch": "v2"},
    "v3": {"arch": "v3"},
    "MoE": {"arch": "v2", "use_moe": True, "n_routed_experts": EXPERTS},
}
LAYOUTS = ("打包", "左填充")
# 打包的两行各由几篇文档与一段填充组成；有长过 64 的（分块注意力的块长），也有短的
DOCUMENTS = ((70, 83, 7), (33, 100, 20, 7))
PADDED_LENGTHS = (48, 31, 17)


def toy_config(kind: str, **changes: Any) -> MiniMindConfig:
    """两层的配置；初始化比默认的大几倍，注意力与各层的贡献才看得出对错。"""
    sizes = {
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "initializer_range": 0.06,
        **KINDS[kind],
    }
    return MiniMindConfig(**{**sizes, **changes})


def toy_model(kind: str, seed: int = 0, **changes: Any) -> MiniMindForCausalLM:
    """在 CPU 上按种子造的 fp32 模型，训练状态；同样的参数总是同样的权重，全局随机数不受影响。"""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MiniMindForCausalLM(toy_config(kind, **changes))
        if kind == "MoE":
            separate_experts(model)
    return model.train()


@torch.no_grad()
def separate_experts(model: MiniMindForCausalLM) -> None:
    """让路由拉得开：随机的路由里总有不相上下的专家，半精度的舍入会让词元换专家，那不是算错。

    门控的各行两两正交，词嵌入里按词元号混入第一、第二志愿的方向，前两名与其余的差距远大于舍入；
    门控再缩小，softmax 才不饱和（饱和了门控就没有梯度可比）。
    """
    directions = torch.linalg.qr(torch.randn(HIDDEN, EXPERTS))[0].T
    tokens = torch.arange(VOCAB)
    first = tokens % EXPERTS
    second = (first + 1 + tokens // EXPERTS % (EXPERTS - 1)) % EXPERTS
    model.model.embed_tokens.weight += 2.0 * directions[first] + 1.2 * directions[second]
    for layer in model.model.layers:
        layer.mlp.gate.weight.copy_(0.25 * directions)
        for block in (layer.self_attn, *layer.mlp.experts, *layer.mlp.shared_experts):
            written = block.o_proj if hasattr(block, "o_proj") else block.down_proj
            written.weight *= 0.4  # 前一层写回的东西盖不过词嵌入里的志愿


def on_device(model: MiniMindForCausalLM, device: torch.device) -> MiniMindForCausalLM:
    """同一份权重的另一个模型，放在设备上；原来的不动。"""
    return copy.deepcopy(model).to(device)


def toy_batch(layout: str) -> dict[str, Any]:
    """一批训练数据，在 CPU 上：``打包`` 或 ``左填充``。"""
    generator = torch.Generator().manual_seed(1)
    if layout == "打包":
        return collate_packed([packed_row(lengths, generator) for lengths in DOCUMENTS])
    length = max(PADDED_LENGTHS)
    ids = torch.randint(3, VOCAB, (len(PADDED_LENGTHS), length), generator=generator)
    mask = torch.stack([torch.arange(length) >= length - n for n in PADDED_LENGTHS])
    return {
        "input_ids": ids.where(mask, 0),
        "labels": ids.where(mask, -100),
        "attention_mask": mask.long(),
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }


def packed_row(lengths: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
    """几篇文档装成的一行，末一段是填充；:func:`minimind.dataset.collate_packed` 要的样子。"""
    documents = lengths[:-1]
    ids = torch.randint(3, VOCAB, (sum(lengths),), generator=generator)
    ids[sum(documents) :] = 0
    labels = ids.clone()
    labels[sum(documents) :] = -100
    starts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
    labels[starts] = -100  # 每篇的第一个词元没有上文
    return {
        "input_ids": ids,
        "labels": labels,
        "position_ids": torch.cat([torch.arange(n) for n in lengths]),
        "seg_lens": list(lengths),
        "num_tokens": sum(documents),
    }


@contextlib.contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """里面的 fp32 矩阵乘用这种精度：``highest`` 不用 TF32，``high`` 是训练时的设置。"""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def in_one_thread(work: Callable[[], T]) -> Callable[[], T]:
    """做 ``work`` 时 torch 只用一个线程：小矩阵分给几个线程只会互相空等，机器忙的时候慢几十倍。"""

    def run() -> T:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return work()
        finally:
            torch.set_num_threads(before)

    return run
