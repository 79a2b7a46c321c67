"""请求的形状：OpenAI 的字段与 vLLM 等常见的扩展（top_k、min_p、repetition_penalty、min_tokens、structured_outputs……）。

可有可无的字段写 ``null`` 就是没写。客户端多带的字段（``user``、``store``、``metadata`` 等）一律放过，拒绝只会弄坏现成的
程序；它们不起作用，:func:`ignored_fields` 说得出是哪些。
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from minimind.inference.sampling import SamplingParams

MAX_N, MAX_STOPS, MAX_TOP_LOGPROBS, MAX_BIAS = 16, 16, 20, 1024
SMALLEST_TOP_P = 1e-9  # OpenAI 收 top_p: 0，意思是只留最可能的
LARGEST_MIN_P = 1 - 1e-6  # 同样的意思，从 min_p: 1 的一头说
THINKING = ("enable_thinking", "open_thinking")
Stop = str | list[str] | None
Finite = Annotated[float, Field(allow_inf_nan=False)]
Limit = Annotated[int, Field(ge=-1)]


class Lenient(BaseModel):
    """可有可无的字段写 ``null`` 等于没写；多出来的字段留在 ``model_extra``。"""

    model_config = ConfigDict(extra="allow", populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        required = {field.alias or name for name, field in cls.model_fields.items() if field.is_required()}
        return {name: value for name, value in data.items() if value is not None or name in required}


class Constraint(NamedTuple):
    """约束输出：``kind`` 是 json、regex、choice、ebnf 之一，``param`` 是它来自哪个字段。"""

    kind: str
    text: str
    param: str


class StructuredOutputs(Lenient):
    """vLLM 的 ``structured_outputs``；各项只能写一个。"""

    json_: dict[str, Any] | str | bool | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = Field(None, min_length=1, max_length=1024)
    grammar: str | None = None
    json_object: bool | None = None


class JsonSchemaSpec(Lenient):
    name: str = "answer"
    description: str | None = None
    strict: bool | None = None  # 总是照着写
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")


class ResponseFormat(Lenient):
    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchemaSpec | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")  # llama.cpp 等的 json_object 带着它

    @model_validator(mode="after")
    def _schema_given(self) -> ResponseFormat:
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.schema_ is None):
            raise ValueError("type 为 json_schema 时要有 json_schema.schema")
        return self


class Sampling(Lenient):
    """聊天与续写共用的采样字段。"""

    model: str | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    temperature: Finite | None = Field(None, ge=0, le=100)
    top_p: Finite | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31)
    min_p: Finite | None = Field(None, ge=0, le=1)
    presence_penalty: Finite | None = Field(None, ge=-2, le=2)
    frequency_penalty: Finite | None = Field(None, ge=-2, le=2)
    repetition_penalty: Finite | None = Field(None, ge=0.01, le=100)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=MAX_BIAS)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: Stop = None
    stop_token_ids: list[int] | None = Field(None, max_length=MAX_BIAS)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int | None = Field(None, ge=0)
    n: int | None = Field(None, ge=1, le=MAX_N)
    max_tokens: Limit | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = Field(None, min_length=1, max_length=1024)
    guided_grammar: str | None = None

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: Stop) -> Stop:
        if isinstance(value, list) and len(value) > MAX_STOPS:
            raise ValueError(f"至多 {MAX_STOPS} 个停止串")
        return value

    @model_validator(mode="after")
    def _one_constraint(self) -> Sampling:
        if len(found := self._constraints()) > 1:
            raise ValueError(f"{'、'.join(one.param for one in found)} 只能写一个")
        limit = self.limit
        if limit is not None and self.min_tokens and self.min_tokens > limit:
            raise ValueError(f"min_tokens（{self.min_tokens}）大于 max_tokens（{limit}）")
        return self

    def _constraints(self) -> list[Constraint]:
        form, outputs = (
            self.response_format or ResponseFormat(),
            self.structured_outputs or StructuredOutputs(),
        )
        anything = {"type": "object"}
        schema = form.json_schema.schema_ if form.json_schema else None
        where = "structured_outputs"
        given = [
            ("json", schema if form.type == "json_schema" else None, "response_format.json_schema.schema"),
            ("json", (form.schema_ or anything) if form.type == "json_object" else None, "response_format"),
            ("json", outputs.json_, f"{where}.json"),
            ("json", anything if outputs.json_object else None, f"{where}.json_object"),
            ("regex", outputs.regex, f"{where}.regex"),
            ("choice", outputs.choice, f"{where}.choice"),
            ("ebnf", outputs.grammar, f"{where}.grammar"),
            ("json", self.guided_json, "guided_json"),
            ("regex", self.guided_regex, "guided_regex"),
            ("choice", self.guided_choice, "guided_choice"),
            ("ebnf", self.guided_grammar, "guided_grammar"),
        ]
        # 键的次序就是模型写的次序，所以不排序
        return [
            Constraint(kind, value if isinstance(value, str) else json.dumps(value), param)
            for kind, value, param in given
            if value is not None
        ]

    @property
    def constraint(self) -> Constraint | None:
        """输出要合乎什么；不约束是 ``None``。"""
        return next(iter(self._constraints()), None)

    @property
    def limit(self) -> int | None:
        """最多写多少个；没写或写 −1（不限）是 ``None``。"""
        return None if self.max_tokens == -1 else self.max_tokens

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
            top_p=1.0 if self.top_p is None else max(self.top_p, SMALLEST_TOP_P),
            min_p=min(self.min_p or 0.0, LARGEST_MIN_P),
            repetition_penalty=self.repetition_penalty or 1.0,
            seed=self.seed,
        )


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


class Tool(Lenient):
    type: Literal["function"] = "function"
    function: FunctionSpec


class NamedFunction(Lenient):
    name: str


class NamedTool(Lenient):
    type: Literal["function"] = "function"
    function: NamedFunction


class Conversation(Lenient):
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


class ChatRequest(Sampling, Conversation):
    """``POST /v1/chat/completions``。"""

    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_tokens: Limit | None = None
    max_completion_tokens: Limit | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[Tool] | None = Field(None, max_length=128)
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


class TokenizeRequest(Conversation):
    """``POST /tokenize``：给 ``prompt``（文字）或 ``messages``（对话）。"""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=4096)
    tools: list[Tool] | None = None
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
# 里面只认这几个键的字典
KNOWN_KEYS = {"stream_options": {"include_usage"}, "chat_template_kwargs": set(THINKING)}


def ignored_fields(body: BaseModel, path: str = "") -> list[str]:
    """请求里不起作用的字段，写成 ``tools.function.strict`` 这样；空的、假的不算。"""
    found = [path + name for name, value in (body.model_extra or {}).items() if value]
    for name in type(body).model_fields:
        value = getattr(body, name)
        if value and name in UNUSED.get(type(body), ()):
            found.append(path + name)
        if name in KNOWN_KEYS and isinstance(value, dict):
            odd = (key for key, item in value.items() if item and key not in KNOWN_KEYS[name])
            found += [f"{path}{name}.{key}" for key in odd]
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, BaseModel):
                found += ignored_fields(item, f"{path}{name}.")
    return list(dict.fromkeys(found))
