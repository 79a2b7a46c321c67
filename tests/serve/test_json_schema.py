"""JSON Schema 里 xgrammar 会悄悄略过的：改写之后写得出的都合乎 schema，写不成文法的被拒绝。"""

from __future__ import annotations

import json

import pytest

pytest.importorskip("xgrammar")

import xgrammar
from xgrammar.testing import _is_grammar_accept_string as accepts

from minimind.serve.grammar import _json_grammar
from minimind.serve.json_schema import prepare
from minimind.serve.schemas import ChatRequest, ignored_fields


def obj(required=None, **properties):
    schema = {"type": "object", "properties": properties}
    return schema if required is None else {**schema, "required": required}


INT, TEXT = {"type": "integer"}, {"type": "string"}
NAMED = {"$defs": {"A": obj(["a"], a=INT), "B": {"allOf": [{"$ref": "#/$defs/A"}, obj(["b"], b=TEXT)]}}}


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        # required 里没有写进 properties 的
        (obj(["a", "b"], a=INT), [{"a": 1, "b": "x"}], [{"a": 1}, {"b": 1}]),
        ({**obj(["b"], a=INT), "additionalProperties": TEXT}, [{"b": "x"}], [{"b": 1}, {}]),
        # 几份 allOf，连着 $ref 与旁边的
        ({"allOf": [obj(["a"], a=INT), obj(["b"], b=TEXT)]}, [{"a": 1, "b": "x"}], [{"a": 1}, "x", {}]),
        ({**obj(["a"], a=INT), "allOf": [obj(["b"], b=INT)]}, [{"a": 1, "b": 2}], [{"a": 1}, {"b": 2}]),
        ({"$ref": "#/$defs/B", **NAMED}, [{"a": 1, "b": "x"}], [{"a": 1}, {"b": "x"}]),
        ({**obj(["c"], c=INT), "$ref": "#/$defs/B", **NAMED}, [{"c": 1, "a": 1, "b": "x"}], [{"c": 1}]),
        ({"allOf": [{"$ref": "#/$defs/A"}], "description": "说明", **NAMED}, [{"a": 1}], [{"a": "x"}]),
        # $ref、anyOf、oneOf 旁边的限制
        ({"$ref": "#/$defs/N", "minimum": 5, "$defs": {"N": INT}}, [5], [1]),
        ({"type": "string", "anyOf": [{"minLength": 3}, {"enum": ["a"]}]}, ["abc", "a"], ["ab", 1]),
        (
            {**obj(["a"], a=INT), "oneOf": [obj(["b"], b=INT), obj(["c"], c=TEXT)]},
            [{"a": 1, "b": 2}, {"a": 1, "c": "x"}],
            [{"a": 1}, {"b": 2}, {"a": 1, "b": 2, "c": "x"}],
        ),
        ({"type": ["integer", "null"], "anyOf": [{"type": "number"}, {}]}, [1, None], ["x", 1.5]),
        # 转义过的名字
        (
            {**obj(["a"], a={"$ref": "#/$defs/Box~1of%20[int]"}), "$defs": {"Box/of [int]": INT}},
            [{"a": 1}],
            [{"a": "x"}],
        ),
        # 自己套自己的照旧
        (
            {
                "$ref": "#/$defs/T",
                "$defs": {
                    "T": obj(["v", "t"], v=INT, t={"anyOf": [{"$ref": "#/$defs/T"}, {"type": "null"}]})
                },
            },
            [{"v": 1, "t": {"v": 2, "t": None}}],
            [{"v": 1}],
        ),
    ],
)
def test_写得出的都合乎schema(schema, right, wrong):
    grammar = _json_grammar(xgrammar.Grammar, json.dumps(schema))
    assert [value for value in right if not accepts(grammar, json.dumps(value))] == []
    assert [value for value in wrong if accepts(grammar, json.dumps(value))] == []


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        (obj(a={"not": TEXT}), r"\$\.properties\.a 的 not"),
        ({"if": INT, "then": {"minimum": 3}}, "if"),
        ({"type": "array", "contains": INT}, "contains"),
        ({**obj(a=INT, b=INT), "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"type": "array", "items": {"type": "number", "multipleOf": 0.5}}, r"\$\.items 的 multipleOf"),
        ({"type": "string", "pattern": "^(?!a).*$"}, "环视"),
        (obj(a={"$ref": "https://x/y#/$defs/A"}), r"#/…"),
        ({**obj(["b"], a=INT), "additionalProperties": False}, "'b'"),
        (
            {"properties": None, "allOf": [INT, {"minimum": [1]}, {"required": None}], "required": 3},
            "形状|合不到",
        ),
        ({"allOf": [obj(a=INT), obj(a=TEXT)]}, "properties"),
        ({"allOf": [INT, TEXT]}, "type"),
        ({"allOf": [{"$ref": "#/$defs/X"}, INT]}, "没有指向什么"),
        (
            {"$ref": "#/$defs/L", "minimum": 1, "$defs": {"L": {"allOf": [{"$ref": "#/$defs/L"}, INT]}}},
            "嵌套过深|合不完",
        ),
    ],
)
def test_写不成文法的说出在哪里(schema, words):
    with pytest.raises(ValueError, match=words):
        prepare(schema)


def test_元素互不相同与pattern旁的长度_不起作用就写进应答的头():
    text = {"type": "string", "pattern": "^[a-z]+$", "maxLength": 4}
    unique = obj(a={"type": "array", "items": text, "uniqueItems": True})
    messages = [{"role": "user", "content": "问"}]
    asked = {"response_format": {"type": "json_schema", "json_schema": {"schema": unique}}}
    body = ChatRequest(messages=messages, **asked)
    assert ignored_fields(body) == [
        f"response_format.json_schema.schema.{key}" for key in ("maxLength", "uniqueItems")
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": unique}}]
    forced = ChatRequest(messages=messages, tools=tools, tool_choice="required")
    assert ignored_fields(forced) == [
        f"tools.function.parameters.{key}" for key in ("maxLength", "uniqueItems")
    ]
    assert ignored_fields(ChatRequest(messages=messages, tools=tools)) == []
