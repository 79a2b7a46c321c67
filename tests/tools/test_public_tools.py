"""公共项目的六样工具：名字与参数照旧，值对得上公开数据的答案，不执行模型写的字。"""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.inference.tool_calls import ToolCall
from minimind.tools import EXAMPLE_TOOLS, Toolbox
from minimind.tools.public import PUBLIC_TOOLS

BOX = Toolbox(PUBLIC_TOOLS)


def run(name, **values):
    return json.loads(BOX.run(ToolCall(name, json.dumps(values), "")))


def test_名字与参数():
    assert {tool.name: list(tool.properties) for tool in PUBLIC_TOOLS} == {
        "calculate_math": ["expression"],
        "unit_converter": ["value", "from_unit", "to_unit"],
        "get_current_weather": ["location"],
        "get_current_time": ["timezone"],
        "get_exchange_rate": ["from_currency", "to_currency"],
        "translate_text": ["text", "target_language"],
    }
    assert not {tool.name for tool in PUBLIC_TOOLS} & {tool.name for tool in EXAMPLE_TOOLS}


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("calculate_math", {"expression": "(12+8)×3^2"}, {"result": "180"}),
        ("calculate_math", {"expression": "math.sqrt(16)"}, {"result": "4"}),
        # 倍数取六位有效数字：1000 × 0.621371
        ("unit_converter", {"value": 1000, "from_unit": "km", "to_unit": "miles"}, {"result": 621.371}),
        ("unit_converter", {"value": 70, "from_unit": "kg", "to_unit": "pounds"}, {"result": 154.3234}),
        ("unit_converter", {"value": 5.5, "from_unit": "feet", "to_unit": "meters"}, {"result": 1.6764}),
        ("unit_converter", {"value": 25, "from_unit": "celsius", "to_unit": "fahrenheit"}, {"result": 77.0}),
        ("get_current_time", {}, {"datetime": "2025-03-07 14:30:00", "timezone": "Asia/Shanghai"}),
        (
            "get_current_time",
            {"timezone": "America/New_York"},
            {"datetime": "2025-03-07 01:30:00", "timezone": "America/New_York"},
        ),
        (
            "get_exchange_rate",
            {"from_currency": "usd", "to_currency": "CNY"},
            {"from": "USD", "to": "CNY", "rate": 7.21},
        ),
        (
            "translate_text",
            {"text": "你好世界", "target_language": "english"},
            {"translated_text": "Hello World"},
        ),
        (
            "translate_text",
            {"text": "Good morning", "target_language": "chinese"},
            {"translated_text": "早上好"},
        ),
    ],
)
def test_值(name, values, expected):
    assert run(name, **values) == expected


def test_天气():
    got = run("get_current_weather", location="New York")
    assert (got["city"], got["temperature"], got["condition"]) == ("New York", "8°C", "晴")
    assert run("get_current_weather", location="北京市")["temperature"] == "28°C"


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("calculate_math", {"expression": "__import__('os').system('id')"}),
        ("calculate_math", {"expression": "(1).__class__"}),
        ("calculate_math", {"expression": "9**9**9**9"}),
        ("unit_converter", {"value": 1, "from_unit": "km", "to_unit": "kg"}),
        ("get_current_weather", {"location": "火星"}),
        ("get_current_time", {"timezone": "../../etc/passwd"}),
        ("get_exchange_rate", {"from_currency": "XXX", "to_currency": "CNY"}),
        ("translate_text", {"text": "没有的话", "target_language": "english"}),
        ("translate_text", {"text": "你好世界", "target_language": "克林贡语"}),
    ],
)
def test_查不到_算不了_得到一句错误(name, values):
    assert list(run(name, **values)) == ["error"]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(PUBLIC_TOOLS), st.data())
def test_模型写什么都不抛异常(tool, data):
    anything = (
        st.none() | st.booleans() | st.floats() | st.text(max_size=20) | st.lists(st.integers(), max_size=2)
    )
    values = {name: data.draw(anything) for name in tool.properties}
    got = json.loads(BOX.run(ToolCall(tool.name, json.dumps(values), "")))
    assert isinstance(got, dict)
