"""从 logits 到下一个 token：温度、top-k、top-p、min-p、重复惩罚，全部整批在设备上完成。

先后次序与 transformers 一致（惩罚 → 温度 → top-k → top-p → min-p），同一组参数在两边含义相同。
这里没有 ``.item()``，也不按行循环：每一步都不需要主机等设备。
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minimind.errors import UserError


@dataclass(frozen=True)
class SamplingParams:
    """一次生成的采样参数。

    Args:
        temperature: 0 表示贪心（此时其余截断参数不起作用），越大越随机。
        top_k: 只在概率最高的 k 个里抽；0 表示不限。
        top_p: 只在累计概率刚好达到 p 的最小集合里抽；1 表示不限。
        min_p: 丢掉概率低于「最大概率 × min_p」的；0 表示不限。
        repetition_penalty: 大于 1 时压低已出现过的 token（Keskar 2019, CTRL）；1 表示不罚。
        seed: 给定时结果可复现；``None`` 用全局随机数。

    Raises:
        UserError: 取值越界。
    """

    temperature: float = 0.85
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        rules = (
            ("temperature", self.temperature >= 0, "不小于 0（0 表示贪心）"),
            ("top_k", self.top_k >= 0, "不小于 0（0 表示不限）"),
            ("top_p", 0 < self.top_p <= 1, "在 (0, 1] 之间"),
            ("min_p", 0 <= self.min_p < 1, "在 [0, 1) 之间"),
            ("repetition_penalty", self.repetition_penalty > 0, "大于 0（1 表示不罚）"),
        )
        for name, valid, expected in rules:
            if not valid:
                raise UserError(
                    f"采样参数 {name}={getattr(self, name)} 越界",
                    expected=expected,
                    fix=f"改 --{name} 的取值",
                )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def make_generator(self, device: torch.device | str) -> torch.Generator | None:
        """按种子造一个该设备上的随机数发生器；没有种子时返回 ``None``（用全局的）。"""
        if self.seed is None:
            return None
        return torch.Generator(device=device).manual_seed(self.seed)


GREEDY = SamplingParams(temperature=0.0)


def apply_repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """已出现的 token：正 logit 除以、负 logit 乘以 ``penalty``，两种情况概率都下降。

    Args:
        logits: ``[B, V]``。
        seen: ``[B, V]`` bool，该行的提示或已生成部分里出现过的 token。
        penalty: 大于 1 压低，小于 1 鼓励。
    """
    if penalty == 1.0:
        return logits
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def filter_logits(logits: Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """把不许抽到的 token 设为 ``-inf``；每行至少留下概率最大的那个。

    Args:
        logits: ``[B, V]``，已除以温度。

    Returns:
        ``[B, V]``，同形状的新张量。
    """
    minus_inf = float("-inf")
    if 0 < top_k < logits.size(-1):
        kth_B1 = torch.topk(logits, top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth_B1, minus_inf)
    if top_p < 1.0:
        sorted_BV, order_BV = torch.sort(logits, dim=-1, descending=True)
        probs_BV = torch.softmax(sorted_BV.float(), dim=-1)
        # 排在它前面的累计已达 p 的才丢：保证集合刚好跨过 p，且第一名永远留下
        drop_BV = (probs_BV.cumsum(dim=-1) - probs_BV) >= top_p
        logits = logits.masked_fill(drop_BV.scatter(-1, order_BV, drop_BV), minus_inf)
    if min_p > 0.0:
        probs_BV = torch.softmax(logits.float(), dim=-1)
        floor_B1 = probs_BV.amax(dim=-1, keepdim=True) * min_p
        logits = logits.masked_fill(probs_BV < floor_B1, minus_inf)
    return logits


def sample(
    logits: Tensor,
    params: SamplingParams,
    generator: torch.Generator | None = None,
    seen: Tensor | None = None,
) -> Tensor:
    """抽下一个 token。

    Args:
        logits: ``[B, V]``，任意浮点类型；内部用 fp32，半精度的累计概率在 6400 个词上误差可达百分之几。
        params: 采样参数。
        generator: :meth:`SamplingParams.make_generator` 的结果。
        seen: ``[B, V]`` bool，只在有重复惩罚时需要。

    Returns:
        ``[B]`` int64。
    """
    logits = logits.float()
    if seen is not None:
        logits = apply_repetition_penalty(logits, seen, params.repetition_penalty)
    if params.greedy:
        return logits.argmax(dim=-1)
    logits = filter_logits(logits / params.temperature, params.top_k, params.top_p, params.min_p)
    probs = torch.softmax(logits, dim=-1)
    return torch.multinomial(probs, num_samples=1, generator=generator).squeeze(-1)
