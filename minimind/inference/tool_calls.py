"""一次工具调用：模型写的 JSON → 名字与参数，边写边认，写坏了说得出坏在哪里。

模型按模板写 ``{"name": 工具名, "arguments": {参数名: 值}}``，放在 ``<tool_call>`` 与 ``</tool_call>`` 之间。
:class:`CallScanner` 只管标签里面这一段；标签归 :mod:`minimind.inference.reply`。次序是先名字后参数时（模板教的就是
这样），名字一写完就给出，参数写一段给一段；次序反过来或参数写成了字符串，就等写完再一次给出。
两种情形最后都用 :mod:`json` 复核，所以“流式拼起来”与“整段解析”永远相同。

别的写法也认：参数叫 ``parameters``（Llama 3）、是 ``null`` 或空串（没有参数）、字符串里有没转义的换行（给出去的是
转义好的，参数总是合法的 JSON）、整个调用包在 OpenAI 的 ``function`` 里。
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

# 参数的名字，先看前面的：模板教的，与 Llama 3 的
ARGUMENTS = ("arguments", "parameters")
# 名字在前、参数是对象：可以边写边给
_HEADER = re.compile(
    rf'\s*\{{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:{"|".join(ARGUMENTS)})"\s*:\s*(?=\{{)', re.S
)
# 过了这么多字还没见到参数，就等写完再说；免得每来一段都从头找一遍
_HEADER_LIMIT = 1024


@dataclass(frozen=True)
class ToolCall:
    """一次调用。

    Args:
        name: 工具名；读不出来时是空串。
        arguments: 参数的 JSON 文字，照模型写的，只是字符串里没转义的控制字符转义了；``error`` 不为空时可能不完整。
        raw: 标签之间的全文。
        error: 哪里写坏了（一句中文）；``None`` 表示完好。
        id: OpenAI 格式里的调用编号。
    """

    name: str
    arguments: str
    raw: str
    error: str | None = None
    id: str = ""

    def values(self) -> dict[str, Any]:
        """解析后的参数；写坏了的调用给空字典。"""
        return json.loads(self.arguments) if self.error is None else {}

    @property
    def usable(self) -> bool:
        """参数是完整的 JSON 对象，客户端可以照着执行；只差收尾的标签也算。"""
        try:
            return bool(self.name) and isinstance(strict_loads(self.arguments), dict)
        except ValueError:
            return False

    def to_openai(self) -> dict[str, Any]:
        """``{"id", "type": "function", "function": {"name", "arguments": JSON 字符串}}``。"""
        return {
            "id": self.id,
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        }


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} 不是 JSON 的值")


def strict_loads(text: str) -> Any:
    """:func:`json.loads`，但不认 NaN 与 Infinity（别的语言的 JSON 库读不了），嵌套过深也报 ``ValueError``。"""
    return _loads(text, strict=True)


def _loads(text: str, strict: bool) -> Any:
    """``strict`` 为假时字符串里可以有没转义的控制字符。"""
    try:
        return json.loads(text, parse_constant=_no_constant, strict=strict)
    except RecursionError:
        raise ValueError("嵌套过深") from None


def _encodable(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _dumps(values: dict[str, Any]) -> str:
    """不转义中文；有落单的代理字符时转义，不然编不成 UTF-8。"""
    text = json.dumps(values, ensure_ascii=False)
    return text if _encodable(text) else json.dumps(values)


class CallScanner:
    """认一次调用。``feed`` 放入文字，``finish`` 结束；``name`` 与 ``feed`` 的返回值可以立刻发给客户端。

    Attributes:
        name: 已经认出的工具名；还没认出是 ``None``。
    """

    def __init__(self) -> None:
        self.raw = ""
        self.name: str | None = None
        self._at = 0  # 参数扫描到 raw 的哪里
        self._pieces: list[str] = []  # 已经给出的参数
        self._ended = False  # 参数写完了
        self._depth, self._in_string, self._escaped = 0, False, False

    def feed(self, text: str) -> str:
        """放入标签里的一段文字，返回新认出的参数文字（可能是空串）。"""
        self.raw += text
        if self.name is None and len(self.raw) - len(text) <= _HEADER_LIMIT:
            self._read_header()
        return self._read_arguments() if self.name is not None and not self._ended else ""

    def _read_header(self) -> None:
        match = _HEADER.match(self.raw)
        if match is None or match.end() > _HEADER_LIMIT:
            return
        try:
            name = json.loads(match[1])
        except ValueError:
            return
        if name and _encodable(name):
            self.name, self._at = name, match.end()

    def _read_arguments(self) -> str:
        piece: list[str] = []
        for position in range(self._at, len(self.raw)):
            character = self.raw[position]
            if self._in_string:
                if character < " ":  # 没转义的换行一类；前面已经有反斜杠的只补后半
                    character = json.dumps(character)[2 if self._escaped else 1 : -1]
                    self._escaped = False
                elif self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
            piece.append(character)
            if self._depth == 0:
                self._ended = True
                break
        self._at = len(self.raw)
        text = "".join(piece)
        self._pieces.append(text)
        return text

    def finish(self, closed: bool = True, call_id: str = "") -> ToolCall:
        """标签结束（``closed``）或输出到头了，给出结果。

        已经流式给出的名字与参数不会再改口：整段 JSON 与它们对不上时，``error`` 里说明。
        """
        name, arguments, error = self.name or "", "".join(self._pieces), None
        try:
            read_name, values = _read_whole(self.raw)
        except ValueError as problem:
            error = str(problem)
        else:
            if self.name is None:
                name, arguments = read_name, _dumps(values)
            elif read_name != name or strict_loads(arguments) != values:
                error = "name 或 arguments 写了不止一次"
        if not closed:
            error = "没有写完（缺少 </tool_call>）"
        return ToolCall(name, arguments, self.raw, error, call_id)


def _read_whole(raw: str) -> tuple[str, dict[str, Any]]:
    """整段 JSON → 名字与参数；参数可以是对象、对象的 JSON 字符串，或没有（空对象）。"""
    try:
        call = _loads(raw, strict=False)
    except ValueError as error:
        raise ValueError(f"不是合法的 JSON（{error}）") from None
    if not isinstance(call, dict):
        raise ValueError('不是 {"name": …, "arguments": {…}} 这样的对象')
    if "name" not in call and isinstance(call.get("function"), dict):
        call = call["function"]
    name = call.get("name")
    if not isinstance(name, str) or not name or not _encodable(name):
        raise ValueError("没有工具名 name")
    present = [key for key in ARGUMENTS if key in call]
    given = next((key for key in present if call[key] is not None), next(iter(present), None))
    odd = [key for key in call if key not in ("name", "id", "type", "description")]
    if given is None and odd:
        raise ValueError(f"没有 arguments，却有 {'、'.join(odd)[:80]}")
    values = call.get(given)
    if isinstance(values, str) and values.strip():
        try:
            values = _loads(values, strict=False)
        except ValueError as error:
            raise ValueError(f"arguments 不是合法的 JSON（{error}）") from None
    if values is None or (isinstance(values, str) and not values.strip()):
        values = {}
    if not isinstance(values, dict):
        raise ValueError("arguments 不是对象")
    return name, values
