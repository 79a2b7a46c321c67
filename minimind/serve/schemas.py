"""请求的形状：OpenAI 的字段与常见的扩展（top_k、min_p、repetition_penalty、enable_thinking）。

客户端多带的字段（``user``、``store``、``metadata`` 等）一律放过：它们不影响生成，拒绝只会弄坏现成的程序。
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from minimind.inference.sampling import SamplingParams

MAX_N, MAX_STOPS, MAX_TOP_LOGPROBS, MAX_BIAS = 16, 16, 20, 1024
Stop = str | list[str] | None
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Sampling(BaseModel):
    """聊天与续写共用的采样字段。"""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    temperature: Finite | None = Field(None, ge=0, le=100)
    top_p: Finite | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31)
    min_p: Finite | None = Field(None, ge=0, lt=1)
    presence_penalty: Finite | None = Field(None, ge=-2, le=2)
    frequency_penalty: Finite | None = Field(None, ge=-2, le=2)
    repetition_penalty: Finite | None = Field(None, gt=0, le=100)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=MAX_BIAS)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: Stop = None
    n: int | None = Field(None, ge=1, le=MAX_N)
    max_tokens: int | None = Field(None, ge=1)

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: Stop) -> Stop:
        if isinstance(value, list) and len(value) > MAX_STOPS:
            raise ValueError(f"至多 {MAX_STOPS} 个停止串")
        return value

    @property
    def stops(self) -> list[str]:
        values = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [value for value in values if value]

    @property
    def samples(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return bool((self.stream_options or {}).get("include_usage"))

    def params(self, default_temperature: float = 1.0) -> SamplingParams:
        """采样参数；没写的按 OpenAI 的默认。"""
        temperature = default_temperature if self.temperature is None else self.temperature
        return SamplingParams(
            temperature=temperature,
            top_k=max(self.top_k or 0, 0),  # vLLM 的 -1 也是不限
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            seed=self.seed,
        )


class CalledFunction(BaseModel):
    """历史里一次调用的函数；参数是 JSON 文字，也收对象。"""

    model_config = ConfigDict(extra="allow")

    name: str
    arguments: str | dict[str, Any] = ""


class PastCall(BaseModel):
    """历史里的一次工具调用。"""

    model_config = ConfigDict(extra="allow")

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(BaseModel):
    """一条消息；``content`` 可以是字符串或分段列表。"""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[PastCall] | None = None
    tool_call_id: str | None = None


class FunctionSpec(BaseModel):
    model_config = ConfigDict(extra="allow")

    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: Literal["function"] = "function"
    function: FunctionSpec


class NamedFunction(BaseModel):
    name: str


class NamedTool(BaseModel):
    type: Literal["function"] = "function"
    function: NamedFunction


class JsonSchemaSpec(BaseModel):
    model_config = ConfigDict(extra="allow", populate_by_name=True)

    name: str = "answer"
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchemaSpec | None = None

    @model_validator(mode="after")
    def _schema_given(self) -> ResponseFormat:
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.schema_ is None):
            raise ValueError("type 为 json_schema 时要有 json_schema.schema")
        return self


class ChatRequest(Sampling):
    """``POST /v1/chat/completions``。"""

    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

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
    def thinking(self) -> bool | None:
        value = (self.chat_template_kwargs or {}).get("enable_thinking", self.enable_thinking)
        return None if value is None else bool(value)

    @property
    def limit(self) -> int | None:
        """两个都写时 ``max_completion_tokens`` 说了算。"""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Sampling):
    """``POST /v1/completions``；``prompt`` 是一条或几条文字，或一条、几条词元。"""

    prompt: str | list[str] | list[int] | list[list[int]] = ""
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    max_tokens: int | None = Field(None, ge=0)  # 0：只给提示打分，与 echo 同用
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


class TokenizeRequest(BaseModel):
    """``POST /tokenize``：给 ``prompt``（文字）或 ``messages``（对话）。"""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool = False
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _one_of(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt 与 messages 要给一个，也只能给一个")
        return self


class DetokenizeRequest(BaseModel):
    """``POST /detokenize``。"""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]
