"""消息与工具：请求里的形状，与换成渲染器认识的样子。"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from minimind.serve.errors import ApiError
from minimind.serve.sampling_fields import Lenient

THINKING = ("enable_thinking", "open_thinking")


class CalledFunction(Lenient):
    """历史里一次调用的函数；参数是 JSON 文字，也收对象。"""

    name: str
    arguments: str | dict[str, Any] = ""


class PastCall(Lenient):
    """历史里的一次工具调用。"""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Lenient):
    """一条消息；``content`` 可以是字符串或分段列表。"""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[dict[str, Any] | str] | None = None
    refusal: str | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[PastCall] | None = None
    function_call: CalledFunction | None = None  # 旧的写法，一次一个
    tool_call_id: str | None = None
    prefix: bool = False  # 最后一条助手消息是回答的开头，接着写


class FunctionSpec(Lenient):
    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    parameters: dict[str, Any] | None = None


class OfferedTool(Lenient):
    type: Literal["function"] = "function"
    function: FunctionSpec


class NamedFunction(Lenient):
    name: str


class NamedTool(Lenient):
    type: Literal["function"] = "function"
    function: NamedFunction


class MessagesRequest(Lenient):
    """消息与怎么渲染它们；聊天与 ``/tokenize`` 共用。"""

    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    enable_thinking: bool | None = None
    open_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @field_validator("chat_template_kwargs")
    @classmethod
    def _switches(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        for name in THINKING:
            if (value or {}).get(name) not in (None, True, False):
                raise ValueError(f"{name} 应当是 true 或 false，给的是 {str(value[name])[:40]!r}")
        return value

    @property
    def thinking(self) -> bool | None:
        """思考开关；``chat_template_kwargs`` 里的优先，``open_thinking`` 是 ``enable_thinking`` 的别名。"""
        given = self.chat_template_kwargs or {}
        values = [*(given.get(name) for name in THINKING), self.enable_thinking, self.open_thinking]
        value = next((value for value in values if value is not None), None)
        return None if value is None else bool(value)

    def continues(self, messages: list[Message]) -> bool:
        """最后一条助手消息是不是接着写。

        Raises:
            ValueError: 最后一条是助手的却没说接着写，或说了却不是，或接不下去。
        """
        last = messages[-1]
        asked = self.continue_final_message or last.prefix
        if last.role != "assistant":
            if asked:
                raise ValueError(
                    "要接着写（continue_final_message 或 prefix），最后一条消息应当是 assistant 的"
                )
            return False
        if not asked and self.add_generation_prompt is False:
            return False  # 明说了不开新的回合
        if not asked:
            raise ValueError(
                "最后一条消息已经是 assistant 的；要接着它写，加 continue_final_message: true（或在这条消息里写 "
                "prefix: true），不然末尾应当是 user 或 tool 的消息"
            )
        if self.add_generation_prompt:
            raise ValueError("接着写时不能同时 add_generation_prompt: true")
        if last.tool_calls or last.function_call:
            raise ValueError("最后一条消息是工具调用，没有可以接着写的正文")
        return True


def plain_message(message: Message) -> dict[str, Any]:
    """OpenAI 的消息 → 渲染器认识的：developer 即 system，function 即 tool，内容合成一段文字。

    Raises:
        ApiError: 内容里有文字以外的东西（图片、声音）。
    """
    role = {"developer": "system", "function": "tool"}.get(message.role, message.role)
    content = message.content
    if isinstance(content, list):
        content = "".join(map(part_text, content))
    plain: dict[str, Any] = {"role": role, "content": content or message.refusal or ""}
    if message.reasoning_content is not None and role == "assistant":
        plain["reasoning_content"] = message.reasoning_content
    calls = [call.model_dump(exclude_none=True) for call in message.tool_calls or ()]
    if not calls and message.function_call:
        calls = [{"type": "function", "function": message.function_call.model_dump(exclude_none=True)}]
    if calls and role == "assistant":
        plain["tool_calls"] = calls
    if role == "tool":  # 有的模型自己的模板要
        plain |= {
            key: value for key in ("name", "tool_call_id") if (value := getattr(message, key)) is not None
        }
    return plain


def part_text(part: dict[str, Any] | str) -> str:
    """一段内容的文字；拒绝的话也是文字。

    Raises:
        ApiError: 不是文字。
    """
    if isinstance(part, str):
        return part
    kind = part.get("type")
    text = part.get("refusal" if kind == "refusal" else "text")
    if kind not in ("text", "input_text", "output_text", "refusal") or not isinstance(text, str):
        raise ApiError(400, f"只支持文字，不支持 {str(kind)[:40]}", param="messages.content")
    return text
