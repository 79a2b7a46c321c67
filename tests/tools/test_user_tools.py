"""使用者自己的工具：文件 → 说明；抛异常、跑不完、崩溃都只是一句错误；题里列着不会的工具，开训之前就说。"""

from __future__ import annotations

import json

import pytest

from minimind.errors import UserError
from minimind.inference.tool_calls import ToolCall
from minimind.rl.reward_file import load_function
from minimind.tools.base import Toolbox, ToolError
from minimind.tools.beside import ToolProcess, tools_beside
from minimind.tools.from_file import read_tools
from minimind.tools.toolset import Toolset

GOOD = '''
import os
import time
from typing import Literal, Optional

from minimind.tools import ToolError

CITY = "北京"
count = 0


def stock(code: str, days: int = 1, side: Literal["买", "卖"] = "买", note: Optional[str] = None) -> dict:
    """查股价。

    细说：不进说明。

    Args:
        code: 股票代码。
        days: 几天的。
    """
    return {"price": 3.5 * days, "side": side}


def plain(names: list[str], exact: bool, ratio: float | None = None) -> float:
    """返回一个数。"""
    return len(names)


def again() -> int:
    """数数。"""
    global count
    count += 1
    return count


def refuses(x: float) -> dict:
    """不肯。"""
    raise ToolError("要正数")


def raises(x: int) -> dict:
    """出错。"""
    return {"r": 1 / x}


def loops() -> dict:
    """跑不完。"""
    while True:
        pass


def dies() -> dict:
    """进程没了。"""
    os._exit(3)


def leaves() -> dict:
    """想退出。"""
    raise SystemExit(1)


def unwritable() -> dict:
    """写不成 JSON。"""
    return {"x": object()}


def _hidden(x):
    return x
'''


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tools") / "mine.py"
    path.write_text(GOOD, "utf-8")
    return str(path)


@pytest.fixture(scope="module")
def box(file):
    return Toolbox(tools_beside(file, 30.0))


def run(box, name, **values):
    return json.loads(box.run(ToolCall(name, json.dumps(values), "")))


def test_函数变成说明_导入的与下划线开头的不算(file):
    tools = {tool.name: tool for tool in read_tools(file)}
    assert list(tools) == [
        "stock",
        "plain",
        "again",
        "refuses",
        "raises",
        "loops",
        "dies",
        "leaves",
        "unwritable",
    ]
    assert tools["stock"].schema() == {
        "type": "function",
        "function": {
            "name": "stock",
            "description": "查股价。",
            "parameters": {
                "type": "object",
                "properties": {
                    "code": {"type": "string", "description": "股票代码。"},
                    "days": {"type": "integer", "description": "几天的。"},
                    "side": {"type": "string", "enum": ["买", "卖"]},
                    "note": {"type": "string"},
                },
            },
        },
    }
    assert tools["stock"].optional == ("days", "side", "note")
    assert tools["plain"].properties == {
        "names": {"type": "array", "items": {"type": "string"}},
        "exact": {"type": "boolean"},
        "ratio": {"type": "number"},
    }
    assert tools["plain"].optional == ("ratio",)


def test_在另一个进程里执行_状态留着(box):
    assert run(box, "stock", code="A", days=2) == {"price": 7.0, "side": "买"}
    assert run(box, "plain", names=["甲", "乙"], exact=True) == {"result": 2}
    assert [run(box, "again")["result"] for _ in range(3)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("refuses", {"x": 1}, "要正数"),
        ("raises", {"x": 0}, "ZeroDivisionError"),
        ("leaves", {}, "SystemExit"),
        ("unwritable", {}, "TypeError"),
        ("stock", {"code": "A", "side": "借"}, "只能是 买、卖"),
        ("stock", {"code": "A", "days": "二"}, "应当是 integer"),
        ("stock", {}, "缺少参数 code"),
        ("没有的", {}, "没有工具"),
    ],
)
def test_用不了都只是一句错误_之后照常(box, name, values, words):
    assert words in run(box, name, **values)["error"]
    assert run(box, "stock", code="A")["price"] == 3.5


