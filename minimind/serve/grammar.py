"""受约束的输出：JSON、JSON Schema、正则、几选一、EBNF、必须调用工具；文法交给 xgrammar。"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from torch import Tensor

from minimind.distribution import install_command
from minimind.serve.errors import ApiError
from minimind.serve.json_schema import prepare
from minimind.serve.messages import FunctionSpec
from minimind.serve.sampling_fields import Constraint
from minimind.tokenizer.render import dump_json

ANY_OBJECT = {"type": "object"}
# 一步里至多核对多少个掩码没放行的词元
RECHECK = 256


class GrammarFactory:
    """一个分词器的文法编译器；编译过的文法留着。

    Args:
        tokenizer: 快速分词器。
        vocab_size: 模型输出的宽度（可能大于词表）。
        vocabulary: 词元 ↔ 字节。
    """

    def __init__(self, tokenizer: Any, vocab_size: int, vocabulary: Any):
        self.tokenizer, self.vocab_size, self.vocabulary = tokenizer, vocab_size, vocabulary
        self._compiled = lru_cache(maxsize=64)(self._compile)

    def constrained(self, constraint: Constraint) -> CompiledText:
        """只写合乎 ``constraint`` 的文字。

        Raises:
            ApiError: 没装 xgrammar，或约束不合法、太复杂。
        """
        return self._compiled(constraint.kind, constraint.text, constraint.param)

    def call(self, tools: Sequence[FunctionSpec]) -> CompiledText:
        """``<tool_call>`` 与 ``</tool_call>`` 之间：调用 ``tools`` 里的一个，布局与模板渲染的逐字相同。

        Raises:
            ApiError: 同上；不合法的是哪个工具的 ``parameters``。
        """
        # 次序就是模型写参数的次序，所以不排序
        text = json.dumps([[tool.name, tool.parameters] for tool in tools])
        return self._compiled("calls", text, "tools")

    def _compile(self, kind: str, text: str, param: str) -> CompiledText:
        try:
            import xgrammar
        except ImportError as error:
            raise ApiError(
                400,
                f"这台服务器没有装 xgrammar，不能约束输出格式：{install_command('serve')}",
                param=param,
            ) from error
        where = {"json": "JSON Schema", "regex": "正则", "ebnf": "文法", "choice": "选项"}.get(
            kind, "工具的参数"
        )
        try:
            if kind == "calls":
                parts = [_call_grammar(xgrammar.Grammar, *one) for one in json.loads(text)]
                grammar = parts[0] if len(parts) == 1 else xgrammar.Grammar.union(*parts)
            else:
                grammar = _text_grammar(xgrammar.Grammar, kind, text)
            return CompiledText(self, self._compiler.compile_grammar(grammar))
        except Exception as error:  # xgrammar 的 C++ 层以 RuntimeError 等报问题
            raise ApiError(400, f"读不懂这个{where}：{_reason(error)}", param=param) from error

    @cached_property
    def _compiler(self) -> Any:
        import xgrammar

        # 控制词元与标签都不算文字：字符串里写不出真的 <tool_call>，文法走完才轮到结束的那个
        info = xgrammar.TokenizerInfo.from_huggingface(
            self.tokenizer, vocab_size=self.vocab_size, stop_token_ids=self.controls.tolist()
        )
        return xgrammar.GrammarCompiler(info, max_threads=1)

    @cached_property
    def controls(self) -> np.ndarray:
        """控制词元与标签的 id。"""
        return np.array(sorted(self.tokenizer.get_added_vocab().values()), dtype=np.int64)

    @cached_property
    def first_bytes(self) -> tuple[np.ndarray, np.ndarray]:
        """各词元的第一个字节 ``[V]``（没有字节的是 −1），与单写这个字节的词元 ``[256]``（没有的是 −1）。"""
        first, single = np.full(self.vocab_size, -1), np.full(256, -1)
        controls = set(self.controls.tolist())
        for token in range(min(len(self.tokenizer), self.vocab_size)):
            data = b"" if token in controls else self.vocabulary.bytes_of(token)
            if data:
                first[token] = data[0]
            if len(data) == 1:
                single[data[0]] = token
        return first, single


class CompiledText:
    """编译好的文法；:meth:`matcher` 每个样本一个。"""

    def __init__(self, factory: GrammarFactory, compiled: Any):
        self.factory, self.compiled = factory, compiled

    def matcher(self, stops: Sequence[int]) -> TextMatcher:
        """``stops`` 是文法走完之后才许写的词元，写下就结束。"""
        return TextMatcher(self, stops)


class TextMatcher:
    """走到文法的哪里；``allowed`` 说下一个许写什么。"""

    def __init__(self, text: CompiledText, stops: Sequence[int]):
        import xgrammar

        self.factory, self.stops = text.factory, sorted(stops)
        self._matcher = xgrammar.GrammarMatcher(
            text.compiled, override_stop_tokens=self.stops, max_rollback_tokens=2
        )
        self._bitmask = xgrammar.allocate_token_bitmask(1, self.factory.vocab_size)

    def allowed(self, logits: Tensor) -> np.ndarray:
        """许写的词元 ``[V]`` bool。

        xgrammar 的掩码偶尔漏掉它自己接受的词元（例如 ``}}⏎`` 这样连写的收尾），所以第一个字节对得上而没放行的再逐个
        问一遍；太多时只问 ``logits`` 最大的几个。
        """
        self._matcher.fill_next_token_bitmask(self._bitmask)
        bits = np.unpackbits(self._bitmask.numpy().view(np.uint8), bitorder="little")
        allowed = bits[: self.factory.vocab_size].astype(bool)
        stops = [token for token in self.stops if allowed[token] and self._would_accept(token)]
        allowed[self.factory.controls] = False
        first, single = self.factory.first_bytes
        starts = np.where(single >= 0, allowed[single], False)
        missed = np.flatnonzero(~allowed & (first >= 0) & starts[first])
        if len(missed) > RECHECK:
            missed = missed[np.argsort(-logits.cpu().numpy()[missed])[:RECHECK]]
        for token in missed:
            allowed[token] = self._would_accept(int(token))
        allowed[stops] = True
        return allowed

    def accept(self, token: int) -> bool:
        """写下了 ``token``；文法走完返回真。"""
        self._matcher.accept_token(token)
        return self._matcher.is_terminated()

    def _would_accept(self, token: int) -> bool:
        if not self._matcher.accept_token(token):
            return False
        self._matcher.rollback(1)
        return True


def _literal(text: str) -> str:
    """EBNF 里的字面文字。"""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _call_grammar(grammar: Any, name: str, parameters: dict[str, Any] | None) -> Any:
    """一个工具的调用：前后是固定的文字，中间是参数；参数的 schema 自成一体，里面的 ``$ref`` 照旧有效。"""
    schema = parameters or ANY_OBJECT
    if not {"type", "$ref", "anyOf", "oneOf", "allOf", "const", "enum"} & set(schema):
        schema = {**schema, "type": "object"}
    head = f'\n{{"name": {dump_json(name)}, "arguments": '
    return grammar.concat(
        grammar.from_ebnf(f"root ::= {_literal(head)}"),
        _json_grammar(grammar, json.dumps(schema)),
        grammar.from_ebnf(f"root ::= {_literal(chr(125) + chr(10))}"),
    )


def _text_grammar(grammar: Any, kind: str, text: str) -> Any:
    if kind == "json":
        return _json_grammar(grammar, text)
    if kind == "regex":
        return grammar.from_regex(text)
    if kind == "choice":
        return grammar.from_ebnf("root ::= " + " | ".join(map(_literal, json.loads(text))))
    return grammar.from_ebnf(text)


def _json_grammar(grammar: Any, schema: str) -> Any:
    # 空白只用一种写法：训练数据就是这样写的，也不会在空白里打转
    return grammar.from_json_schema(json.dumps(prepare(json.loads(schema))), any_whitespace=False)


def _reason(error: Exception) -> str:
    """xgrammar 的话，去掉时刻与它自己的源文件。"""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = re.sub(r"^(\[[\d:]+\]\s*)?(\S+\.(cc|h|cpp|hpp|py):\d+:\s*)?", "", lines[-1])
    return re.sub(r"\S*/\S+\.(cc|h|cpp|hpp|py)(:\d+)?:?\s*", "", text)[:200] or "不合法"
