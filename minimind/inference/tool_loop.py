"""会用工具的对话：模型 → 调用 → 结果 → 再问模型，直到它用话回答，或到了轮数上限。

模型写坏的调用不会让对话中断：坏在哪里作为工具的结果还给模型，它可以重写；连写坏的原文也照样留在历史里，
模型看得见自己写了什么。
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from minimind.inference.chat import ChatSession, Speed
from minimind.inference.generate import context_length, stream_tokens
from minimind.inference.reply import Event, ReasoningDelta, Reply, ReplyParser, TextDelta
from minimind.inference.tool_calls import ToolCall
from minimind.tokenizer import encode_chat
from minimind.tokenizer.special import END_TOOL_CALL, TOOL_CALL
from minimind.tokenizer.templates import opens_thinking

MAX_ROUNDS = 4
# 一轮里最多执行这么多个调用：写不停的模型不该把上下文塞满
MAX_CALLS_PER_ROUND = 8


class Executor(Protocol):
    """能执行调用的东西，例如 :class:`minimind.tools.Toolbox`。"""

    def schemas(self) -> list[dict[str, Any]]: ...

    def run(self, call: ToolCall) -> str: ...


@dataclass(frozen=True)
class ToolResult:
    """一次调用与它的结果（JSON 文字）。"""

    call: ToolCall
    result: str


@dataclass(frozen=True)
class Stopped:
    """到了轮数上限，不再执行，也不再问模型。"""

    rounds: int


def reply_message(reply: Reply, enable_thinking: bool | None = None) -> dict[str, Any]:
    """解析好的回答 → 历史里的一条消息；生成时的思考开关也要给，关着时提示里预填的空思考块才会留在历史里。

    写坏的调用不能放进 ``tool_calls``（那里要求合法的 JSON），就把原文放回标签里；渲染出来与模型写的一致。
    """
    message: dict[str, Any] = {"role": "assistant", "content": reply.text}
    if reply.reasoning or enable_thinking is False:
        message["reasoning_content"] = reply.reasoning
    if any(call.error for call in reply.calls):
        calls = "\n".join(f"{TOOL_CALL}{call.raw}{END_TOOL_CALL}" for call in reply.calls)
        message["content"] = f"{reply.text}\n{calls}" if reply.text else calls
    elif reply.calls:
        message["tool_calls"] = [call.to_openai() for call in reply.calls]
    return message


@dataclass
class ToolSession:
    """带工具的对话；与 :class:`ChatSession` 一样用 :meth:`reply` 逐段取文字。

    Args:
        chat: 模型、分词器、采样参数与思考开关都用它的；历史也按它的 ``history_messages``，一问到最后的回答算一轮。
        executor: 工具箱。
        max_rounds: 一问里最多执行几轮调用。
    """

    chat: ChatSession
    executor: Executor
    max_rounds: int = MAX_ROUNDS
    turns: list[list[dict[str, Any]]] = field(default_factory=list)
    speed: Speed = field(default_factory=Speed)
    dropped: int = 0
    plain = False

    def encode(self, turn: list[dict[str, Any]]) -> list[int]:
        """历史与这一轮的 token；放不下就从最早的一轮丢起，``dropped`` 记丢了几条消息。"""
        keep = (self.chat.history_messages + 1) // 2
        history = self.turns[len(self.turns) - keep :] if keep else []
        head = [{"role": "system", "content": self.chat.system}] if self.chat.system else []
        tools = self.executor.schemas()
        self.dropped = 0
        while True:
            messages = [*head, *(message for past in history for message in past), *turn]
            ids = encode_chat(
                self.chat.tokenizer, messages, tools, True, enable_thinking=self.chat.enable_thinking
            ).ids
            if len(ids) < context_length(self.chat.model) or not history:
                return ids
            self.dropped += len(history[0])
            history = history[1:]

    def interrupt(self) -> None:
        """回答被 Ctrl-C 打断了，见 :meth:`ChatSession.interrupt`。"""
        self.chat.interrupt()

    def events(self, prompt: str) -> Iterator[Event | ToolResult | Stopped]:
        """一问的全部事件；走完后历史里多一轮。

        Raises:
            UserError: 只剩这一问也超过上下文。
        """
        turn: list[dict[str, Any]] = [{"role": "user", "content": prompt}]
        self.speed, start = Speed(), time.perf_counter()
        for done in range(self.max_rounds + 1):
            reply = Reply()
            for event in self._generate(turn, start):
                reply.add(event)
                yield event
            turn.append(reply_message(reply, self.chat.enable_thinking))
            if not reply.calls:
                break
            if done == self.max_rounds:
                yield Stopped(done)
                break
            for number, call in enumerate(reply.calls):
                if number < MAX_CALLS_PER_ROUND:
                    result = self.executor.run(call)
                else:
                    result = f'{{"error": "一次最多 {MAX_CALLS_PER_ROUND} 个调用，这个没有执行"}}'
                yield ToolResult(call, result)
                turn.append({"role": "tool", "tool_call_id": call.id, "content": result})
        self.turns.append(turn)

    def _generate(self, turn: list[dict[str, Any]], start: float) -> Iterator[Event]:
        chat = self.chat
        ids = self.encode(turn)
        parser = ReplyParser.for_tokenizer(chat.tokenizer, thinking=opens_thinking(chat.tokenizer, ids))
        for token in stream_tokens(
            chat.model,
            ids,
            max_new_tokens=chat.max_new_tokens,
            eos_ids=chat.engine.eos_ids,
            params=chat.params,
            engine=chat.engine,
        ):
            self.speed = Speed(self.speed.tokens + 1, time.perf_counter() - start)
            yield from parser.push(token)
        yield from parser.finish()

    def reply(self, prompt: str) -> Iterator[str]:
        """给人看的文字：正文照常，思考放在 ``<think>`` 里，调用与结果各占一行。"""
        thinking, empty = False, True
        for event in self.events(prompt):
            if isinstance(event, ReasoningDelta):
                if not thinking:
                    yield "<think>\n"
                thinking = True
                yield event.text
                continue
            if thinking:
                thinking = False
                yield "\n</think>\n\n"
            if isinstance(event, TextDelta):
                empty = False
                yield event.text
            elif isinstance(event, ToolResult):
                yield ("" if empty else "\n") + f"[调用] {describe(event.call)}\n[结果] {event.result}\n"
                empty = True
            elif isinstance(event, Stopped):
                yield f"（已经用了 {event.rounds} 轮工具，到此为止；--tool_rounds 可以调大）"


def describe(call: ToolCall) -> str:
    """一行文字：``calculator {"expression": "3*4"}``；写坏的给原文的开头。"""
    if call.error is None:
        return f"{call.name} {' '.join(call.arguments.split())}"
    return f"写坏了：{' '.join(call.raw.split())[:120]}"
