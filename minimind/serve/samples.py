"""一个样本从词元到答案：文字、思考、工具调用、停止串、对数概率；流式与不流式走同一条路。"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from minimind.inference.generate import TextStream
from minimind.inference.reply import (
    BadCall,
    CallArguments,
    CallEnd,
    CallStart,
    ReasoningDelta,
    ReplyParser,
    TextDelta,
)
from minimind.serve.stops import StopMatcher
from minimind.serve.tickets import Progress, TokenOut
from minimind.tokenizer.vocabulary import Vocabulary

FINISH = {"stop": "stop", "length": "length", "cancelled": "stop"}


@dataclass
class ChatSample:
    """聊天的一个样本。

    Args:
        calls: 请求里有没有工具；没有时模型自己写的调用当正文给（标签不给），客户端没有准备接 ``tool_calls``。
        opening: 提示末尾已经替它写好的词元（必须调用工具时是 ``<tool_call>``），一并交给解析器。
    """

    index: int
    parser: ReplyParser
    stops: StopMatcher
    eos_ids: set[int]
    calls: bool = True
    opening: list[int] = field(default_factory=list)
    tokens: list[TokenOut] = field(default_factory=list)  # 还没随正文报出去的
    written: int = 0
    finish_reason: str | None = None
    called: bool = False

    def push(self, progress: Progress) -> Iterator[dict[str, Any]]:
        """放入新词元，逐个给出流式的 ``delta``。"""
        for token in self.opening:
            yield from self._deltas(self.parser.push(token))
        self.opening = []
        for token in progress.tokens:
            self.written += 1
            if token.id in self.eos_ids:
                continue
            self.tokens.append(token)
            yield from self._deltas(self.parser.push(token.id))
            if self.stops.matched is not None:
                break
        if self.stops.matched is not None:
            self.finish_reason = "stop"
        elif progress.finished:
            yield from self._deltas(self.parser.finish())
            if rest := self.stops.finish():
                yield {"content": rest}
            self.finish_reason = "tool_calls" if self.called else FINISH[progress.finished]

    def _deltas(self, events: list[Any]) -> Iterator[dict[str, Any]]:
        for event in events:
            if self.stops.matched is not None:
                return
            if isinstance(event, TextDelta):
                if text := self.stops.push(event.text):
                    yield {"content": text}
            elif isinstance(event, ReasoningDelta):
                yield {"reasoning_content": event.text}
            elif not self.calls:
                if isinstance(event, CallEnd | BadCall) and (text := self.stops.push(event.call.raw.strip())):
                    yield {"content": text}
            elif isinstance(event, CallStart):
                self.called = True
                function = {"name": event.name, "arguments": ""}
                yield {
                    "tool_calls": [
                        {"index": event.index, "id": event.id, "type": "function", "function": function}
                    ]
                }
            elif isinstance(event, CallArguments):
                yield {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}
            elif isinstance(event, CallEnd):
                continue  # 名字与参数都已给出
            else:  # 连名字都读不出的调用：原文当正文给，标签不给
                yield {"content": event.call.raw}

    def take_logprobs(self, vocabulary: Vocabulary) -> dict[str, Any]:
        """到目前为止还没报的词元的对数概率，OpenAI 聊天的形状。"""
        tokens, self.tokens = self.tokens, []
        return {"content": [chat_logprob(token, vocabulary) for token in tokens], "refusal": None}


def chat_logprob(token: TokenOut, vocabulary: Vocabulary) -> dict[str, Any]:
    def one(token_id: int, logprob: float) -> dict[str, Any]:
        data = vocabulary.bytes_of(token_id)
        return {"token": vocabulary.text_of(token_id), "logprob": finite(logprob), "bytes": list(data)}

    return {**one(token.id, token.logprob), "top_logprobs": [one(*pair) for pair in token.top]}


def finite(logprob: float) -> float:
    """JSON 里没有 −∞；用 OpenAI 表示“极不可能”的 −9999。"""
    return max(logprob, -9999.0)


@dataclass
class TextSample:
    """续写的一个样本。结束符没有文字，但报对数概率：lm-evaluation-harness 按“最后一个是写出来的”切片，强化学习也要它。"""

    index: int
    stream: TextStream
    stops: StopMatcher
    eos_ids: set[int]
    offset: int = 0  # 已给出的文字长度，logprobs 的 text_offset 用
    ids: list[int] = field(default_factory=list)
    tokens: list[TokenOut] = field(default_factory=list)
    written: int = 0
    finish_reason: str | None = None

    def push(self, progress: Progress) -> str:
        """放入新词元，返回可以给出的文字。"""
        pieces = []
        for token in progress.tokens:
            self.written += 1
            self.ids.append(token.id)
            self.tokens.append(token)
            if token.id in self.eos_ids:
                continue
            pieces.append(self.stops.push(self.stream.push(token.id)))
            if self.stops.matched is not None:
                break
        if self.stops.matched is not None:
            self.finish_reason = "stop"
        elif progress.finished:
            pieces.append(self.stops.push(self.stream.finish()))
            pieces.append(self.stops.finish())
            self.finish_reason = "stop" if self.stops.matched is not None else FINISH[progress.finished]
        return "".join(pieces)

    def take_ids(self) -> list[int]:
        ids, self.ids = self.ids, []
        return ids

    def take_logprobs(self, vocabulary: Vocabulary, prompt: list[TokenOut] = ()) -> dict[str, Any]:
        """还没报的词元的对数概率，OpenAI 续写的形状；``prompt`` 是 ``echo`` 时的提示。"""
        tokens, self.tokens = [*prompt, *self.tokens], []
        texts = [vocabulary.text_of(token.id) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self.offset)
            self.offset += len(text)
        blank = [token.logprob != token.logprob for token in tokens]  # nan：第一个词元没有前文
        return {
            "tokens": texts,
            "token_logprobs": [None if no else finite(t.logprob) for t, no in zip(tokens, blank)],
            "top_logprobs": [
                None if no else {vocabulary.text_of(i): finite(p) for i, p in (*t.top, (t.id, t.logprob))}
                for t, no in zip(tokens, blank)
            ],
            "text_offset": offsets,
        }
