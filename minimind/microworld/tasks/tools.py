"""工具：该调用哪一个、参数是什么；拿到结果后怎么回话。"""

from __future__ import annotations

import json
import operator
import random

from ..core import Example, Task
from ..phrasing import fill
from ..world import TOWNS
from .base import OperandTask


def tool(name: str, description: str, argument: str) -> dict:
    """公共格式的一条工具说明，参数一律是一个字符串。"""
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {"type": "object", "properties": {argument: {"type": "string"}}},
        },
    }


CALCULATOR = tool("calculator", "计算算式", "expression")
WEATHER = tool("get_weather", "查天气", "city")
CLOCK = tool("get_time", "查时间", "city")
TOOLS = (CALCULATOR, WEATHER, CLOCK)

WEATHER_ASKS = (
    "{c}天气怎么样？",
    "{c}今天下雨吗？",
    "查一下{c}的天气。",
    "我要去{c}，该带伞吗？",
    "{c}今天冷不冷？",
)
TIME_ASKS = ("{c}现在几点？", "查一下{c}的时间。", "{c}那边几点了？", "{c}现在是什么时间？")
MATH_ASKS = ("用计算器算{e}。", "{e}太难了，帮我算。", "请计算{e}。", "{e}得多少？用工具算。")

CITY_HEADS = "东西南北上下大小新老青白红金银石木水"
CITY_TAILS = "门桥山湾河口塘岭坡洲港滩"
SKIES = ("晴", "多云", "小雨", "大雪", "有风", "有雾")


OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def compute(expression: str) -> int:
    """算 ``347*28`` 这样的两数算式。"""
    for sign, apply in OPERATORS.items():
        if sign in expression:
            left, right = expression.split(sign)
            return apply(int(left), int(right))
    raise ValueError(f"不是两数算式：{expression}")


def draw_expression(rng: random.Random) -> str:
    """两位数乘一位数，或两个两位数不进位不退位的加减：与加减法、进位加法的题都不重叠，结果里漏不出它们的答案。"""
    sign, a, b = rng.choice(tuple(OPERATORS)), rng.randint(11, 89), rng.randint(11, 89)
    if sign == "*":
        return f"{a}*{rng.randint(2, 9)}"
    if (sign == "+" and a % 10 + b % 10 > 9) or (sign == "-" and not (a > b and a % 10 >= b % 10)):
        return draw_expression(rng)
    return f"{a}{sign}{b}"


def draw_city(rng: random.Random) -> str:
    """三成是云川的小镇，其余现编，逼模型照抄而不是背。"""
    if rng.random() < 0.3:
        return rng.choice(TOWNS)
    return rng.choice(CITY_HEADS) + rng.choice(CITY_TAILS)


def draw_call(rng: random.Random) -> tuple[dict, str, dict]:
    """``(工具, 问句, 参数)``。"""
    which = rng.choice(TOOLS)
    if which is CALCULATOR:
        expression = draw_expression(rng)
        return which, fill(rng, MATH_ASKS, e=expression), {"expression": expression}
    city = draw_city(rng)
    asks = WEATHER_ASKS if which is WEATHER else TIME_ASKS
    return which, fill(rng, asks, c=city), {"city": city}


class ToolCallTask(OperandTask):
    """给出三样工具，答案是一次调用。"""

    def propose(self, rng: random.Random) -> Example:
        which, question, arguments = draw_call(rng)
        call = {"name": which["function"]["name"], "arguments": arguments}
        # 工具说明很占词元：多数只给一样，三分之一给两样让模型挑
        offered = [which]
        if rng.random() < 0.33:
            offered.insert(rng.randrange(2), rng.choice([t for t in TOOLS if t is not which]))
        text = json.dumps(call, ensure_ascii=False)
        return Example(
            f"{call['name']}:{next(iter(arguments.values()))}",
            question,
            "",
            text,
            "tool_call",
            tools=tuple(offered),
            tool_calls=(call,),
            lines=(f"{question}{text}",),
        )

    def document(self, rng: random.Random, side: str) -> str:
        return "\n".join(self.example(rng, side).lines[0] for _ in range(rng.randint(2, 4)))


class ToolResultTask(OperandTask):
    """工具已经返回结果，用一句话告诉用户。"""

    def propose(self, rng: random.Random) -> Example:
        which, question, arguments = draw_call(rng)
        name = which["function"]["name"]
        if which is CALCULATOR:
            value = str(compute(arguments["expression"]))
            result, response = {"result": value}, f"结果是{value}。"
            answer, grader = value, "numeric"
        elif which is WEATHER:
            sky, degree = rng.choice(SKIES), rng.randint(1, 35)
            result = {"sky": sky, "degree": degree}
            answer, grader = f"{sky}，{degree}度", "contains"
            response = f"{arguments['city']}今天{answer}。"
        else:
            hour, minute = rng.randint(0, 23), rng.randint(10, 59)
            result = {"time": f"{hour}:{minute}"}
            answer, grader = f"{hour}点{minute}分", "contains"
            response = f"{arguments['city']}现在是{answer}。"
        call = {"name": name, "arguments": arguments}
        history = (
            {"role": "user", "content": question},
            {"role": "assistant", "content": "", "tool_calls": json.dumps([call], ensure_ascii=False)},
            {"role": "tool", "content": json.dumps(result, ensure_ascii=False)},
        )
        text = json.dumps(result, ensure_ascii=False)
        return Example(
            f"{name}:{next(iter(arguments.values()))}:{answer}",
            "",
            response,
            answer,
            grader,
            tools=(which,),
            history=history,
            lines=(f"{question}{text}{response}",),
        )

    def document(self, rng: random.Random, side: str) -> str:
        return "\n".join(self.example(rng, side).lines[0] for _ in range(rng.randint(2, 3)))


def make_tasks() -> list[Task]:
    return [
        ToolCallTask("tool_call", "调用工具"),
        ToolResultTask("tool_result", "转述结果"),
    ]