def test_跑不完的与让进程退出的_结束它再起一个(file):
    process = ToolProcess(file, 3.0)
    try:
        assert process("again") == {"result": 1}
        with pytest.raises(ToolError, match="3 秒没有返回"):
            process("loops")
        assert process.process is None
        assert process("again") == {"result": 1}  # 新的进程，从头数
        with pytest.raises(ToolError, match="进程退出了"):
            process("dies")
        assert process("again") == {"result": 1}
    finally:
        process.close()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def f(x: str):\n    return {}\n", "f.*没有文档字符串"),
        ("def f(x):\n    '说明'\n", "参数 x 没有类型标注"),
        ("def f(x: set):\n    '说明'\n", "参数 x 的类型是 <class 'set'>"),
        ("def f(x: 'Missing'):\n    '说明'\n", "读不出类型标注"),
        ("def f(*names: str):\n    '说明'\n", "不能由模型给出"),
        ("X = 1\n", "文件里没有函数"),
        ("async def f(x: str):\n    '说明'\n", "f.*协程或生成器"),
        ("def f(x: str):\n    '说明'\n    yield x\n", "f.*协程或生成器"),
        ("def f(x: list[tuple]):\n    '说明'\n", "参数 x 的类型是 <class 'tuple'>"),
        ("import sys\nsys.exit(3)\n", "文件导入失败（SystemExit：3）"),
        ("def f(:\n", "文件导入失败"),
    ],
)
def test_写得不对的文件_说清哪个函数的哪个参数(tmp_path, text, words):
    (tmp_path / "bad.py").write_text(text, "utf-8")
    with pytest.raises(UserError, match=words) as caught:
        read_tools(str(tmp_path / "bad.py"))
    assert "--tools" in str(caught.value)


def test_没有这个文件(tmp_path):
    with pytest.raises(UserError, match="没有这个文件"):
        Toolset(str(tmp_path / "none.py"))


