"""引擎里的几样数据：请求（从 HTTP 到写着的一行都是这一份）、排队时的进度、它的各个样本、正在写的一行。

提示放不放得下也在这里判。
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from minimind.errors import UserError
from minimind.inference.sampling import SamplingParams


class LogitsHook(Protocol):
    """对一个样本的干预：文法约束、词元偏置……每个样本一份，可以有状态。"""

    def adjust(self, logits: Tensor) -> None:
        """抽样之前就地改 ``[V]`` fp32 的 logits。"""

    def accept(self, token: int) -> bool:
        """写下了这个 token；返回真就到此为止（``"stop"``）。"""


@dataclass
class Sequence:
    """一个样本。

    Args:
        request_id, index: 哪个请求的第几个样本。
        prompt_ids: 提示。
        ids: 抽到的 token，抽到结束符时 **含** 结束符。
        logprobs: 与 ``ids`` 等长，抽样时（惩罚、温度、截断之后的分布下）的对数概率；贪心时按温度 1。
        finished: ``"stop"`` 写出结束符，``"length"`` 到长度上限，``"cancelled"`` 被取消，``None`` 还在写。
        top: 要了候选时，各 token 在 *模型自己* 的分布（温度 1，惩罚与干预之前）下的对数概率，与最可能的几个
            ``(id, 对数概率)``。
        cached: 提示里有多少个 token 是从前缀库抄来的，没有重算。
        scored: 要给提示打分时，提示第二个 token 起各自的对数概率与候选，形状同 ``top``。
        guessed: ``ids`` 里有几个是先猜中的（:mod:`minimind.inference.speculative`）。
    """

    request_id: int
    index: int
    prompt_ids: list[int]
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: str | None = None
    top: list[tuple[float, tuple[tuple[int, float], ...]]] = field(default_factory=list)
    cached: int = 0
    scored: list[tuple[float, tuple[tuple[int, float], ...]]] = field(default_factory=list)
    guessed: int = 0


@dataclass(frozen=True)
class Request:
    """要写什么。服务、信箱、引擎、槽位里都是同一份，谁也不改它。

    Args:
        prompt_ids: 提示，``n`` 个样本共用一次计算。
        limit: 每个样本最多写多少个 token；引擎排队时按上下文收紧。
        hook: 给每个样本造一份干预；有干预的样本在场时每个 token 都要与主机对一次。
        top_logprobs: 每个 token 另记几个候选，0 表示只记它自己的，``None`` 不记。
        score: 给提示的每个 token 也打分，另记几个候选；``None`` 不打。要打分的提示每个位置都得算，不从前缀库抄。
        processed: 报出的对数概率用抽样时的分布（温度、惩罚、截断之后），候选的不变；引擎两样都记，送出时才挑。
    """

    prompt_ids: list[int]
    params: SamplingParams
    limit: int
    n: int = 1
    hook: Callable[[], LogitsHook] | None = None
    top_logprobs: int | None = None
    score: int | None = None
    processed: bool = False


@dataclass
class Pending:
    """排着的请求读到了哪里。

    Args:
        waiting: 还没进场的样本。
        read: 提示已经读了多少个。
        kept: 槽位不够 n 个时，提示的 KV 与末尾 logits 先存着。
        cached: 见 :class:`Sequence`。
        shareable: 算出的 KV 能不能给别的请求用；读了之后换过权重就不能了。
        scored: 已经打了的分。
    """

    request: Request
    seed: int
    waiting: list[Sequence]
    read: int = 0
    kept: Any = None
    cached: int = 0
    shareable: bool = True
    scored: list[tuple[float, tuple[tuple[int, float], ...]]] = field(default_factory=list)

    @property
    def prompt_ids(self) -> list[int]:
        """它的提示。"""
        return self.request.prompt_ids

    def note(self, start: int, logits: Tensor) -> None:
        """记下位置 ``start`` 起的一段 logits ``[T, V]`` 给后一个 token 的分数；提示的最后一个位置没有后一个。"""
        targets = self.prompt_ids[start + 1 : start + 1 + len(logits)]
        if not targets:
            return
        logp = logits[: len(targets)].float().log_softmax(-1)
        index = torch.tensor(targets, device=logits.device)[:, None]
        k = self.request.score
        values, near = logp.topk(max(1, k), dim=-1)
        rows = zip(logp.gather(1, index)[:, 0].tolist(), near.tolist(), values.tolist())
        self.scored += [(own, tuple(zip(ids[:k], best[:k]))) for own, ids, best in rows]


@dataclass
class Row:
    """正在写的一行；``trace`` 是猜它后面写什么的人记的（:mod:`minimind.inference.speculative`）。"""

    sequence: Sequence
    request: Request
    hook: LogitsHook | None = None
    shareable: bool = True
    trace: Any = None

    @property
    def length(self) -> int:
        """缓存里已写的位置数：最新的 token 下一步才写进去。"""
        return len(self.sequence.prompt_ids) + len(self.sequence.ids) - 1


def shared_rule(rows: list[Row]) -> SamplingParams | None:
    """各行共同的抽样规则；不止一条，或谁有干预、要候选，是 ``None``。"""
    first = rows[0].request.params.rule
    for row in rows:
        rule = row.request.params.rule
        if row.hook or row.request.top_logprobs is not None or (rule is not first and rule != first):
            return None
    return first


def context_length(model: nn.Module) -> int:
    """模型位置表的长度，即提示加回答最多多少个 token。"""
    config = model.config
    if not hasattr(config, "max_position_embeddings"):  # 多模态的写在里面一层
        config = config.get_text_config()
    return int(config.max_position_embeddings)


def room_for_prompt(prompt_length: int, max_new_tokens: int, context: int) -> int:
    """还能生成多少个 token。

    Raises:
        UserError: 提示为空，或提示已占满上下文。
    """
    if prompt_length == 0:
        raise UserError("提示里没有任何 token", expected="至少一个 token", fix="输入一些文字")
    if prompt_length >= context:
        raise UserError(
            f"提示有 {prompt_length} 个 token，模型的上下文只有 {context} 个",
            expected=f"提示不超过 {context - 1} 个 token，至少留一个给回答",
            fix="缩短提示或减少 --historys 携带的历史",
        )
    return min(max_new_tokens, context - prompt_length)
