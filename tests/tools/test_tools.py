"""工具箱、时钟、单位换算与词典：坏参数得到一句错误，从不抛出别的。"""

import datetime
import json

import pytest
from call_helpers import read_call
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.errors import UserError
from minimind.microworld.tasks import tools as learned
from minimind.tools import EXAMPLE_TOOLS, Tool, Toolbox, ToolError
from minimind.tools.clock import read_clock
from minimind.tools.glossary import look_up
from minimind.tools.units import _UNITS, convert

BOX = Toolbox(EXAMPLE_TOOLS)
NOON = datetime.datetime(2024, 2, 29, 12, 5, tzinfo=datetime.timezone.utc)


def run(name, **arguments):
    return json.loads(BOX.run(read_call(json.dumps({"name": name, "arguments": arguments}))))


def test_四样工具都能用():
    assert run("calculator", expression="347*28") == {"result": "9716"}
    assert run("convert_unit", value=3, from_unit="斤", to_unit="kg") == {"result": "1.5", "unit": "kg"}
    assert run("look_up", word="Token")["chinese"] == "词元"
    assert set(run("get_time")) == {"time", "date", "weekday"}


def test_计算器与时钟的说明与微世界里学过的一字不差():
    assert BOX.tools["calculator"].schema() == learned.CALCULATOR
    assert BOX.tools["get_time"].schema() == learned.CLOCK


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ("不是 JSON", "调用写坏了"),
        ('{"name": "rm", "arguments": {}}', "没有工具 rm，只有 calculator"),
        ('{"name": "calculator", "arguments": {}}', "缺少参数 expression"),
        ('{"name": "calculator", "arguments": {"expression": 3}}', "应当是 string"),
        (
            '{"name": "convert_unit", "arguments": {"value": true, "from_unit": "米", "to_unit": "尺"}}',
            "number",
        ),
        ('{"name": "get_time", "arguments": {"zone": "x"}}', "没有参数 zone"),
        ('{"name": "look_up", "arguments": {"word": "\\ud800"}}', "没有"),
    ],
)
def test_坏调用是一句错误(raw, said):
    result = BOX.run(read_call(raw))
    result.encode("utf-8")
    assert said in json.loads(result)["error"]


def broken(**_):
    raise RuntimeError("内部细节")


def test_工具自己出错或结果太长也不中断():
    tools = [Tool("bad", "", {}, broken), Tool("long", "", {}, lambda: {"x": "长" * 5000})]
    box = Toolbox(tools)
    assert "内部细节" not in box.run(read_call('{"name": "bad"}')) and "RuntimeError" in box.run(
        read_call('{"name": "bad"}')
    )
    assert "超过" in box.run(read_call('{"name": "long"}'))


@given(
    st.sampled_from(list(BOX.tools)),
    st.dictionaries(
        st.sampled_from(["expression", "city", "value", "from_unit", "to_unit", "word"]),
        st.text(max_size=6) | st.floats() | st.integers() | st.none(),
    ),
)
@settings(max_examples=200, deadline=None)
def test_任意参数都得到合法的_json(name, arguments):
    json.loads(BOX.run(read_call(json.dumps({"name": name, "arguments": arguments}))))


def test_挑工具_名字不对说出有哪些():
    assert list(BOX.pick("look_up, calculator").tools) == ["look_up", "calculator"]
    assert BOX.pick("all") is BOX
    with pytest.raises(UserError, match="calculator、get_time"):
        BOX.pick("calculater")
    with pytest.raises(UserError, match="重名"):
        Toolbox([*EXAMPLE_TOOLS, EXAMPLE_TOOLS[0]])


def test_时钟():
    assert read_clock("北京市", NOON) == {"time": "20:05", "date": "2024-02-29", "weekday": "星期四"}
    assert read_clock("New York", NOON)["time"] == "7:05"
    with pytest.raises(ToolError, match="不知道 银滩 的时区"):
        read_clock("银滩", NOON)


@pytest.mark.parametrize(
    ("value", "source", "target", "result"),
    [
        (1, "里", "米", "500"),
        (3, "尺", "米", "1"),
        (100, "华氏度", "摄氏度", "37.7777777777778"),
        (-40, "C", "F", "-40"),
        (0, "摄氏度", "K", "273.15"),
        (90, "km/h", "m/s", "25"),
        (15, "亩", "公顷", "1"),
        (1, "GiB", "MB", "1073.741824"),
        (2, "miles", "km", "3.218688"),
        (0.1, "kg", "g", "100"),
    ],
)
def test_单位换算(value, source, target, result):
    assert convert(value, source, target)["result"] == result


@given(st.integers(-1000, 1000), st.sampled_from(sorted(_UNITS)), st.sampled_from(sorted(_UNITS)))
@settings(max_examples=150, deadline=None)
def test_换过去再换回来(value, source, target):
    if _UNITS[source][0] != _UNITS[target][0]:
        with pytest.raises(ToolError, match="不能换算"):
            convert(value, source, target)
        return
    there = float(convert(value, source, target)["result"])
    assert float(convert(there, target, source)["result"]) == pytest.approx(value, rel=1e-9, abs=1e-6)


def test_不认识的单位与太大的数():
    with pytest.raises(ToolError, match="不认识单位 光年"):
        convert(1, "光年", "米")
    with pytest.raises(ToolError, match="太大"):
        convert(float("inf"), "米", "尺")


def test_词典():
    assert look_up("梯度") == look_up("gradients")
    with pytest.raises(ToolError, match="相近的有 优化器"):
        look_up("优化")
