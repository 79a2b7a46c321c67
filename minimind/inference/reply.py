"""把助手写的东西分成三样：正文、思考、工具调用；可以整段分，也可以边写边分，结果相同。

用法（流式）::

    parser = ReplyParser.for_tokenizer(tokenizer)
    for token in stream_tokens(…):
        for event in parser.push(token):
            ...                      # TextDelta、ReasoningDelta、CallStart、CallArguments、CallEnd、BadCall
    for event in parser.finish():
        ...

按 token 分时只有真正的标签 token 算标签；模型引用的“<tool_call>”这几个普通字符仍是正文。分词器没有的标签
（早期的公共权重一个也没有，Qwen2.5 没有 ``<think>``），或手上只有文字，就按文字认，可能是标签开头的几个字先扣着。
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from minimind.inference.generate import TextStream
from minimind.inference.tool_calls import CallScanner, ToolCall
from minimind.tokenizer.loading import codec_of
from minimind.tokenizer.special import END_THINK, END_TOOL_CALL, THINK, TOOL_CALL

TAGS = (THINK, END_THINK, TOOL_CALL, END_TOOL_CALL)


@dataclass(frozen=True)
class TextDelta:
    """一段正文。"""

    text: str


@dataclass(frozen=True)
class ReasoningDelta:
    """一段思考。"""

    text: str


@dataclass(frozen=True)
class CallStart:
    """第 ``index`` 个调用（从 0 起）的名字写完了。"""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """第 ``index`` 个调用又写了一段参数。"""

    index: int
    text: str


@dataclass(frozen=True)
class CallEnd:
    """第 ``index`` 个调用结束；名字已经给出，参数若写坏了，``call.error`` 里说明。"""

    index: int
    call: ToolCall


@dataclass(frozen=True)
class BadCall:
    """连工具名都读不出来的调用；没有对应的 :class:`CallStart`，不占序号。"""

    call: ToolCall


Event = TextDelta | ReasoningDelta | CallStart | CallArguments | CallEnd | BadCall


@dataclass
class Reply:
    """一条完整的回答。``calls`` 里按次序是全部调用，写坏的也在内。"""

    text: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)

    def add(self, event: Event) -> None:
        if isinstance(event, TextDelta):
            self.text += event.text
        elif isinstance(event, ReasoningDelta):
            self.reasoning += event.text
        elif isinstance(event, CallEnd | BadCall):
            self.calls.append(event.call)


def new_call_id(index: int) -> str:
    """随机的调用编号，样子与 OpenAI 的相同。"""
    return f"call_{uuid.uuid4().hex[:24]}"


class ReplyParser:
    """逐段解析。

    Args:
        thinking: 生成提示已经以 ``<think>`` 结尾（``enable_thinking=True``），回答一开头就在思考里。
        make_id: 由调用的序号给编号。
        tokenizer: 给了就可以用 :meth:`push` 放 token。

    空白的处理与模板对应，使“解析 → 再渲染”得到同样的文字：思考首尾的换行、思考与正文之间的空行、
    正文与调用之间的一个换行、调用之后的空白都是布局，不算内容。
    """

    def __init__(
        self,
        thinking: bool = False,
        make_id: Callable[[int], str] = new_call_id,
        tokenizer: Any = None,
    ):
        self.state = "reasoning" if thinking else "text"
        self.make_id, self.tokenizer = make_id, tokenizer
        self._thinks = True  # 认不认 <think>
        self.count = 0  # 认出名字的调用个数
        self._held = ""  # 可能是标签开头的文字（只在按文字认时）
        self._space = ""  # 扣着的空白：后面是正文才算数
        self._trim = thinking  # 丢掉接下来的空白
        self._scanner: CallScanner | None = None
        self._call_id = ""
        self._stream = TextStream(tokenizer) if tokenizer is not None else None
        controls = codec_of(tokenizer).controls if tokenizer is not None else {}
        self._tag_ids = {controls[tag]: tag for tag in TAGS if tag in controls}
        self._spelled = tuple(tag for tag in TAGS if tag not in controls)  # 这些标签按文字认

    @classmethod
    def for_tokenizer(cls, tokenizer: Any, thinking: bool = False, **options: Any) -> ReplyParser:
        """按 token 解析，用 :meth:`push`。"""
        return cls(thinking, tokenizer=tokenizer, **options)

    # ---------------------------------------------------------------- 对外

    def push(self, token: int) -> list[Event]:
        """放入一个 token。"""
        if token in self._tag_ids:
            events = self.feed(self._stream.finish())
            held, self._held = self._held, ""
            return [*events, *self._literal(held), *self._tag(self._tag_ids[token])]
        return self.feed(self._stream.push(token))

    def resume(self, tokens: Iterable[int]) -> list[Event]:
        """放入提示里已经替它写好的开头：正文与思考客户端已经有了，不再给；没写完的调用照给。"""
        events = [event for token in tokens for event in self.push(token)]
        self._space = ""
        return [event for event in events if not isinstance(event, TextDelta | ReasoningDelta)]

    def without_thinking(self) -> ReplyParser:
        """同样的解析，只是没有思考：``<think>`` 不算数，一切都是正文与调用。"""
        other = ReplyParser(False, self.make_id, self.tokenizer)
        other._thinks = False
        return other

    def feed(self, text: str) -> list[Event]:
        """放入一段文字，其中的标签按字面认。"""
        events: list[Event] = []
        self._held += text
        while found := _first_tag(self._held, self._spelled):
            at, tag = found
            events += self._literal(self._held[:at])
            self._held = self._held[at + len(tag) :]
            events += self._tag(tag)
        ready = self._held[: len(self._held) - _tag_prefix(self._held, self._spelled)]
        self._held = self._held[len(ready) :]
        return [*events, *self._literal(ready)]

    def finish(self) -> list[Event]:
        """输出到头了（写完或被截断）。"""
        events = self.feed(self._stream.finish()) if self._stream is not None else []
        held, self._held = self._held, ""
        events += self._literal(held)
        if self.state == "call":
            events += self._end_call(closed=False)
        elif self.state == "text" and not self.count and not self._trim:
            events += self._emit(self._space)
        self._space = ""
        return events

    # ---------------------------------------------------------------- 三种状态

    def _emit(self, text: str) -> list[Event]:
        if not text:
            return []
        return [ReasoningDelta(text) if self.state == "reasoning" else TextDelta(text)]

    def _literal(self, text: str) -> list[Event]:
        """标签之外的文字。"""
        if not text:
            return []
        if self.state == "call":
            return self._call_text(text)
        if self._trim:
            text = text.lstrip("\n")
            if not text:
                return []
            self._trim = False
        # 末尾的换行先扣着：后面跟的若是标签，它就只是布局
        text = self._space + text
        body = text.rstrip("\n" if not self.count else " \n\r\t")
        self._space = text[len(body) :]
        return self._emit(body)

    def _tag(self, tag: str) -> list[Event]:
        if self.state == "call":
            if tag == END_TOOL_CALL:
                return self._end_call(closed=True)
            if tag == TOOL_CALL:  # 忘了收尾又开始一个
                return [*self._end_call(closed=False), *self._begin_call()]
            return self._call_text(tag)
        if self.state == "reasoning":
            if tag != END_THINK:
                return self._literal(tag)
            self._space, self._trim, self.state = "", True, "text"
            return []
        if tag == THINK:
            events = self._emit(self._space.removesuffix("\n"))
            self._space, self._trim = "", True
            self.state = "reasoning" if self._thinks else "text"
            return events
        if tag == TOOL_CALL:
            return self._begin_call()
        return []  # 没有开头的收尾标签，丢掉

    def _begin_call(self) -> list[Event]:
        events = self._emit(self._space.removesuffix("\n")) if not self.count else []
        self._space, self._trim, self.state = "", False, "call"
        self._scanner, self._call_id = CallScanner(), self.make_id(self.count)
        return events

    def _call_text(self, text: str) -> list[Event]:
        known = self._scanner.name is not None
        piece = self._scanner.feed(text)
        events: list[Event] = []
        if not known and self._scanner.name is not None:
            events.append(CallStart(self.count, self._call_id, self._scanner.name))
        if piece:
            events.append(CallArguments(self.count, piece))
        return events

    def _end_call(self, closed: bool) -> list[Event]:
        known = self._scanner.name is not None
        call = self._scanner.finish(closed, self._call_id)
        self._scanner, self.state, self._trim = None, "text", True
        if not call.name:
            return [BadCall(call)]
        events: list[Event] = []
        if not known:
            events.append(CallStart(self.count, call.id, call.name))
            if call.arguments:
                events.append(CallArguments(self.count, call.arguments))
        events.append(CallEnd(self.count, call))
        self.count += 1
        return events


def _first_tag(text: str, tags: tuple[str, ...]) -> tuple[int, str] | None:
    """最早出现的标签与它的位置；标签互不为前缀，同一处不会有两个。"""
    found = [(at, tag) for tag in tags if (at := text.find(tag)) >= 0]
    return min(found, default=None)


def _tag_prefix(text: str, tags: tuple[str, ...]) -> int:
    """末尾有多少个字可能是标签的开头。"""
    for size in range(min(len(text), max(map(len, tags), default=1) - 1), 0, -1):
        if any(tag.startswith(text[-size:]) for tag in tags):
            return size
    return 0


def parse_reply(content: str | Iterable[int], *, tokenizer: Any = None, thinking: bool = False) -> Reply:
    """整段解析：给文字，或给 token 与分词器。"""
    parser = ReplyParser(thinking, tokenizer=tokenizer)
    if isinstance(content, str):
        events = parser.feed(content)
    else:
        events = [event for token in content for event in parser.push(token)]
    reply = Reply()
    for event in [*events, *parser.finish()]:
        reply.add(event)
    return reply
