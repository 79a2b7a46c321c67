"""从 logits 到下一个 token：温度、top-k、top-p、min-p、重复惩罚，全部整批在设备上完成。

先后次序与 transformers 一致（惩罚 → 温度 → top-k → top-p → min-p），同一组参数在两边含义相同。
这里没有 ``.item()``，也不按参数逐组循环：各行参数都不同时也是一次算完，每一步都不需要主机等设备。
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.errors import UserError

# 再低就当作 0：logits 除以它会溢出成 inf，softmax 就是 NaN；而 1e-5 时差 0.001 的两个词已经是 e^100 倍
COLDEST = 1e-5


@dataclass(frozen=True)
class SamplingParams:
    """一次生成的采样参数。

    Args:
        temperature: 0 表示贪心（此时其余截断参数不起作用），越大越随机；低于 ``COLDEST`` 的就是 0。
        top_k: 只在概率最高的 k 个里抽；0 表示不限。
        top_p: 只在累计概率刚好达到 p 的最小集合里抽（与末一名并列的也算）；1 表示不限。
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
        if self.temperature < COLDEST:
            object.__setattr__(self, "temperature", 0.0)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @cached_property
    def rule(self) -> SamplingParams:
        """去掉种子：每步按它分组。重造一份（含校验）约 6 µs，64 行就是每步 0.4 ms，所以只造一次。"""
        return self if self.seed is None else replace(self, seed=None)


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


HEAD = 256  # top-p 先看概率最大的多少个词


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
        probs_BV = torch.softmax(logits.float(), dim=-1)
        logits = logits.masked_fill(probs_BV < _nucleus_floor(probs_BV, top_p), minus_inf)
    if min_p > 0.0:
        probs_BV = torch.softmax(logits.float(), dim=-1)
        floor_B1 = probs_BV.amax(dim=-1, keepdim=True) * min_p
        logits = logits.masked_fill(probs_BV < floor_B1, minus_inf)
    return logits


def _nucleus_floor(probs: Tensor, top_p: float | Tensor) -> Tensor:
    """top-p 集合里最小的概率 ``[B, 1]``；``top_p`` 可以是各行的 ``[B, 1]``。

    整行排序 [1, 6400] 要 280 µs，[32, 6400] 要 11 ms；集合通常只有几十个词，CPU 上先取前 ``HEAD`` 名（11 µs 与
    1.7 ms），不够的那几行才排。两条路的累计值逐位相同，所以走哪条、同批还有谁都不影响结果。
    """

    def floor_of(ranked: Tensor, top_p: float | Tensor) -> tuple[Tensor, Tensor]:
        total = ranked.cumsum(dim=-1)
        # 排在它前面的累计已达 p 的才丢：保证集合刚好跨过 p，且第一名永远留下
        kept = ranked.masked_fill((total - ranked) >= top_p, 2.0)
        return kept.amin(dim=-1, keepdim=True), (total[:, -1:] >= top_p)[:, 0]

    if probs.device.type != "cpu" or probs.shape[-1] <= HEAD:
        return floor_of(probs.sort(dim=-1, descending=True).values, top_p)[0]
    floor, enough = floor_of(probs.topk(HEAD, dim=-1).values, top_p)
    if not bool(enough.all()):
        rest = (~enough).nonzero()[:, 0]
        rest_p = top_p[rest] if isinstance(top_p, Tensor) else top_p
        floor[rest] = floor_of(probs[rest].sort(dim=-1, descending=True).values, rest_p)[0]
    return floor


# ---------------------------------------------------------------- 各行各的参数与随机数（引擎用）


BLOCK = 128  # 两级抽样一块多少个词


def uniforms(seed: int, index: int, count: int) -> np.ndarray:
    """第 ``index`` 个样本第 0…count−1 步的均匀随机数，``[count]`` fp32，取值 [0, 1)。

    由计数器式发生器（Philox，Salmon 2011）按 ``(seed, index)`` 直接算出，与别的请求、批的大小、先来后到都无关。
    """
    key = np.array([seed % 2**64, index], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(count, dtype=np.float32)


def draw(logits: Tensor, temperature: float, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
    """逆分布函数抽样：累计概率第一个超过 ``uniform`` 的 token。

    分两级：先按每块 ``BLOCK`` 个词的概率和找到块，再在块里找。整行累加只能一个一个来，[64, 6400] 要 347 µs，
    两级共 40 µs。

    Args:
        logits: ``[B, V]`` fp32；不许抽的是 ``-inf``。
        temperature: 大于 0；等于 0 时取最大的，对数概率按温度 1。
        uniform: ``[B]``，[0, 1)；温度为 0 时用不着。

    Returns:
        token ``[B]`` int64 与它在抽样分布下的对数概率 ``[B]`` fp32。
    """
    if temperature not in (0.0, 1.0):
        logits = logits / temperature
    probs = logits.softmax(-1)
    if temperature == 0:
        ids = logits.argmax(-1, keepdim=True)
    else:
        blocks = F.pad(probs, (0, -probs.shape[1] % BLOCK)).view(len(probs), -1, BLOCK)
        block, rest = _first_above(blocks.sum(-1), uniform[:, None])
        chosen = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK))[:, 0]
        inside, _ = _first_above(chosen, rest / chosen.sum(-1, keepdim=True))
        ids = block * BLOCK + inside
        if logits.shape[1] % BLOCK:  # 补的行可能是 NaN，抽到末块补齐的部分去；越界的下标在卡上会毁掉整个进程
            ids = ids.clamp_max(logits.shape[1] - 1)
    return ids[:, 0], probs.gather(1, ids)[:, 0].log()


