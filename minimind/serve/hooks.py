"""对采样的干预：词元偏置、出现与次数惩罚、什么时候许停。每个样本一份，由引擎在抽样前后调用。"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from minimind.inference.engine import LogitsHook


class BiasHook:
    """``logits + bias − presence·[出现过] − frequency·次数``；只数回答里写过的（OpenAI 的定义）。"""

    def __init__(self, bias: Mapping[int, float], presence: float, frequency: float):
        self.bias, self.presence, self.frequency = bias, presence, frequency
        self.counts: dict[int, int] = {}

    def adjust(self, logits: Tensor) -> None:
        """就地改 ``[V]``。"""
        deltas = dict(self.bias)
        for token, count in self.counts.items():
            deltas[token] = deltas.get(token, 0.0) - self.presence - self.frequency * count
        if deltas:
            index = torch.tensor(list(deltas), device=logits.device)
            logits[index] += torch.tensor(list(deltas.values()), dtype=logits.dtype, device=logits.device)

    def accept(self, token: int) -> bool:
        if self.presence or self.frequency:
            self.counts[token] = self.counts.get(token, 0) + 1
        return False


class StopHook:
    """什么时候许停：``min_tokens`` 之前、``ignore_eos`` 时不写结束符；写下 ``stop_token_ids`` 里的就停。

    放在最后：别的干预只放行结束符时（格式写完了），就让它停。
    """

    def __init__(self, eos_ids: Iterable[int], stop_ids: Iterable[int], least: int, ignore_eos: bool):
        self.eos_ids, self.stop_ids = set(eos_ids), set(stop_ids)
        self.least, self.ignore_eos, self.written = least, ignore_eos, 0

    def adjust(self, logits: Tensor) -> None:
        early = self.written < self.least
        banned = self.eos_ids if early or self.ignore_eos else set()
        banned = banned | self.stop_ids if early else banned - self.stop_ids
        if not banned:
            return
        kept = logits[list(banned)]
        logits[list(banned)] = float("-inf")
        if not torch.isfinite(logits).any():
            logits[list(banned)] = kept

    def accept(self, token: int) -> bool:
        self.written += 1
        return token in self.stop_ids


class HookChain:
    """依次干预；谁说停就停。"""

    def __init__(self, hooks: Sequence[LogitsHook]):
        self.hooks = hooks

    def adjust(self, logits: Tensor) -> None:
        for hook in self.hooks:
            hook.adjust(logits)

    def accept(self, token: int) -> bool:
        return any([hook.accept(token) for hook in self.hooks])


def make_hook(
    request: Any, eos_ids: Iterable[int], form: Callable[[], LogitsHook] | None
) -> Callable[[], LogitsHook] | None:
    """按请求给出造干预的函数；什么都不用干预时是 ``None``。

    Args:
        request: :class:`minimind.serve.schemas.Sampling`。
        eos_ids: 结束符。
        form: 造格式约束的函数。
    """
    penalised = request.logit_bias or request.presence_penalty or request.frequency_penalty
    makers: list[Callable[[], LogitsHook]] = []
    if penalised:
        bias = request.logit_bias or {}
        makers.append(
            lambda: BiasHook(bias, request.presence_penalty or 0.0, request.frequency_penalty or 0.0)
        )
    if form is not None:
        makers.append(form)
    stop_ids, least = request.stop_token_ids or [], request.min_tokens or 0
    if stop_ids or least or request.ignore_eos:
        makers.append(lambda: StopHook(eos_ids, stop_ids, least, bool(request.ignore_eos)))
    if not makers:
        return None
    return makers[0] if len(makers) == 1 else lambda: HookChain([make() for make in makers])
