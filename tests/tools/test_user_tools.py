"""使用者自己的工具：文件 → 说明；抛异常、跑不完、崩溃都只是一句错误；题里列着不会的工具，开训之前就说。"""

from __future__ import annotations

import json

import pytest

from minimind.errors import UserError
from minimind.inference.tool_calls import ToolCall
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
