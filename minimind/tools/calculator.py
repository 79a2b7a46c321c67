"""计算器：自己的词法与优先级解析，从不执行文字。

文法（优先级由低到高）::

    和 := 积 (("+" | "-") 积)*
    积 := 号 (("*" | "/" | "//" | "%") 号)*
    号 := ("+" | "-") 号 | 幂
    幂 := 百分 (("**" | "^") 号)?          右结合：2^3^2 = 512，-2^2 = -4
    百分 := 基 "%"*                        后面不接数或括号时 % 是百分号：15% = 0.15，7 % 4 = 3
    基 := 数 | 常数 | 函数 "(" 和 ("," 和)* ")" | "(" 和 ")"

十进制运算，50 位有效数字：0.1+0.2 就是 0.3。长度、嵌套、指数都有上限，所以时间与内存也有上限。
"""

from __future__ import annotations

import decimal
import re
import unicodedata
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from minimind.tools.base import Tool, ToolError

MAX_LENGTH = 200
MAX_DEPTH = 30
# 结果显示的有效数字；更多的位留作中间结果的余量
SHOWN_DIGITS = 15

_CONTEXT = decimal.Context(
    prec=50,
    Emax=400,
    Emin=-400,
    rounding=decimal.ROUND_HALF_EVEN,
    traps=[decimal.InvalidOperation, decimal.DivisionByZero, decimal.Overflow],
)
_TOKEN = re.compile(r"\s*(?:(\d+\.?\d*(?:e[+-]?\d+)?|\.\d+(?:e[+-]?\d+)?)|([a-z_]+)|(\*\*|//|[-+*/%^(),]))")
_SPELLINGS = str.maketrans({"×": "*", "÷": "/", "−": "-", "·": "*", "π": "pi", "【": "(", "】": ")"})
_CONSTANTS = {
    "pi": Decimal("3.1415926535897932384626433832795028841971693993751"),
    "e": Decimal("2.7182818284590452353602874713526624977572470937000"),
}


def _round(value: Decimal, digits: Decimal = Decimal(0)) -> Decimal:
    if digits != digits.to_integral_value() or abs(digits) > 30:
        raise ToolError("round 的第二个参数应当是不超过 30 的整数")
    return value.quantize(Decimal(1).scaleb(-int(digits)), decimal.ROUND_HALF_UP, _CONTEXT)


# 名字 → (函数, 最少几个参数, 最多几个)
_FUNCTIONS: dict[str, tuple[Callable[..., Decimal], int, int]] = {
    "sqrt": (_CONTEXT.sqrt, 1, 1),
    "abs": (abs, 1, 1),
    "ln": (_CONTEXT.ln, 1, 1),
    "log": (_CONTEXT.log10, 1, 1),
    "exp": (_CONTEXT.exp, 1, 1),
    "floor": (lambda x: x.to_integral_value(decimal.ROUND_FLOOR), 1, 1),
    "ceil": (lambda x: x.to_integral_value(decimal.ROUND_CEILING), 1, 1),
    "round": (_round, 1, 2),
    "min": (min, 1, 20),
    "max": (max, 1, 20),
}


def _tokens(text: str) -> list[tuple[str, str]]:
    """``[(种类, 文字)]``，种类是 number、name 或 sign；末尾补一个 ``("end", "")``。"""
    found, at = [], 0
    text = text.rstrip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise ToolError(f"看不懂 {text[at:].strip()[:10]!r}")
        kind = ("number", "name", "sign")[match.lastindex - 1]
        found.append((kind, match[match.lastindex]))
        at = match.end()
    return [*found, ("end", "")]


