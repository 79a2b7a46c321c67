"""多轮采样：模型 → 调用工具 → 结果 → 再让模型写，直到它不再调用；整批对话一起走。

词元进、词元出，跨回合也是：第 k + 1 回合的提示就是到第 k 回合为止的全部 id 接上工具结果的 id，模型写过的从不解码再编码。
所以第 k 回合算过的 KV 照用（引擎的前缀库），训练时一次前向就得到每一回合的对数概率。工具的结果（observation）只是上文：
不进损失，不进词元数。

一段对话有三种结局：``answered`` 写了不带调用的回答；``turns`` 到了回合数上限还在调用；``length`` 写满一回合的上限，
或全长放不下了。后两种叫“没写完”。
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from minimind.errors import UserError
from minimind.inference.engine import Engine
from minimind.inference.loading import stop_ids
from minimind.inference.reply import Reply, parse_reply
from minimind.inference.sampling import SamplingParams
from minimind.inference.tool_calls import ToolCall
from minimind.inference.tool_loop import MAX_CALLS_PER_ROUND
from minimind.rl.rollout import IGNORE, Rollout
from minimind.runtime.checkpoint import unwrap
from minimind.runtime.device import mix_seeds
from minimind.tokenizer import encode_chat
from minimind.tokenizer.special import END_THINK, END_TOOL_CALL, THINK, TOOL_CALL
from minimind.tokenizer.templates import opens_thinking

PAIRS = ((THINK, END_THINK), (TOOL_CALL, END_TOOL_CALL))
ANSWERED, OUT_OF_TURNS, OUT_OF_LENGTH = "answered", "turns", "length"


class Tools(Protocol):
    """能检查、能执行调用的东西，例如 :class:`minimind.tools.Toolbox`。"""

    def problem(self, call: ToolCall) -> str | None: ...

    def run(self, call: ToolCall) -> str: ...


class Opening(NamedTuple):
    """一段对话的开头：提示的 id（末尾是助手回合的开头）、它的工具、提示里的思考开关。"""

    ids: list[int]
    tools: Tools
    thinking: bool | None = None


@dataclass
class Trajectory:
    """一段对话走到了哪里。

    Args:
        opening: 开头。
        group, index: 第几个提示的第几条。
        ids: 到此为止的全部 id：提示、各回合写的、各次工具结果，照发生的次序。
        written: 与 ``ids`` 等长，真的是模型写的（含结束符）。
        logprobs: 写的各个 id 的对数概率，采样温度下。
        replies: 各回合解析出的正文、思考与调用。
        results: 各次调用的结果（JSON 文字）；``problems`` 与它一一对应：调用不合说明时的一句话，合的是 ``None``。
        ending: 结局；还在走的是空串。
        unclosed: 有哪一回合的标签开头与收尾不一样多。
    """

    opening: Opening
    group: int
    index: int
    ids: list[int]
    written: list[bool]
    logprobs: list[float] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    results: list[str] = field(default_factory=list)
    problems: list[str | None] = field(default_factory=list)
    ending: str = ""
    unclosed: bool = False

    @property
    def calls(self) -> list[ToolCall]:
        """全部调用，包括写坏的与没有执行的。"""
        return [call for reply in self.replies for call in reply.calls]

    @property
    def answer(self) -> str:
        """最后的回答；没写完的没有回答，是空串。"""
        return self.replies[-1].text if self.ending == ANSWERED else ""

    @property
    def errors(self) -> int:
        """多少次结果是一句错误：调用不合说明，或工具自己用不了。"""
        return sum(result.startswith('{"error"') for result in self.results)

    def wrote(self, ids: list[int], logprobs: list[float], reply: Reply) -> None:
        """模型写完了一回合。"""
        self.ids = [*self.ids, *ids]
        self.written += [True] * len(ids)
        self.logprobs += logprobs
        self.replies.append(reply)

    def observed(self, ids: list[int]) -> None:
        """工具的结果，连同下一回合的开头。"""
        self.ids = [*self.ids, *ids]
        self.written += [False] * len(ids)


@dataclass
class Trajectories(Rollout):
    """多轮的一次采样；``responses`` 是各条里模型写的 id（几回合接起来），与 ``logprobs`` 等长。

    ``truncated`` 真为没写完，``texts`` 是最后的回答。
    """

    conversations: list[Trajectory]

    def piece(self, row: int) -> tuple[list[int], list[int]]:
        """整段对话的 id 与 labels：只有模型写的是目标。"""
        one = self.conversations[row]
        return one.ids, [token if own else IGNORE for token, own in zip(one.ids, one.written)]


class WrittenTurn(NamedTuple):
    """写完的一回合：``key`` 是交代时的编号，``index`` 是其中第几条；``complete`` 真为写出了结束符。"""

    key: int
    index: int
    ids: list[int]
    logprobs: list[float]
    complete: bool


class EngineWriter:
    """在本进程的引擎里写：谁写完谁先走下一回合，不等别人。"""

    def __init__(
        self, model: nn.Module, tokenizer: Any, *, max_slots: int, room: int, temperature: float, dtype: Any
    ):
        model = unwrap(model)
        self.temperature = temperature
        self.engine = Engine(
            model,
            eos_ids=stop_ids(model, tokenizer),
            max_slots=max_slots,
            dtype=dtype,
            stride=8,
            prefix_cache_tokens=max_slots * room,
        )

    def begin(self) -> None:
        """权重变了。"""
        self.engine.refresh()

    def add(self, ids: list[int], limit: int, seed: int, n: int = 1) -> int:
        return self.engine.add_request(
            ids, SamplingParams(temperature=self.temperature, seed=seed), limit, n=n
        )

    def finished(self) -> Iterator[WrittenTurn]:
        """刚写完的；都写完了才没有。"""
        while self.engine.has_unfinished:
            if done := self.engine.step():
                for one in sorted(done, key=lambda s: (s.request_id, s.index)):
                    yield WrittenTurn(
                        one.request_id, one.index, one.ids, one.logprobs, one.finished == "stop"
                    )


class RemoteWriter:
    """请远处的采样服务写（:class:`minimind.rl.remote.RemoteRollout`）：各段对话的同一回合一起问。"""

    def __init__(self, sampler: Any):
        self.sampler, self.waiting, self.next = sampler, [], 0

    def begin(self) -> None:
        self.waiting = []

    def add(self, ids: list[int], limit: int, seed: int, n: int = 1) -> int:
        self.waiting.append((self.next, ids, limit, seed, n))
        self.next += 1
        return self.next - 1

    def finished(self) -> Iterator[WrittenTurn]:
        while self.waiting:
            asked, self.waiting = self.waiting, []
            n = asked[0][4]  # 第一回合各 n 条，以后各一条
            rollout = self.sampler.generate([ids for _, ids, *_ in asked], n, asked[0][3])
            for row, (ids, logprobs, cut) in enumerate(
                zip(rollout.responses, rollout.logprobs, rollout.truncated)
            ):
                key, _, limit, *_ = asked[rollout.group[row]]
                # 服务只知道一个长度上限；超出这一段余地的截掉，与一开始就只给这么多是同一个分布
                whole = not cut and len(ids) <= limit
                yield WrittenTurn(key, row % n, ids[:limit], logprobs[:limit].tolist(), whole)


class ConversationRollout:
    """整批对话一起走的多轮采样。

    Args:
        writer: 谁来写：:class:`EngineWriter` 或 :class:`RemoteWriter`。
        tokenizer: 编码工具的结果，解析调用。
        max_new_tokens: 一回合最多写多少个 token。
        max_total_len: 一段对话（提示、各回合、各次结果）全长的上限。
        max_turns: 最多写几回合。
    """

    def __init__(
        self, writer: Any, tokenizer: Any, *, max_new_tokens: int, max_total_len: int, max_turns: int
    ):
        self.writer, self.tokenizer = writer, tokenizer
        self.max_new_tokens, self.max_total_len, self.max_turns = max_new_tokens, max_total_len, max_turns

    def generate(self, openings: Sequence[Opening], num_generations: int, seed: int) -> Trajectories:
        """每个开头走 ``num_generations`` 段；结果只由权重、开头、工具与 ``seed`` 决定。

        Raises:
            UserError: 提示为空，或已经到了全长的上限。
        """
        self.writer.begin()
        live: dict[tuple[int, int], Trajectory] = {}
        for group, opening in enumerate(openings):
            room = self._room(opening.ids)
            if room < 1:
                raise UserError(
                    f"提示有 {len(opening.ids)} 个 token", where="--max_total_len",
                    expected=f"比它大（现在是 {self.max_total_len}）", fix="加大它，或减小 --max_seq_len 丢掉长提示",
                )  # fmt: skip
            key = self.writer.add(opening.ids, room, mix_seeds(seed, group), num_generations)
            for index in range(num_generations):
                ids = list(opening.ids)
                live[key, index] = Trajectory(opening, group, index, ids, [False] * len(ids))
        everyone = list(live.values())
        while live:
            for turn in self.writer.finished():
                one = live.pop((turn.key, turn.index))
                self._advance(one, turn)
                if not one.ending:
                    again = mix_seeds(seed, one.group, one.index, len(one.replies))
                    live[self.writer.add(one.ids, self._room(one.ids), again), 0] = one
        return trajectories(everyone)

    def _room(self, ids: list[int]) -> int:
        """这一回合还能写几个。"""
        return min(self.max_new_tokens, self.max_total_len - len(ids))

    def _advance(self, one: Trajectory, turn: WrittenTurn) -> None:
        """记下刚写完的一回合；有调用就执行，接上结果。"""
        thinking = opens_thinking(self.tokenizer, one.ids)
        reply = parse_reply(turn.ids, tokenizer=self.tokenizer, thinking=thinking)
        one.wrote(turn.ids, turn.logprobs, reply)
        text = THINK * thinking + self.tokenizer.decode(turn.ids, skip_special_tokens=False)
        one.unclosed |= any(text.count(start) != text.count(end) for start, end in PAIRS)
        calls = reply.calls
        if not turn.complete:
            one.ending = OUT_OF_LENGTH
        elif not calls:
            one.ending = ANSWERED
        elif len(one.replies) >= self.max_turns:
            one.ending = OUT_OF_TURNS
        else:
            results = [self._run(one.opening.tools, number, call) for number, call in enumerate(calls)]
            more = observation_ids(self.tokenizer, results, one.opening.thinking)
            one.problems += [one.opening.tools.problem(call) for call in calls]
            one.results += results
            if len(one.ids) + len(more) >= self.max_total_len:
                one.ending = OUT_OF_LENGTH
            else:
                one.observed(more)

    def _run(self, tools: Tools, number: int, call: ToolCall) -> str:
        if number >= MAX_CALLS_PER_ROUND:
            return json.dumps({"error": f"一次最多 {MAX_CALLS_PER_ROUND} 个调用"}, ensure_ascii=False)
        return tools.run(call)


def trajectories(conversations: Sequence[Trajectory]) -> Trajectories:
    """走完的各段 → 训练要的样子。"""
    return Trajectories(
        prompts=[one.opening.ids for one in conversations],
        responses=[[token for token, own in zip(one.ids, one.written) if own] for one in conversations],
        logprobs=[torch.tensor(one.logprobs) for one in conversations],
        truncated=[one.ending != ANSWERED for one in conversations],
        texts=[one.answer for one in conversations],
        group=[one.group for one in conversations],
        conversations=list(conversations),
    )


_ASKED = [
    {"role": "user", "content": "问"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
    },
]


def observation_ids(tokenizer: Any, results: Sequence[str], thinking: bool | None = None) -> list[int]:
    """模板里，调用的那一回合的结束符之后、下一回合的第一个词元之前的 id。

    与对话渲染用的是同一份（:func:`minimind.tokenizer.encode_chat`）：结果里写着控制 token 的字样也只是普通字符。

    Args:
        results: 各次调用的结果。
        thinking: 下一回合提示里的思考开关。

    Raises:
        UserError: 分词器的模板把工具结果写到了助手回合里面，拆不开。
    """
    told = [*_ASKED, *({"role": "tool", "content": text} for text in results)]
    head = encode_chat(tokenizer, _ASKED).ids
    whole = encode_chat(tokenizer, told, None, True, enable_thinking=thinking).ids
    eos = tokenizer.eos_token_id
    if eos not in head or head[: (cut := len(head) - head[::-1].index(eos))] != whole[:cut]:
        raise UserError(
            "这个分词器的对话模板在工具结果前后改写了助手的回合，多轮的词元接不起来",
            where="--tokenizer_path",
            fix="换一个模板不改写历史的分词器，例如自带的",
        )
    return whole[cut:]
