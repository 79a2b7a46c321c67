"""交给 xgrammar 之前的 JSON Schema：它会悄悄略过的写法，改成等价的、它认得的；文法里写不出来的，说出来。

改写四样：``required`` 里没有写进 ``properties`` 的字段；几份 ``allOf``；``$ref``、``anyOf``、``oneOf`` 旁边另有的限制；
``$ref`` 里转义过的名字。元素互不相同（``uniqueItems``）、``pattern`` 旁边的长度写不成文法，又常见（pydantic 的 ``set`` 与
字段），不拒绝，由 :func:`unheeded` 说给客户端。
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

# 文法写不出来的
UNSUPPORTED = (
    "not",
    "if",
    "contains",
    "dependentRequired",
    "dependentSchemas",
    "dependencies",
    "$dynamicRef",
)
# 有了 $ref、anyOf、oneOf、allOf 中的一个，xgrammar 就不看旁边的这些
BESIDE = {
    "type", "enum", "const", "properties", "required", "additionalProperties", "patternProperties", "propertyNames",
    "minProperties", "maxProperties", "items", "prefixItems", "minItems", "maxItems", "minimum", "maximum",
    "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength", "maxLength", "pattern", "format",
}  # fmt: skip
SEVERAL = ("properties", "patternProperties", "$defs", "definitions")  # 名字 → 子 schema
LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
SINGLE = ("items", "additionalProperties", "propertyNames")
# JSON 的字符串里反斜杠要写两个，模式里的不会；环视被略过
ODD_PATTERN = re.compile(r"\(\?(=|!|<=|<!)|\\\\")
MAX_MERGES = 1000


def prepare(schema: Any) -> Any:
    """能照着写的 schema。

    Raises:
        ValueError: 有文法里写不出来的，说出在哪里。
    """
    try:
        return _Preparer(schema).walk(schema, "$")
    except RecursionError:
        raise ValueError("嵌套过深") from None
    except (TypeError, AttributeError) as error:  # 关键字的值不是该有的形状
        raise ValueError("有一个关键字的值不是 JSON Schema 要的形状") from error


def unheeded(schema: Any) -> list[str]:
    """里面不起作用的关键字：``uniqueItems``，与 ``pattern`` 旁边的长度。"""
    found, left = [], [schema]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            found += ["uniqueItems"] if one.get("uniqueItems") else []
            found += [key for key in ("minLength", "maxLength") if key in one and "pattern" in one]
            left += _children(one)
    return sorted(set(found))


def _children(schema: dict[str, Any]) -> Iterator[Any]:
    """各个子 schema。"""
    for key in SEVERAL:
        if isinstance(schema.get(key), dict):
            yield from schema[key].values()
    for key in LISTS:
        if isinstance(schema.get(key), list):
            yield from schema[key]
    yield from (schema[key] for key in SINGLE if key in schema)


class _Preparer:
    def __init__(self, root: Any):
        self.root, self.merges = root, 0

    def walk(self, schema: Any, where: str) -> Any:
        if not isinstance(schema, dict):
            return schema
        schema = self.flat(schema, where)
        self.refuse(schema, where)
        made = dict(schema)
        for key in SEVERAL:
            if isinstance(schema.get(key), dict):
                made[key] = {
                    _safe(name) if key in ("$defs", "definitions") else name: self.walk(
                        child, f"{where}.{key}.{name}"
                    )
                    for name, child in schema[key].items()
                }
        for key in LISTS:
            if isinstance(schema.get(key), list):
                made[key] = [self.walk(child, f"{where}.{key}.{i}") for i, child in enumerate(schema[key])]
        for key in SINGLE:
            if key in schema:
                made[key] = self.walk(schema[key], f"{where}.{key}")
        if isinstance(reference := schema.get("$ref"), str):
            made["$ref"] = "/".join(["#", *map(_safe, _parts(reference))])
        return self.with_required(made, where)

    def refuse(self, schema: dict[str, Any], where: str) -> None:
        if found := next((key for key in UNSUPPORTED if key in schema), None):
            raise ValueError(f"{where} 的 {found} 不能用来约束输出")
        if "multipleOf" in schema and schema.get("type") != "integer":
            raise ValueError(f"{where} 的 multipleOf 只能用在 integer 上")
        if isinstance(pattern := schema.get("pattern"), str) and ODD_PATTERN.search(pattern):
            raise ValueError(f"{where} 的 pattern 里不能有环视与反斜杠字符")
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference != "#" and not reference.startswith("#/"):
            raise ValueError(f"{where} 的 $ref 只能指向这份 schema 里面（#/…），写的是 {reference[:60]!r}")

    def with_required(self, schema: dict[str, Any], where: str) -> dict[str, Any]:
        """``required`` 里的都写进 ``properties``。"""
        own, rest = schema.get("properties") or {}, schema.get("additionalProperties", True)
        names = schema.get("required")
        missing = [name for name in names if name not in own] if isinstance(names, list) else []
        if not missing:
            return schema
        if rest is False:
            raise ValueError(f"{where} 的 required 里有 {missing[0]!r}，properties 里却没有，也不许有别的")
        return {**schema, "properties": {**own, **dict.fromkeys(missing, {} if rest is True else rest)}}

    # ------------------------------------------------------------ 合成一份

    def flat(self, schema: dict[str, Any], where: str) -> dict[str, Any]:
        """几样限制同时写着的，合成一份：只剩 ``$ref``、``anyOf``、``oneOf``、``allOf`` 之一，或一样也没有。"""
        kinds = [key for key in ("allOf", "$ref", "anyOf", "oneOf") if key in schema]
        beside = {key: value for key, value in schema.items() if key in BESIDE}
        alone = not beside and len(kinds) == 1 and (kinds != ["allOf"] or len(schema["allOf"]) == 1)
        if not kinds or alone:
            return schema
        outer = {key: value for key, value in schema.items() if key not in kinds and key not in BESIDE}
        parts = [beside] if beside else []
        if isinstance(schema.get("allOf"), list):
            parts += schema["allOf"]
        if isinstance(reference := schema.get("$ref"), str):
            parts.append({"$ref": reference})
        made: dict[str, Any] = {}
        for part in parts:
            made = self.merge(made, self.opened(part, where), where)
        for key in ("anyOf", "oneOf"):
            if key in schema:
                if "anyOf" in made or not isinstance(schema[key], list):
                    raise ValueError(f"{where} 里的 {key} 与别的限制合不到一起")
                made = {"anyOf": [self.merge(made, self.opened(one, where), where) for one in schema[key]]}
        return {**outer, **made}

    def opened(self, schema: Any, where: str) -> dict[str, Any]:
        """``$ref`` 换成它指的那一份，里面的也合好。"""
        self.merges += 1
        if self.merges > MAX_MERGES:
            raise ValueError(f"{where} 一层套一层，合不完")
        if schema is True:
            return {}
        if not isinstance(schema, dict):
            raise ValueError(f"{where} 里有一份不是 schema")
        schema = self.flat(schema, where)
        if isinstance(reference := schema.get("$ref"), str):
            return self.opened(self.target(reference, where), where)
        if len(schema.get("allOf", ())) == 1:
            return self.opened(schema["allOf"][0], where)
        return schema

    def target(self, reference: str, where: str) -> Any:
        found = self.root
        for part in _parts(reference):
            if not isinstance(found, dict) or part not in found:
                raise ValueError(f"{where} 的 $ref {reference[:60]!r} 没有指向什么")
            found = found[part]
        return found

    def merge(self, one: dict[str, Any], two: dict[str, Any], where: str) -> dict[str, Any]:
        """同时合乎两份的一份。"""
        if "anyOf" in one or "oneOf" in one:
            one, two = two, one
        if key := next((key for key in ("anyOf", "oneOf") if key in two), None):
            rest = {name: value for name, value in two.items() if name in BESIDE}
            if {"anyOf", "oneOf"} & set(one):
                raise ValueError(f"{where} 里的两份 {key} 合不到一起")
            return {
                "anyOf": [
                    self.merge(self.merge(one, rest, where), self.opened(branch, where), where)
                    for branch in two[key]
                ]
            }
        made = dict(one)
        for key, value in two.items():
            if key not in made or key not in BESIDE or made[key] == value:
                made.setdefault(key, value)
            elif key == "required":
                made[key] = list(dict.fromkeys([*made[key], *value]))
            elif key == "properties" and not any(made[key].get(n, v) != v for n, v in value.items()):
                made[key] = {**made[key], **value}
            elif key == "type" and (types := _common(made[key], value)):
                made[key] = types[0] if len(types) == 1 else types
            else:
                raise ValueError(f"{where} 里的两份 {key} 合不到一起")
        return made


def _common(one: Any, two: Any) -> list[str]:
    """两处都许的类型；integer 也是 number。"""
    one, two = ([value] if isinstance(value, str) else list(value) for value in (one, two))
    narrow = [t for t in one if t in two or (t == "integer" and "number" in two)]
    return narrow + [t for t in two if t == "integer" and "number" in one and t not in one]


def _parts(reference: str) -> list[str]:
    """``#/$defs/A%20B`` → 各级的名字。"""
    names = reference.removeprefix("#").removeprefix("/")
    return [unquote(part).replace("~1", "/").replace("~0", "~") for part in names.split("/") if part]


def _safe(name: str) -> str:
    """xgrammar 按 ``/`` 切 ``$ref``，又不认转义：名字里的换一个字。"""
    return name.replace("/", "／")
