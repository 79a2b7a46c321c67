"""工具与工具箱：给模型看的说明、参数的检查、执行。"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from minimind.errors import UserError
from minimind.inference.tool_calls import ToolCall
from minimind.tokenizer.render import dump_json

# 结果要放回上下文里，再长就挤掉对话了
MAX_RESULT = 2000

# JSON Schema 的类型 → Python 的类型；bool 是 int 的子类，单独排除
_TYPES = {
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "object": (dict,),
    "array": (list,),
}


class ToolError(Exception):
    """工具用不了这组参数；消息是给模型看的一句话。"""


@dataclass(frozen=True)
class Tool:
    """一个工具。

    Args:
        name: 工具名。
        description: 给模型看的一句话。
        properties: 参数名 → JSON Schema。
        function: 以关键字参数调用，返回能写成 JSON 的对象；用不了就抛 :class:`ToolError`。
        optional: 可以不给的参数。
        nullable: 可以写 null 的参数。
    """

    name: str
    description: str
    properties: dict[str, dict[str, Any]]
    function: Callable[..., dict[str, Any]]
    optional: tuple[str, ...] = ()
    nullable: tuple[str, ...] = ()

    def schema(self) -> dict[str, Any]:
        """OpenAI 格式的说明。不写 ``required``：说明占上下文，微世界教的也是这种短写法；缺了参数会得到一句错误。"""
        parameters = {"type": "object", "properties": self.properties}
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}

    def check(self, values: dict[str, Any]) -> None:
        """参数对不对得上说明。

        Raises:
            ToolError: 缺参数、多参数或类型不对。
        """
        if missing := [name for name in self.properties if name not in values and name not in self.optional]:
            raise ToolError(f"缺少参数 {'、'.join(missing)}")
        if unknown := [name for name in values if name not in self.properties]:
            raise ToolError(f"没有参数 {'、'.join(unknown)[:100]}，只有 {'、'.join(self.properties)}")
        for name, value in values.items():
            if value is None and name in self.nullable:
                continue
            _check_value(value, self.properties[name], f"参数 {name} ")


def _check_value(value: Any, schema: dict[str, Any], who: str) -> None:
    wanted = schema.get("type", "string")
    if not isinstance(value, _TYPES[wanted]) or (isinstance(value, bool) and wanted != "boolean"):
        raise ToolError(f"{who}应当是 {wanted}")
    if value not in (allowed := schema.get("enum", [value])):
        raise ToolError(f"{who}只能是 {'、'.join(map(str, allowed))[:200]}")
    if wanted == "array" and "items" in schema:
        for one in value:
            _check_value(one, schema["items"], f"{who}的每一项")


class Toolbox:
    """一组工具。

    Raises:
        UserError: 有重名。
    """

    def __init__(self, tools: Iterable[Tool]):
        tools = tuple(tools)
        self.tools = {tool.name: tool for tool in tools}
        if len(self.tools) != len(tools):
            raise UserError("工具重名了", expected="名字各不相同", fix="给其中一个改名")

    def pick(self, names: str) -> Toolbox:
        """只留下这几个，逗号分隔；``all`` 是全部。

        Raises:
            UserError: 没有这个工具。
        """
        if names.strip() == "all":
            return self
        wanted = [name.strip() for name in names.split(",") if name.strip()]
        if unknown := [name for name in wanted if name not in self.tools]:
            raise UserError(
                f"没有工具 {'、'.join(unknown)}",
                expected="、".join(self.tools),
                fix="改 --tool_names，逗号分隔；all 表示全部",
            )
        return Toolbox(self.tools[name] for name in wanted)

    def schemas(self) -> list[dict[str, Any]]:
        """全部工具的说明，放进对话模板或请求的 ``tools``。"""
        return [tool.schema() for tool in self.tools.values()]

    def run(self, call: ToolCall) -> str:
        """执行一次调用，返回给模型看的 JSON。任何坏输入都是 ``{"error": …}``，不抛异常。"""
        return _clean(dump_json(self._result(call)))

    def problem(self, call: ToolCall) -> str | None:
        """调用合不合工具的说明：写坏了、没有这个工具、参数不对，各一句话；合乎说明的是 ``None``。"""
        if call.error is not None:
            return f"调用写坏了：{call.error}"
        tool = self.tools.get(call.name)
        if tool is None:
            return f"没有工具 {call.name[:50]}，只有 {'、'.join(self.tools)}"
        try:
            tool.check(call.values())
        except ToolError as error:
            return str(error)
        return None

    def _result(self, call: ToolCall) -> dict[str, Any]:
        if problem := self.problem(call):
            return {"error": problem}
        try:
            result = self.tools[call.name].function(**call.values())
        except ToolError as error:
            return {"error": str(error)}
        except Exception as error:  # 使用者自己写的工具可能抛出任何东西；对话不该因此中断
            return {"error": f"工具出错了（{type(error).__name__}）"}
        if len(dump_json(result)) > MAX_RESULT:
            return {"error": f"结果超过 {MAX_RESULT} 字"}
        return result


def _clean(text: str) -> str:
    """参数里的 ``\\ud800`` 之类落单代理会跟着错误消息回来，不能写成 UTF-8，换成问号。"""
    return text.encode("utf-8", "replace").decode("utf-8")
