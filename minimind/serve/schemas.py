"""各个接口的请求体；采样字段在 :mod:`minimind.serve.sampling_fields`，消息在 :mod:`minimind.serve.messages`。

可有可无的字段写 ``null`` 就是没写。客户端多带的字段（``user``、``store``、``metadata`` 等）一律放过，拒绝只会弄坏现成的
程序；它们不起作用，:func:`ignored_fields` 说得出是哪些。
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from minimind.serve.json_schema import unheeded
from minimind.serve.messages import THINKING, FunctionSpec, Message, MessagesRequest, NamedTool, OfferedTool
from minimind.serve.sampling_fields import Lenient, Limit, Sampling

MAX_TOP_LOGPROBS = 20


class ChatRequest(Sampling, MessagesRequest):
    """``POST /v1/chat/completions``。"""

    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_tokens: Limit | None = None
    max_completion_tokens: Limit | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[OfferedTool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    @field_validator("max_tokens", "max_completion_tokens")
    @classmethod
    def _at_least_one(cls, value: int | None) -> int | None:
        if value == 0:
            raise ValueError("至少为 1（−1 是不限）")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs 要与 logprobs: true 同用")
        names = [tool.function.name for tool in self.tools or []]
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice 点名的 {self.tool_choice.function.name[:80]!r} 不在 tools 里")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice 是 required，却没有 tools")
        return self

    @property
    def forced_tools(self) -> list[FunctionSpec]:
        """必须调用其中一个；不强求时是空的。"""
        tools = [tool.function for tool in self.tools or []]
        if isinstance(self.tool_choice, NamedTool):
            return [tool for tool in tools if tool.name == self.tool_choice.function.name][:1]
        return tools if self.tool_choice == "required" else []

    @property
    def limit(self) -> int | None:
        """两个都写时 ``max_completion_tokens`` 说了算。"""
        value = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return None if value == -1 else value


class CompletionRequest(Sampling):
    """``POST /v1/completions``；``prompt`` 是一条或几条文字，或一条、几条词元。"""

    prompt: str | list[str] | list[int] | list[list[int]] = ""
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    max_tokens: Limit | None = None  # 0：只给提示打分，与 echo 同用
    return_token_ids: bool = False
    # vLLM 的启动参数同名：processed 是抽样时的分布（温度、惩罚、截断之后），强化学习要的就是它
    logprobs_mode: Literal["raw_logprobs", "processed_logprobs"] = "raw_logprobs"
    suffix: str | None = None
    best_of: int | None = None

    @field_validator("suffix")
    @classmethod
    def _no_suffix(cls, value: str | None) -> str | None:
        if value:
            raise ValueError("不支持 suffix（从中间补全）")
        return value

    @field_validator("best_of")
    @classmethod
    def _no_best_of(cls, value: int | None) -> int | None:
        if value not in (None, 1):
            raise ValueError("不支持 best_of，用 n 要几个样本")
        return value

    def prompts(self) -> list[str | list[int]]:
        """拆成一条条的提示。

        Raises:
            ValueError: 一条也没有。
        """
        value = self.prompt
        if isinstance(value, str):
            return [value]
        if not value:
            raise ValueError("prompt 是空的")
        return [value] if isinstance(value[0], int) else list(value)


class TokenizeRequest(MessagesRequest):
    """``POST /tokenize``：给 ``prompt``（文字）或 ``messages``（对话）。"""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=4096)
    tools: list[OfferedTool] | None = None
    add_special_tokens: bool = False

    @model_validator(mode="after")
    def _one_of(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt 与 messages 要给一个，也只能给一个")
        return self


class DetokenizeRequest(Lenient):
    """``POST /detokenize``。"""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]


# 收进来却不起作用的字段：模板里没有名字的位置
UNUSED = {Message: {"name"}}
# 约束输出的 JSON Schema；工具的 parameters 只在必须调用时约束
SCHEMAS = {"schema_", "json_", "guided_json"}
# 里面只认这几个键的字典
KNOWN_KEYS = {"stream_options": {"include_usage"}, "chat_template_kwargs": set(THINKING)}


def ignored_fields(body: BaseModel, path: str = "") -> list[str]:
    """请求里不起作用的字段，写成 ``tools.function.strict`` 这样；空的、假的不算。"""
    found = [path + name for name, value in (body.model_extra or {}).items() if value]
    for tool in body.forced_tools if isinstance(body, ChatRequest) else ():
        found += [f"tools.function.parameters.{key}" for key in unheeded(tool.parameters)]
    for name in type(body).model_fields:
        value = getattr(body, name)
        if value and name in UNUSED.get(type(body), ()):
            found.append(path + name)
        if name in SCHEMAS:
            found += [f"{path}{name.rstrip('_')}.{key}" for key in unheeded(value)]
        if name in KNOWN_KEYS and isinstance(value, dict):
            odd = (key for key, item in value.items() if item and key not in KNOWN_KEYS[name])
            found += [f"{path}{name}.{key}" for key in odd]
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, BaseModel):
                found += ignored_fields(item, f"{path}{name}.")
    return list(dict.fromkeys(found))
