"""聊天与续写共用的采样字段：OpenAI 的，与 vLLM 等常见的扩展（top_k、min_p、min_tokens、structured_outputs……）。"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from minimind.inference.sampling import SamplingParams

MAX_N, MAX_STOPS, MAX_BIAS = 16, 16, 1024
SMALLEST_TOP_P = 1e-9  # OpenAI 收 top_p: 0，意思是只留最可能的
LARGEST_MIN_P = 1 - 1e-6  # 同样的意思，从 min_p: 1 的一头说
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