def test_不是Python文件(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n", "utf-8")
    for load in (lambda: Toolset(str(path)), lambda: load_function(str(path), "f")):
        with pytest.raises(UserError, match=r"不是 Python 文件.*\.py") as caught:
            load()
        assert str(path) in caught.value.where


def row(tools=None, **more):
    system = (
        {"role": "system", "content": "", "tools": tools} if tools else {"role": "system", "content": "好"}
    )
    return {"conversations": [system, {"role": "user", "content": "问"}], **more}


def schema(name):
    return {"type": "function", "function": {"name": name, "description": "", "parameters": {}}}


def test_题里列着的才能用_使用者的同名工具优先_没列的题列出他的(file):
    own = Toolset(file, 30.0)
    assert list(own.for_record(row([schema("stock"), schema("calculator")])).tools) == ["stock", "calculator"]
    assert list(own.for_record(row()).tools) == [tool.name for tool in own.own]
    assert Toolset().listed(row()) == [] and Toolset().for_record(row()).tools == {}
    assert own.identity and not Toolset().identity


def item(line, record):
    return {"source": "a.jsonl", "line": line, "record": record}


def test_列着没有人会执行的工具_指出哪一行():
    tools = Toolset()
    tools.check([item(1, row([schema("get_current_weather")])), item(2, row())], None)
    with pytest.raises(UserError, match=r"a\.jsonl:3：列着工具 fly.*--tools"):
        tools.check(None, [item(3, row([schema("calculator"), schema("fly")]))])
    with pytest.raises(UserError, match="search"):
        tools.check([item(4, row([schema("search")]))])


def test_查资料的工具只有这道题自己的几条():
    pages = {"甲": {"年龄": "3"}, "乙": {"error": "要用编号查"}}
    box = Toolset().for_record(row([schema("search")], lookup=pages))
    assert run(box, "search", query=" 甲") == {"年龄": "3"}
    assert run(box, "search", query="乙") == {"error": "要用编号查"}
    assert run(box, "search", query="丙") == {"error": "没有 丙"}


ODD = """
from __future__ import annotations
import enum, functools
from collections import namedtuple
from dataclasses import dataclass
from typing import Literal, Optional


@dataclass
class Page:
    title: str


class Level(enum.IntEnum):
    HIGH = 3


Pair = namedtuple("Pair", "a b")


class Strange(Exception):
    def __str__(self):
        raise ValueError


def _loud(function):
    def inner(x: int) -> int:
        '套了一层'
        return function(x)
    return inner


@functools.lru_cache
def cached(x: int) -> int:
    '记住结果'
    return x + 1


@_loud
def first(x: int) -> int:
    '一'
    return x


@_loud
def second(x: int) -> int:
    '二'
    return -x


def grid(rows: list[list[int]], marks: Optional[list[Literal["甲", "乙"]]] = None) -> dict:
    '''格子。

    Args:
        rows: 各行，
            每行一串整数。

        marks (list): 记号
    '''
    return {"level": Level.HIGH, "pair": Pair(1, 2), "title": Page("题").title}


def wild(kind: str):
    '怪东西'
    if kind == "nan":
        return float("nan")
    if kind == "local":
        class Local(dict):
            pass
        return Local(a=1)
    raise Strange
"""


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    path = tmp_path_factory.mktemp("tools") / "odd.py"
    path.write_text(ODD, "utf-8")
    return str(path)


def test_装饰过的函数也是工具_名字是文件里的名字(odd):
    tools = {tool.name: tool for tool in read_tools(odd)}
    assert list(tools) == ["cached", "first", "second", "grid", "wild"]
    assert tools["cached"].properties == {"x": {"type": "integer"}}
    assert tools["grid"].properties == {
        "rows": {
            "type": "array",
            "items": {"type": "array", "items": {"type": "integer"}},
            "description": "各行， 每行一串整数。",
        },
        "marks": {"type": "array", "items": {"type": "string", "enum": ["甲", "乙"]}, "description": "记号"},
    }


def test_返回自己的类也收得到_写不成JSON的是一句错误(odd):
    box = Toolbox(tools_beside(odd, 30.0))
    assert run(box, "cached", x=1) == {"result": 2}
    assert [run(box, name, x=1)["result"] for name in ("first", "second")] == [1, -1]
    assert run(box, "grid", rows=[[1]]) == {"level": 3, "pair": [1, 2], "title": "题"}
    assert run(box, "wild", kind="local") == {"a": 1}
    assert "ValueError" in run(box, "wild", kind="nan")["error"]
    assert "Strange" in run(box, "wild", kind="")["error"]
    for values, words in (
        ({"rows": [["一"]]}, "参数 rows 的每一项的每一项应当是 integer"),
        ({"rows": [1]}, "参数 rows 的每一项应当是 array"),
        ({"rows": [[True]]}, "应当是 integer"),
        ({"rows": [], "marks": ["丙"]}, "只能是 甲、乙"),
    ):
        call = ToolCall("grid", json.dumps(values), "")
        assert words in box.problem(call) and words in json.loads(box.run(call))["error"]


def test_载入时就退出的进程_也是一句错误(tmp_path):
    path = tmp_path / "child.py"
    path.write_text(
        "import multiprocessing, os\n"
        "if multiprocessing.parent_process():\n    os._exit(1)\n"
        "def f(x: int):\n    '说明'\n    return x\n",
        "utf-8",
    )
    process = ToolProcess(str(path), 30.0)
    with pytest.raises(ToolError, match="进程退出了"):
        process("f", x=1)
    assert process.process is None


def test_列着的工具没有名字_指出哪一行():
    with pytest.raises(UserError, match=r"a\.jsonl:5 字段 tools：.*没有名字"):
        Toolset().check([item(5, row([{"type": "function", "function": {"description": "x"}}]))])


NULLABLE = '''
from typing import Optional


def need(a: Optional[int], b: "str | None" = "乙", c: int = 1) -> str:
    """可以写 null 的参数。"""
    return f"{a} {b} {c}"
'''


def test_与None的并_不给就是None_也可以写null(tmp_path):
    """没有默认值的 Optional，Python 要求给：模型没给时由我们补上 None，不是一句莫名的 TypeError。"""
    path = tmp_path / "mine.py"
    path.write_text(NULLABLE, encoding="utf-8")
    (tool,) = read_tools(str(path))
    assert tool.function() == "None 乙 1" and tool.function(a=3, b=None) == "3 None 1"
    assert tool.optional == ("a", "b", "c") and tool.nullable == ("a", "b")
    box = Toolbox(tools_beside(str(path), 20.0))
    assert run(box, "need") == {"result": "None 乙 1"}
    assert run(box, "need", a=2, b=None) == {"result": "2 None 1"}
    for values in ({"a": "二"}, {"c": None}):
        assert "应当是 integer" in run(box, "need", **values)["error"]
