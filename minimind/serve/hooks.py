"""对采样的干预：词元偏置与惩罚、什么时候许停、回答的格式。每个样本一份，由引擎在抽样前后调用。

格式是一段接一段（:class:`FormHook`）：先想，再写约束好的正文，或先想，再写一个或几个调用；各段说下一个词元许写什么、
写下之后这一段完了没有。标签与布局按词元定，与模板渲染的相同；标签之间的文字由 :mod:`minimind.serve.grammar` 管。
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from minimind.inference.engine import LogitsHook
from minimind.serve.grammar import CompiledText

MINUS_INF = float("-inf")


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
        request: :class:`minimind.serve.sampling_fields.Sampling`。
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


class GrammarStage(Protocol):
    """一段。"""

    def adjust(self, logits: Tensor) -> None:
        """抽样之前就地改 ``[V]``。"""

    def accept(self, token: int) -> list[GrammarStage] | None:
        """写下了 ``token``：还没完是 ``None``，完了给出紧接着的几段。"""


def allow_only(logits: Tensor, tokens: Sequence[int]) -> None:
    """``tokens`` 之外的都不许写。"""
    index = torch.tensor(list(tokens), device=logits.device)
    kept = logits[index]
    logits.fill_(MINUS_INF)
    logits[index] = kept


class Thinking:
    """随便想，到 ``</think>`` 为止；想停笔就是想完了：结束符的分数算给 ``</think>``。"""

    def __init__(self, end: int, stops: Sequence[int]):
        self.end, self.stops = end, list(stops)

    def adjust(self, logits: Tensor) -> None:
        best = logits[torch.tensor(self.stops, device=logits.device)].max()
        logits[self.end] = torch.maximum(logits[self.end], best)
        logits[self.stops] = MINUS_INF

    def accept(self, token: int) -> list[GrammarStage] | None:
        return [] if token == self.end else None


class Exactly:
    """就写这几个词元。"""

    def __init__(self, tokens: Sequence[int]):
        self.left = deque(tokens)

    def adjust(self, logits: Tensor) -> None:
        allow_only(logits, [self.left[0]])

    def accept(self, token: int) -> list[GrammarStage] | None:
        self.left.popleft()
        return None if self.left else []


class Constrained:
    """合乎文法的文字，以 ``stops`` 里的一个结束。

    Args:
        instead: 第一个词元也可以写这里面的，写了就改走它给出的几段。
    """

    def __init__(
        self,
        text: CompiledText,
        stops: Sequence[int],
        instead: Mapping[int, Callable[[], list[GrammarStage]]] | None = None,
    ):
        self.matcher, self.instead = text.matcher(stops), dict(instead or {})

    def adjust(self, logits: Tensor) -> None:
        allowed = torch.from_numpy(self.matcher.allowed(logits)).to(logits.device)
        for token in self.instead:
            allowed[token] = True
        logits.masked_fill_(~allowed, MINUS_INF)

    def accept(self, token: int) -> list[GrammarStage] | None:
        instead, self.instead = self.instead, {}
        if token in instead:
            return instead[token]()
        return [] if self.matcher.accept(token) else None


class Again:
    """停笔，或者再来一段：最想写的正是 ``token`` 才再来，不然停。抽样的手气不该决定要不要多调用一次。"""

    def __init__(self, token: int, stops: Sequence[int], following: Callable[[], list[GrammarStage]]):
        self.token, self.stops, self.following = token, list(stops), following

    def adjust(self, logits: Tensor) -> None:
        again = int(logits.argmax()) == self.token
        allow_only(logits, [self.token] if again else self.stops)

    def accept(self, token: int) -> list[GrammarStage] | None:
        return self.following() if token == self.token else []


class Free:
    """随便写到结束符。"""

    def adjust(self, logits: Tensor) -> None:
        pass

    def accept(self, token: int) -> list[GrammarStage] | None:
        return None


class FormHook:
    """依次走各段，走完就停。"""

    def __init__(self, stages: Sequence[GrammarStage]):
        self.stages = deque(stages)

    def adjust(self, logits: Tensor) -> None:
        if self.stages:
            self.stages[0].adjust(logits)

    def accept(self, token: int) -> bool:
        if self.stages and (following := self.stages[0].accept(token)) is not None:
            self.stages.popleft()
            self.stages.extendleft(reversed(following))
        return not self.stages


def call_stages(
    text: CompiledText, begin: int, end: int, newline: Sequence[int], stops: Sequence[int], several: bool
) -> list[GrammarStage]:
    """``<tool_call>`` 之后：一个调用；``several`` 时其后或者停笔，或者换行再来一个。

    Args:
        begin, end: ``<tool_call>`` 与 ``</tool_call>``。
        newline: 两个调用之间的换行。
        stops: 结束符。
    """
    one = Constrained(text, [end])
    if not several:
        return [one]

    def again() -> list[GrammarStage]:
        return [Exactly([*newline[1:], begin]), *call_stages(text, begin, end, newline, stops, True)]

    return [one, Again(newline[0], stops, again)]
