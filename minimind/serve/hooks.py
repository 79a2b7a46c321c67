"""对采样的干预：词元偏置、出现与次数惩罚、按文法约束。每个样本一份，由引擎在抽样前后调用。"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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


class GrammarHook:
    """只许写出合乎文法的词元；文法走完就停。

    Args:
        matcher: ``xgrammar.GrammarMatcher``。
        vocab_size: logits 的宽度。
    """

    def __init__(self, matcher: Any, vocab_size: int):
        import xgrammar

        self.matcher, self._apply = matcher, xgrammar.apply_token_bitmask_inplace
        self.bitmask = xgrammar.allocate_token_bitmask(1, vocab_size)

    def adjust(self, logits: Tensor) -> None:
        self.matcher.fill_next_token_bitmask(self.bitmask)
        self._apply(logits.unsqueeze(0), self.bitmask.to(logits.device))

    def accept(self, token: int) -> bool:
        self.matcher.accept_token(token)
        return self.matcher.is_terminated()


class HookChain:
    """依次干预；谁说停就停。"""

    def __init__(self, hooks: Sequence[LogitsHook]):
        self.hooks = hooks

    def adjust(self, logits: Tensor) -> None:
        for hook in self.hooks:
            hook.adjust(logits)

    def accept(self, token: int) -> bool:
        return any([hook.accept(token) for hook in self.hooks])


def make_hook(request: Any, grammar: Callable[[], LogitsHook] | None) -> Callable[[], LogitsHook] | None:
    """按请求给出造干预的函数；什么都不用干预时是 ``None``。

    Args:
        request: :class:`minimind.serve.schemas.Sampling`。
        grammar: 造文法约束的函数。
    """
    penalised = request.logit_bias or request.presence_penalty or request.frequency_penalty
    makers: list[Callable[[], LogitsHook]] = []
    if penalised:
        bias = request.logit_bias or {}
        makers.append(
            lambda: BiasHook(bias, request.presence_penalty or 0.0, request.frequency_penalty or 0.0)
        )
    if grammar is not None:
        makers.append(grammar)
    if not makers:
        return None
    return makers[0] if len(makers) == 1 else lambda: HookChain([make() for make in makers])