class _Parser:
    def __init__(self, tokens: list[tuple[str, str]]):
        self.tokens, self.at, self.depth = tokens, 0, 0

    @property
    def sign(self) -> str:
        kind, text = self.tokens[self.at]
        return text if kind == "sign" else ""

    def take(self) -> tuple[str, str]:
        token = self.tokens[self.at]
        self.at += 1
        return token

    def expect(self, sign: str) -> None:
        if self.sign != sign:
            raise ToolError(f"少了 {sign}")
        self.at += 1

    def sum(self) -> Decimal:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ToolError(f"括号超过 {MAX_DEPTH} 层")
        value = self.product()
        while self.sign in ("+", "-"):
            apply = _CONTEXT.add if self.take()[1] == "+" else _CONTEXT.subtract
            value = apply(value, self.product())
        self.depth -= 1
        return value

    def product(self) -> Decimal:
        value = self.signed()
        while self.sign in ("*", "/", "//", "%"):
            value = _BINARY[self.take()[1]](value, self.signed())
        return value

    def signed(self) -> Decimal:
        negative = False
        while self.sign in ("+", "-"):
            negative ^= self.take()[1] == "-"
        value = self.power()
        return _CONTEXT.minus(value) if negative else value

    def power(self) -> Decimal:
        base = self.percent()
        if self.sign not in ("**", "^"):
            return base
        self.at += 1
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ToolError(f"乘方超过 {MAX_DEPTH} 层")
        exponent = self.signed()
        self.depth -= 1
        return _CONTEXT.power(base, exponent)

    def percent(self) -> Decimal:
        value = self.atom()
        while self.sign == "%" and not self._operand_follows():
            self.at += 1
            value = _CONTEXT.divide(value, Decimal(100))
        return value

    def _operand_follows(self) -> bool:
        kind, text = self.tokens[self.at + 1]
        return kind in ("number", "name") or text == "("

    def atom(self) -> Decimal:
        kind, text = self.take()
        if kind == "number":
            return _CONTEXT.plus(_CONTEXT.create_decimal(text))
        if text == "(":
            value = self.sum()
            self.expect(")")
            return value
        if kind == "name" and text in _CONSTANTS:
            return _CONTEXT.plus(_CONSTANTS[text])
        if kind == "name" and text in _FUNCTIONS:
            return self.call(text)
        if kind == "name":
            raise ToolError(f"没有函数 {text[:20]}，只有 {'、'.join(_FUNCTIONS)}")
        raise ToolError("算式没有写完" if kind == "end" else f"{text} 的位置不对")

    def call(self, name: str) -> Decimal:
        function, fewest, most = _FUNCTIONS[name]
        self.expect("(")
        values = [self.sum()]
        while self.sign == ",":
            self.at += 1
            values.append(self.sum())
        self.expect(")")
        if not fewest <= len(values) <= most:
            raise ToolError(f"{name} 的参数应当有 {fewest}{f' 到 {most}' if most > fewest else ''} 个")
        return function(*values)


def _divide(a: Decimal, b: Decimal) -> Decimal:
    if not b:  # 0/0 在 decimal 里是“没有意义”，对人来说也是除以零
        raise ToolError("不能除以零")
    return _CONTEXT.divide(a, b)


def _floor_divide(a: Decimal, b: Decimal) -> Decimal:
    """向下取整的商，与 Python 的整数除法一致；:meth:`Decimal.__floordiv__` 是向零取整。"""
    return _CONTEXT.divide(_CONTEXT.subtract(a, _modulo(a, b)), b).to_integral_value()


def _modulo(a: Decimal, b: Decimal) -> Decimal:
    """余数与除数同号。"""
    if not b:
        raise ToolError("不能除以零")
    rest = _CONTEXT.remainder(a, b)
    return _CONTEXT.add(rest, b) if rest and (rest < 0) != (b < 0) else rest


_BINARY = {"*": _CONTEXT.multiply, "/": _divide, "//": _floor_divide, "%": _modulo}


def evaluate(expression: str) -> Decimal:
    """算一个算式。

    Raises:
        ToolError: 太长、看不懂、除以零、超出范围；消息里说明是哪一种。
    """
    text = unicodedata.normalize("NFKC", expression).translate(_SPELLINGS).lower()
    text = text.strip().removesuffix("=").removesuffix("=?")
    if len(text) > MAX_LENGTH:
        raise ToolError(f"算式有 {len(text)} 个字，最多 {MAX_LENGTH} 个")
    parser = _Parser(_tokens(text))
    try:
        with decimal.localcontext(_CONTEXT):
            value = parser.sum()
    except decimal.DivisionByZero:
        raise ToolError("不能除以零") from None
    except decimal.Overflow:
        raise ToolError("结果太大了") from None
    except decimal.InvalidOperation:
        raise ToolError("这个算式没有意义（例如负数开方）或位数太多") from None
    if parser.tokens[parser.at][0] != "end":
        raise ToolError(f"{parser.tokens[parser.at][1][:10]!r} 的位置不对")
    if not value.is_finite():
        raise ToolError("结果不是有限的数")
    return value


def show(value: Decimal) -> str:
    """给人看的写法：整数写全（五十位以内），小数最多 15 位有效数字，很大很小时用科学记数法。"""
    if value == value.to_integral_value() and abs(value) < Decimal(10) ** 50:
        return str(int(value))
    value = decimal.Context(prec=SHOWN_DIGITS).plus(value).normalize()
    return f"{value:f}" if -10 < value.adjusted() < 21 else f"{value:e}"


def calculate(expression: str) -> dict[str, Any]:
    return {"result": show(evaluate(expression))}


# 名字、说明与参数同微世界里的计算器一字不差：在微世界上练过的模型直接会用
CALCULATOR = Tool("calculator", "计算算式", {"expression": {"type": "string"}}, calculate)
