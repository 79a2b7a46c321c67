"""一份底座，几个引擎共用：排好的权重只有一份，每份 LoRA 只多出自己的两个小矩阵。

    y = W·x + (alpha / r) · B·(A·x)

底座的引擎与没有 LoRA 时走同样的路，快慢不变；LoRA 的引擎每处多两次窄的矩阵乘（26M、r = 8 约慢一成）。
不合并，所以底座换了权重（:mod:`minimind.serve.reload`）或是 int8 的，LoRA 都叠在现在的底座上。
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from minimind.inference.layers import Layer, Norm
from minimind.inference.linear import JoinedLinear
from minimind.model.model_lora import MARK, Adapter, load_adapter


class AdaptedLinear:
    """合并过的投影，加上各自的低秩增量；用法同 :class:`JoinedLinear`。

    Args:
        base: 底座的，不复制。
        pairs: 各个投影的 A ``[r, 入]`` 与 B ``[出, r]``（缩放已乘进 B）；没有增量的是 ``None``。
        sizes: 各个投影的输出宽度。
    """

    def __init__(
        self, base: JoinedLinear, pairs: Sequence[tuple[Tensor, Tensor] | None], sizes: Sequence[int]
    ):
        self.base = base
        blocks, downs, start = [], [], 0
        for pair, size in zip(pairs, sizes):
            if pair is not None:
                block = pair[1].new_zeros(pair[1].shape[1], sum(sizes))
                block[:, start : start + size] = pair[1].t()
                blocks.append(block)
                downs.append(pair[0])
            start += size
        self.down = torch.cat(downs).t().contiguous()  # [入, 各秩之和]
        self.up = torch.cat(blocks)  # [各秩之和, 各出之和]：分块对角，一次乘完

    def delta(self, x: Tensor) -> Tensor:
        """``[N, 入]`` → ``[N, 各出之和]``。"""
        return (x @ self.down) @ self.up

    def __call__(self, x: Tensor) -> Tensor:
        return self.base(x) + self.delta(x)

    def add_to(self, total: Tensor, x: Tensor) -> Tensor:
        """``total [N, 出] + self(x)``。"""
        return self.base.add_to(total, x) + self.delta(x)


class SharedModel:
    """模型与它排好的权重，可以交给几个引擎；在引擎看来就是一个模型。

    Args:
        model: 能用 :class:`~minimind.inference.decoder.FusedDecoder` 的模型。
        dtype: 矩阵乘的精度，默认与权重相同。
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None):
        self.model, self.config = model, model.config
        self.dtype = dtype or model.model.embed_tokens.weight.dtype
        with torch.inference_mode():
            self.layers = [Layer(block, self.dtype) for block in model.model.layers]
            self.head = JoinedLinear([model.lm_head], self.dtype)
        self.norm = Norm(model.model.norm)
        self.adapter: Adapter | None = None

    def parameters(self) -> Iterator[Tensor]:
        """底座的参数，见 ``nn.Module.parameters``。"""
        return self.model.parameters()

    def places(self) -> list[int]:
        """解码要读的权重各在哪里；录好的一步只在这些都没动时还能用。"""
        linears = [self.head, *(linear for layer in self.layers for linear in layer.joined)]
        joined = [place for linear in linears for place in linear.places()]
        joined += [place for layer in self.layers if layer.stacked for place in layer.stacked.places()]
        own = [tensor.data_ptr() for tensor in (*self.model.parameters(), *self.model.buffers())]
        return joined + own

    def refresh(self) -> None:
        """底座的权重变了：重新合并，写在原来的地方。各份 LoRA 用的就是这一份，不用再做什么。"""
        if self.adapter is None:
            with torch.inference_mode():
                for linear in [self.head, *(linear for layer in self.layers for linear in layer.joined)]:
                    linear.refresh()
                for layer in self.layers:
                    if layer.stacked is not None:
                        layer.stacked.refresh()

    def adapted(self, adapter: Adapter) -> SharedModel:
        """叠加一份 LoRA；底座的张量与排好的权重都不复制。

        Args:
            adapter: 已与这个模型核对过（:func:`minimind.model.model_lora.check_adapter`）。
        """
        result = copy.copy(self)
        result.adapter = adapter
        with torch.inference_mode():
            result.layers = [self._adapt(layer, index, adapter) for index, layer in enumerate(self.layers)]
        return result

    def _adapt(self, layer: Layer, index: int, adapter: Adapter) -> Layer:
        prefix = f"model.layers.{index}."
        device = self.model.model.embed_tokens.weight.device
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        result = copy.copy(layer)

        def pair(name: str) -> tuple[Tensor, Tensor] | None:
            if name not in adapter.modules:
                return None
            a, b = (adapter.state[f"{name}{MARK}{part}.weight"].float() for part in "AB")
            scaled = b * (adapter.alpha / adapter.rank)
            return a.to(device, self.dtype), scaled.to(device, self.dtype)

        def adapt(base: JoinedLinear, *names: str) -> JoinedLinear | AdaptedLinear:
            pairs = [pair(name) for name in names]
            sizes = [linear.out_features for linear in base.linears]
            return AdaptedLinear(base, pairs, sizes) if any(pairs) else base

        result.qkv = adapt(layer.qkv, *(f"{attention}{name}_proj" for name in "qkv"))
        result.out = adapt(layer.out, f"{attention}o_proj")
        if layer.experts is not None:
            result.experts = _adapted_experts(layer.experts, adapter, mlp)
            if result.experts is not layer.experts:
                result.stacked = None  # 增量加在专家上：定形的写法要另存一份底座的专家，不录
        else:
            result.gate_up = adapt(layer.gate_up, f"{mlp}gate_proj", f"{mlp}up_proj")
            result.down = adapt(layer.down, f"{mlp}down_proj")
        return result


def _adapted_experts(experts: nn.Module, adapter: Adapter, prefix: str) -> nn.Module:
    """混合专家的前馈：模块另建一套，参数仍是原来的那些，线性层换成带增量的。"""
    modules = tuple(name.removeprefix(prefix) for name in adapter.modules if name.startswith(prefix))
    if not modules:
        return experts
    twin = copy.deepcopy(experts, {id(value): value for value in experts.parameters()})
    state = {
        key.removeprefix(prefix): value for key, value in adapter.state.items() if key.startswith(prefix)
    }
    load_adapter(twin, replace(adapter, state=state, modules=modules))
    return twin.eval().requires_grad_(False)