def _first_above(weight: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """``[B, n]`` 的累计里第一个超过 ``uniform · 总和`` 的下标 ``[B, 1]``，与目标在这一格里还剩多少 ``[B, 1]``。"""
    # 卡上并行累加的次序会让 fp32 的末几位不单调，概率为 0 的词就可能被抽到；MPS、NPU 没有双精度
    double = weight.device.type in ("cpu", "cuda")
    cumulative = weight.cumsum(-1, dtype=torch.float64 if double else None)
    total = cumulative[:, -1:]
    # 乘积可能因舍入等于末项，那样就没有谁超过它了
    target = torch.minimum(uniform.to(total.dtype) * total, total * (1 - 1e-6))
    index = torch.searchsorted(cumulative, target, right=True).clamp_max(weight.shape[1] - 1)
    before = cumulative.gather(1, index) - weight.gather(1, index).to(total.dtype)
    return index, (target - before).clamp_min(0).float()


def sample_rows(
    logits: Tensor, params: Sequence[SamplingParams], uniform: Tensor | None, seen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """每行按自己的参数抽下一个 token；都相同与各不相同，结果逐位一样。

    Args:
        logits: ``[B, V]``。
        params: 长 B。
        uniform: ``[B]``，各行这一步的随机数；都贪心时可以没有。
        seen: ``[B, V]`` bool，有重复惩罚时要。

    Returns:
        token ``[B]`` 与行为策略的对数概率 ``[B]``：惩罚、温度与截断之后真正抽样的那个分布；贪心时按温度 1。
    """
    rules = [one.rule for one in params]
    if all(rule == rules[0] for rule in rules):
        return sample_same(logits, rules[0], uniform, seen)
    logits = logits.float() if logits.dtype != torch.float32 else logits
    return _sample_mixed(logits, rules, uniform, seen)


def _sample_mixed(
    logits: Tensor, params: Sequence[SamplingParams], uniform: Tensor | None, seen: Tensor | None
) -> tuple[Tensor, Tensor]:
    """各行参数不同：参数排成一列 ``[B, 1]``，每种截断只算要它的那几行，算子的个数与有多少种参数无关。"""

    def given(values: Sequence[Any], dtype: torch.dtype | None = None) -> Tensor:
        """主机上的一列数送到设备上；不等它送到。"""
        return torch.tensor(values, dtype=dtype).to(logits.device, non_blocking=True)

    def column(values: Sequence[float]) -> Tensor:
        return given(values, logits.dtype)[:, None]

    if seen is not None:
        penalty = column([one.repetition_penalty for one in params])
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    logits = logits / column([one.temperature or 1.0 for one in params])

    def narrow(
        values: Sequence[float],
        active: Sequence[bool],
        floor: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> None:
        """要这种截断的各行：``floor`` 给出（比的是什么，下限），低于下限的设为 ``-inf``。"""
        rows = [i for i, on in enumerate(active) if on and not params[i].greedy]
        if rows:
            index = given(rows)
            part = logits[index]
            keyed, least = floor(part, column([values[i] for i in rows]))
            logits[index] = part.masked_fill(keyed < least, float("-inf"))

    def kth(part: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        most = max(min(one.top_k, part.shape[1]) for one in params)
        return part, part.topk(most, dim=-1).values.gather(1, k.long() - 1)

    def nucleus(part: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        probs = part.softmax(-1)
        return probs, _nucleus_floor(probs, p)

    def share(part: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        probs = part.softmax(-1)
        return probs, probs.amax(dim=-1, keepdim=True) * p

    top_k = [one.top_k for one in params]
    narrow(top_k, [0 < k < logits.shape[1] for k in top_k], kth)
    narrow([one.top_p for one in params], [one.top_p < 1 for one in params], nucleus)
    narrow([one.min_p for one in params], [one.min_p > 0 for one in params], share)
    if uniform is None:  # 都贪心，只是别的参数不同
        return draw(logits, 0.0, None)
    ids, logp = draw(logits, 1.0, uniform)
    cold = given([one.greedy for one in params])
    if any(one.greedy for one in params):
        best, best_logp = draw(logits, 0.0, None)
        ids, logp = torch.where(cold, best, ids), torch.where(cold, best_logp, logp)
    return ids, logp


def sample_same(
    logits: Tensor, params: SamplingParams, uniform: Tensor | None, seen: Tensor | None
) -> tuple[Tensor, Tensor]:
    """:func:`sample_rows`，各行同一份参数。不从主机送任何张量，所以能录进图里。"""
    logits = logits.float() if logits.dtype != torch.float32 else logits
    if seen is not None:
        logits = apply_repetition_penalty(logits, seen, params.repetition_penalty)
    if params.temperature and (params.top_k or params.top_p < 1 or params.min_p):
        scaled = filter_logits(logits / params.temperature, params.top_k, params.top_p, params.min_p)
        return draw(scaled, 1.0, uniform)
    return draw(logits, params.temperature, uniform)
