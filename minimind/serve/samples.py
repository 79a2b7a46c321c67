"""一个样本从词元到答案：文字、思考、工具调用、停止串、对数概率；流式与不流式走同一条路。"""

from __future__ import annotations

import codecs
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
from minimind.serve.tickets import Increment, TokenOut
from minimind.tokenizer.vocabulary import Vocabulary

FINISH = {"stop": "stop", "length": "length", "cancelled": "stop"}


@dataclass
class ChatSample:
    """聊天的一个样本。

    模型写完了（不是截断）而思考没有收尾、又没有写正文与调用，那它写的就是回答（:attr:`unclosed`）：重新认一遍，当正文
    与调用给。

    Args:
        calls: 请求里有没有工具；没有时模型自己写的调用当正文给（标签不给），客户端没有准备接 ``tool_calls``。
        opening: 提示末尾已经替它写好的词元（必须调用工具时是 ``<tool_call>``），一并交给解析器。
        written_before: 接着写时，最后一条消息里助手已经写下的词元；客户端已经有了，不再给。
        stop_ids: 写下就停、不给出文字的词元。
        least: 写够这么多个词元之前，停止串不算数。
        one_call: 写完第一个调用就停。
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
    written_before: list[int] = field(default_factory=list)
    stop_ids: set[int] = field(default_factory=set)
    least: int = 0
    one_call: bool = False
    unclosed: bool = False
    _ids: list[int] = field(default_factory=list)  # 还没有正文与调用时写下的全部
    _said: bool = False  # 有了正文或调用
    _called: list[bool] = field(default_factory=list)  # 各个写完的调用能不能执行

    def push(self, progress: Increment) -> Iterator[dict[str, Any]]:
        """放入新词元，逐个给出流式的 ``delta``。"""
        if before := self.written_before:
            self.written_before = []
            yield from self._deltas(self.parser.resume(before))
        opening, self.opening = self.opening, []
        for token in opening:
            yield from self._deltas(self.parser.push(token))
        for token in progress.tokens:
            self.written += 1
            if token.id in self.eos_ids:
                continue
            self.tokens.append(token)
            if token.id in self.stop_ids:
                continue
            if not self._said:
                self._ids.append(token.id)
            yield from self._deltas(self.parser.push(token.id))
            if self._over:
                break
        if not self._over and progress.finished:
            yield from self._finish(progress.finished)
        elif self.stops.matched is not None:
            self.finish_reason = "stop"
        elif self._over:
            self.finish_reason = self._reason("stop")

    @property
    def _over(self) -> bool:
        """后面写的都不要了。"""
        return self.stops.matched is not None or (self.one_call and bool(self._called))

    def _finish(self, finished: str) -> Iterator[dict[str, Any]]:
        """引擎写完了。"""
        if finished == "stop" and self.parser.state == "reasoning" and not self._said:
            self.unclosed, ids = True, self._ids
            self.parser = self.parser.without_thinking()
            for token in ids:
                yield from self._deltas(self.parser.push(token))
        yield from self._deltas(self.parser.finish())
        yield from self._flush()
        self.finish_reason = "stop" if self.stops.matched is not None else self._reason(finished)

    def _reason(self, finished: str) -> str:
        """``tool_calls`` 只说给写完了、能执行的调用：截断的是 ``length``，写坏的是 ``stop``。"""
        if finished == "stop" and self._called and all(self._called):
            return "tool_calls"
        return FINISH[finished]

    def _text(self, text: str) -> Iterator[dict[str, Any]]:
        self._said = True
        if self.written > self.least or not self.written:
            text = self.stops.push(text)
        if text:
            yield {"content": text}

    def _flush(self) -> Iterator[dict[str, Any]]:
        """扣着的文字后面不再是正文，不会是停止串了。"""
        if rest := self.stops.finish():
            yield {"content": rest}

    def _deltas(self, events: list[Any]) -> Iterator[dict[str, Any]]:
        for event in events:
            if self._over:
                return
            if isinstance(event, TextDelta):
                yield from self._text(event.text)
            elif isinstance(event, ReasoningDelta):
                yield from self._flush()
                yield {"reasoning_content": event.text}
            elif not self.calls:
                if isinstance(event, CallEnd | BadCall):
                    yield from self._text(event.call.raw.strip())
            elif isinstance(event, CallStart):
                self._said = True
                yield from self._flush()
                function = {"name": event.name, "arguments": ""}
                yield {
                    "tool_calls": [
                        {"index": event.index, "id": event.id, "type": "function", "function": function}
                    ]
                }
            elif isinstance(event, CallArguments):
                yield {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}
            elif isinstance(event, CallEnd):
                self._called.append(event.call.usable)  # 名字与参数都已给出
            else:  # 连名字都读不出的调用：原文当正文给，标签不给
                yield from self._text(event.call.raw)

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


class Offsets:
    """各词元从文字的第几个字开始；写到一半的字算在它身上。"""

    def __init__(self) -> None:
        self.at = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def next(self, data: bytes) -> int:
        """放入一个词元的字节，返回它的位置。"""
        if data and not 0x80 <= data[0] < 0xC0:  # 不接着前面没写完的字：那个 � 是前面的
            self.at += len(self._decoder.decode(b"", final=True))
            self._decoder.reset()
        before = self.at
        self.at += len(self._decoder.decode(data))
        return before

    def skip(self, text: str) -> None:
        """前面已经有了 ``text``。"""
        self.at += len(text)


def token_name(token: int, vocabulary: Vocabulary) -> str:
    """续写的 logprobs 里词元的写法：成字的写文字，一个字的几分之一写 ``bytes:\\xe4``（OpenAI 的写法），各不相同。"""
    data = vocabulary.bytes_of(token)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


@dataclass
class TextSample:
    """续写的一个样本。结束符没有文字，但报对数概率：lm-evaluation-harness 按“最后一个是写出来的”切片，强化学习也要它。

    ``stop_ids`` 与 ``least`` 见 :class:`ChatSample`。
    """

    index: int
    stream: TextStream
    stops: StopMatcher
    eos_ids: set[int]
    ids: list[int] = field(default_factory=list)
    tokens: list[TokenOut] = field(default_factory=list)
    written: int = 0
    finish_reason: str | None = None
    stop_ids: set[int] = field(default_factory=set)
    least: int = 0
    offsets: Offsets = field(default_factory=Offsets)

    def push(self, progress: Increment) -> str:
        """放入新词元，返回可以给出的文字。"""
        pieces = []
        for token in progress.tokens:
            self.written += 1
            self.ids.append(token.id)
            self.tokens.append(token)
            if token.id in self.eos_ids or token.id in self.stop_ids:
                continue
            text = self.stream.push(token.id)
            pieces.append(self.stops.push(text) if self.written > self.least else text)
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
        """还没报的词元的对数概率，OpenAI 续写的形状；``prompt`` 是 ``echo`` 时的提示，里面的控制词元也有文字。"""
        tokens, self.tokens = [*prompt, *self.tokens], []
        offsets = [
            self.offsets.next(
                b"" if at >= len(prompt) and self._silent(token.id) else vocabulary.bytes_of(token.id)
            )
            for at, token in enumerate(tokens)
        ]
        blank = [token.logprob != token.logprob for token in tokens]  # nan：第一个词元没有前文
        return {
            "tokens": [token_name(token.id, vocabulary) for token in tokens],
            "token_logprobs": [None if no else finite(t.logprob) for t, no in zip(tokens, blank)],
            "top_logprobs": [None if no else top_table(t, vocabulary) for t, no in zip(tokens, blank)],
            "text_offset": offsets,
        }

    def _silent(self, token: int) -> bool:
        """写出来没有文字的词元。"""
        return token in self.eos_ids or token in self.stop_ids or self.stream.silent(token)


def top_table(token: TokenOut, vocabulary: Vocabulary) -> dict[str, float]:
    """候选与它自己；与别的写法相同的词元（标签与拼出同样几个字的）写编号，谁也不丢。"""
    own = token_name(token.id, vocabulary)
    table: dict[str, float] = {}
    for one, logprob in token.top:
        name = token_name(one, vocabulary)
        if one != token.id and (name == own or name in table):
            name = f"token_id:{one}"
        table[name] = finite(logprob)
    return table | {own: finite(token.logprob)}
