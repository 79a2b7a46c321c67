"""``--tools 文件.py``：使用者的函数 → 工具的说明。函数要有类型标注与文档字符串，别的不用写::

    def stock_price(code: str, days: int = 1) -> float:
        '''查股价。

        Args:
            code: 股票代码。
        '''

文件里每个不以 ``_`` 开头、就在这里定义的函数是一个工具（名字就是文件里的名字，套着 ``lru_cache`` 之类的装饰器也算）；
有默认值的参数可以不给，与 None 的并（``Optional[int]``）还可以写 null。函数在另一个进程里执行
（:mod:`minimind.tools.beside`）。
"""

from __future__ import annotations

import functools
import inspect
import re
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minimind.errors import UserError
from minimind.paths import resolve_path
from minimind.rl.reward_file import import_file
from minimind.tools.base import Tool

_SIMPLE = {str: "string", int: "integer", float: "number", bool: "boolean", dict: "object", list: "array"}
EXPECTED = "str、int、float、bool、list、dict、Literal[…]，或它们与 None 的并"


def read_tools(file: str) -> list[Tool]:
    """文件里的全部工具；``function`` 是使用者的函数本身。

    Raises:
        UserError: 没有这个文件、导入失败、没有函数，或哪个函数缺标注、缺说明。
    """
    path = resolve_path(file)
    where = f"--tools {file}"
    if not path.is_file():
        raise UserError("没有这个文件", where=f"{where}（{path}）", expected="一个 .py 文件", fix="检查路径")
    module = import_file(path, where)
    functions = {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(inspect.unwrap(value) if callable(value) else value)
        and value.__module__ == module.__name__
        and name[0] != "_"
    }
    if not functions:
        raise UserError(
            "文件里没有函数", where=where, fix="写 def 工具名(参数: str) -> dict，带一句文档字符串"
        )
    return [tool_of(function, path, where, name) for name, function in functions.items()]


def tool_of(function: Callable, path: Path, where: str, name: str) -> Tool:
    """一个函数 → 一个叫 ``name`` 的工具。"""
    plain = inspect.unwrap(function)
    at = f"{where}（{path.name}:{plain.__code__.co_firstlineno} {name}）"
    if (
        inspect.iscoroutinefunction(plain)
        or inspect.isgeneratorfunction(plain)
        or inspect.isasyncgenfunction(plain)
    ):
        raise UserError(
            "调用它得到的是协程或生成器，不是结果",
            where=at,
            expected="普通的函数，用 return 给出结果",
            fix="去掉 async 或 yield；要等的事在函数里用 asyncio.run(…)",
        )
    text = inspect.getdoc(function)
    if not text:
        raise UserError("没有文档字符串", where=at, fix="写一句它做什么：这就是给模型看的说明")
    try:
        hints = typing.get_type_hints(function)
    except Exception as error:  # 标注是任意的表达式，求值时什么都可能抛
        raise UserError(f"读不出类型标注（{type(error).__name__}：{error}）", where=at) from error
    notes, properties, optional, nullable, empty = _notes(text), {}, [], [], {}
    for key, parameter in inspect.signature(function).parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise UserError(f"参数 {parameter} 不能由模型给出", where=at, expected="有名字的参数")
        if key not in hints:
            raise UserError(f"参数 {key} 没有类型标注", where=at, expected=EXPECTED, fix=f"写成 {key}: str")
        schema, with_none = _schema(hints[key], key, at)
        properties[key] = schema | ({"description": notes[key]} if key in notes else {})
        if with_none:
            nullable.append(key)
            if parameter.default is parameter.empty:  # Python 要求给；模型没给就是 None
                empty[key] = None
        if with_none or parameter.default is not parameter.empty:
            optional.append(key)
    call = functools.partial(function, **empty) if empty else function
    description = text.split("\n\n")[0].replace("\n", " ")
    return Tool(name, description, properties, call, tuple(optional), tuple(nullable))


def _schema(hint: Any, name: str, at: str) -> tuple[dict[str, Any], bool]:
    """标注 → ``(JSON Schema, 是不是与 None 的并)``；这样的可以不给，也可以写 null。"""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType) and type(None) in inner and len(inner) == 2:
        return _schema(next(one for one in inner if one is not type(None)), name, at)[0], True
    if origin is typing.Literal and len({type(value) for value in inner}) == 1 and type(inner[0]) in _SIMPLE:
        return {"type": _SIMPLE[type(inner[0])], "enum": list(inner)}, False
    if origin is list and inner and inner[0] is not Any:
        return {"type": "array", "items": _schema(inner[0], name, at)[0]}, False
    if (origin or hint) in _SIMPLE:
        return {"type": _SIMPLE[origin or hint]}, False
    raise UserError(f"参数 {name} 的类型是 {hint}", where=at, expected=EXPECTED, fix="换成其中之一")


def _notes(text: str) -> dict[str, str]:
    """文档字符串的 ``Args:`` 一节：参数名 → 一句说明；缩得更深的行接在上一行后面。"""
    section = re.search(r"^(?:Args|参数)[:：]\n((?:[ \t]+.*\n?|\n)+)", text, re.M)
    notes: dict[str, str] = {}
    last = ""
    for line in inspect.cleandoc("\n" + section[1]).splitlines() if section else []:
        indent = len(line) - len(line.lstrip())
        found = re.match(r"(\w+)(?: \([^)]*\))?[:：][ \t]*(.*)$", line)
        if found:
            last, notes[found[1]] = found[1], found[2]
        elif last and indent and line.strip():
            notes[last] = f"{notes[last]} {line.strip()}".strip()
    return {name: note for name, note in notes.items() if note}
