"""混合专家的定形写法：形状只由行数定，不必从设备读各专家分到几行，所以能录进 CUDA 图里。

照路由分组的写法（:class:`minimind.model.model_minimind.MoE`）要先读回各专家的行数；bf16 的分组矩阵乘只在算力 9、10 的卡上
不读，别的卡上它在里面读。这里全部专家（共享的也在内）并成一个宽的 SwiGLU，没选中的专家中间结果乘 0：

    y = Σ_e g_e · down_e(silu(gate_e·x) ⊙ up_e·x) = [g_e · silu(gate_e·x) ⊙ up_e·x]_e · [down_e]_e，  g_e 没选中是 0，共享专家是 1

解码的快慢由读多少权重定：B 行、每行选 K 个，一行一个词元。写成字节，以一个专家的权重为 1：

    并成一个宽的     E                全部读一遍，两次矩阵乘
    只取选中的       3·B·K            取出时读一遍、写一遍，乘的时候再读一遍
    照路由分组       至多 min(E, B·K)  要主机等

所以 3·B·K < E 才只取选中的（公开的两种都是 E = 4：K = 2 的轮不到，K = 1 的只在一行时；几十个专家的才常用到）；B·K 到了 E 的几倍，
分组的也把全部专家读了一遍。
多算的乘加在几百行以内藏在读权重的时间里：bf16 每读 2 字节做 2·B 次，卡上每读一个字节做得了一百到三百次。
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind.model.model_lora import effective_weight


class StackedExperts:
    """一层的全部专家，并排放着；:meth:`build` 之前不占地方。

    Args:
        moe: :class:`minimind.model.model_minimind.MoE`。
        dtype: 矩阵乘的精度。
    """

    COPIES = 3  # 只取选中的，每个专家的权重读写几遍

    def __init__(self, moe: nn.Module, dtype: torch.dtype):
        self.moe, self.dtype = moe, dtype
        self.gate_up: Tensor | None = None  # [E, 2, W, H]
        self.down: Tensor | None = None  # [E, W, H]

    @property
    def experts(self) -> list[nn.Module]:
        """各专家，然后是共享的。"""
        return [*self.moe.experts, *(self.moe.shared_experts or ())]

    @property
    def possible(self) -> bool:
        """各层是不是都有浮点的权重可以并排放（int8 的没有）。"""
        return all(isinstance(layer, nn.Linear) for expert in self.experts for layer in expert.children())

    @property
    def ready(self) -> bool:
        """并排放好了没有。"""
        return self.gate_up is not None

    def build(self) -> None:
        """并排放一份；已经有了就不再放。"""
        if not self.ready:
            first = self.experts[0].gate_proj.weight
            (wide, width), count = first.shape, len(self.experts)
            self.gate_up = first.new_empty((count, 2, wide, width), dtype=self.dtype)
            self.down = first.new_empty((count, wide, width), dtype=self.dtype)
            self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """权重变了：写在原来的地方，录好的图还能用。"""
        if not self.ready:
            return
        for pair, down, expert in zip(self.gate_up, self.down, self.experts):
            pair[0] = effective_weight(expert.gate_proj)
            pair[1] = effective_weight(expert.up_proj)
            down.copy_(effective_weight(expert.down_proj).t())

    def places(self) -> list[int]:
        """各张量在哪里。"""
        return [one.data_ptr() for one in (self.gate_up, self.down) if one is not None]

    def __call__(self, x: Tensor) -> Tensor:
        """``[N, H]`` → ``[N, H]``，与 ``moe`` 只差舍入。"""
        score, weight, expert = self.moe.route(x)
        few = self.COPIES * expert.numel() < len(self.moe.experts)
        return self._chosen(x, weight, expert) if few else self._all(x, score, weight, expert)

    def _all(self, x: Tensor, score: Tensor, weight: Tensor, expert: Tensor) -> Tensor:
        """全部专家一起算。"""
        gates = torch.zeros_like(score).scatter_(1, expert, weight)  # [N, E]
        shared = len(self.gate_up) - gates.shape[1]
        gates = F.pad(gates, (0, shared), value=1.0).to(x.dtype)
        gate, up = F.linear(x, self.gate_up.flatten(0, 2)).view(len(x), *self.gate_up.shape[:3]).unbind(2)
        inner = F.silu(gate) * up * gates[:, :, None]  # [N, E, W]
        return inner.flatten(1) @ self.down.flatten(0, 1)

    def _chosen(self, x: Tensor, weight: Tensor, expert: Tensor) -> Tensor:
        """只取选中的几个专家，共享的照旧。"""
        routed = len(self.moe.experts)
        taken = expert.flatten()
        rows = x.repeat_interleave(expert.shape[1], dim=0)[:, :, None]  # [N·K, H, 1]
        pair = torch.bmm(self.gate_up[:routed].flatten(1, 2).index_select(0, taken), rows)
        gate, up = pair.view(len(taken), 2, 1, -1).unbind(1)
        inner = F.silu(gate) * up * weight.reshape(-1, 1, 1).to(x.dtype)  # [N·K, 1, W]
        y = torch.bmm(inner, self.down.index_select(0, taken)).view(len(x), -1, x.shape[1]).sum(1)
        for pair, down in zip(self.gate_up[routed:], self.down[routed:]):
            gate, up = F.linear(x, pair.flatten(0, 1)).chunk(2, dim=-1)
            y = y + (F.silu(gate) * up) @ down
        return y
