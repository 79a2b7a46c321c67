"""受约束的输出：JSON、JSON Schema、必须调用工具；文法交给 xgrammar。"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from minimind.distribution import install_command
from minimind.inference.engine import LogitsHook
from minimind.serve.errors import ApiError
from minimind.serve.hooks import GrammarHook
from minimind.serve.schemas import ChatRequest, NamedTool

ANY_OBJECT = {"type": "object"}


class GrammarFactory:
    """一个分词器的文法编译器；编译过的文法留着。

    Args:
        tokenizer: 快速分词器。
        vocab_size: 模型输出的宽度（可能大于词表）。
        stop_ids: 文法走完后允许的结束符。
    """

    def __init__(self, tokenizer: Any, vocab_size: int, stop_ids: set[int]):
        self.tokenizer, self.vocab_size, self.stop_ids = tokenizer, vocab_size, sorted(stop_ids)
        self._compiler: Any = None
        self._compiled = lru_cache(maxsize=64)(self._compile)

    def hook(self, schema: dict[str, Any]) -> Callable[[], LogitsHook]:
        """只写符合 ``schema`` 的 JSON。

        Raises:
            ApiError: 没装 xgrammar，或 schema 不合法、太复杂。
        """
        compiled = self._compiled(json.dumps(schema, ensure_ascii=False, sort_keys=True))
        import xgrammar

        def make() -> LogitsHook:
            matcher = xgrammar.GrammarMatcher(compiled, override_stop_tokens=self.stop_ids)
            return GrammarHook(matcher, self.vocab_size)

        return make

    def _compile(self, schema: str) -> Any:
        try:
            import xgrammar
        except ImportError as error:
            raise ApiError(
                400,
                f"这台服务器没有装 xgrammar，不能约束输出格式：{install_command('serve')}",
                param="response_format",
            ) from error
        if self._compiler is None:
            info = xgrammar.TokenizerInfo.from_huggingface(
                self.tokenizer, vocab_size=self.vocab_size, stop_token_ids=self.stop_ids
            )
            self._compiler = xgrammar.GrammarCompiler(info, max_threads=1)
        try:
            # 空白只用一种写法：训练数据就是这样写的，也不会在空白里打转
            return self._compiler.compile_json_schema(schema, any_whitespace=False)
        except Exception as error:  # xgrammar 的 C++ 层以 RuntimeError 等报 schema 的问题
            raise ApiError(
                400,
                f"读不懂这个 JSON Schema：{str(error).strip().splitlines()[-1][:200]}",
                param="response_format.json_schema.schema",
            ) from error


def requested_schema(request: ChatRequest) -> dict[str, Any] | None:
    """``response_format`` 要求的 schema；不约束时 ``None``。"""
    form = request.response_format
    if form is None or form.type == "text":
        return None
    return ANY_OBJECT if form.type == "json_object" else form.json_schema.schema_


def forced_call_schema(request: ChatRequest) -> dict[str, Any] | None:
    """``tool_choice`` 是 required 或点名时，一次调用的 schema：名字只能是那几个，参数按各自的 schema。"""
    choice = request.tool_choice
    if choice not in ("required",) and not isinstance(choice, NamedTool):
        return None
    tools = [tool.function for tool in request.tools or []]
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool.name == choice.function.name]
    shapes = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.name}, "arguments": tool.parameters or ANY_OBJECT},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return shapes[0] if len(shapes) == 1 else {"anyOf": shapes}
