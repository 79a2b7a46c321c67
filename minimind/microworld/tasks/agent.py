"""差事：要几次调用工具才办得成的题，只看最后答得对不对。

长乘法、连着换算、查只有工具里才有的事（每道题现编，背不下来）、接连查两次、查不到要换个查法、用不着工具的。
这些题只进 ``agent*.jsonl``，不在 :data:`minimind.microworld.tasks.TASKS` 里：别的阶段的文件与考题不因它们而变。
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field

from ..core import Example, Task, side_of
from ..phrasing import fill
from .base import words
from .dialogue import GIVEN, SURNAMES
from .tools import CALCULATOR, tool

SEARCH = tool("search", "查资料", "query")
CONVERT = {
    "type": "function",
    "function": {
        "name": "convert_unit",
        "description": "换算单位",
        "parameters": {
            "type": "object",
            "properties": {
                "value": {"type": "number"},
                "from_unit": {"type": "string"},
                "to_unit": {"type": "string"},
            },
        },
    },
}

# 现编的词由这些字拼成，预训练里的清单抄惯了的；没有姓氏，也没有资料名的头一个字，免得从题面里拼出答案
LETTERS = "米面茶盐糖油鱼鸡牛羊狗鸟花草树石土水火风云雨雪月星山河海灯钟书纸信布车门"
FIELDS = words("船名 店名 网名 笔名 暗号 口令")
RELATIONS = words("老师 邻居 徒弟 搭档 室友 上司")
# 大单位、小单位、一个大的等于几个小的
UNITS = (
    ("千米", "米", 1000), ("米", "厘米", 100), ("吨", "千克", 1000), ("千克", "克", 1000),
    ("小时", "分钟", 60), ("分钟", "秒", 60), ("天", "小时", 24), ("公里", "米", 1000),
)  # fmt: skip

TIMES_ASKS = ("{a}乘{b}等于多少？", "{a}*{b}是多少？", "算一下{a}乘以{b}。", "{a}×{b}得几？")
UNIT_ASKS = (
    "{n}{u}又{m}{v}一共是多少{v}？",
    "{n}{u}加{m}{v}是多少{v}？",
    "先有{n}{u}，再有{m}{v}，合起来多少{v}？",
)
LOOKUP_ASKS = ("{s}的{f}是什么？", "查一下{s}的{f}。", "{s}{f}是什么？", "我想知道{s}的{f}。")
CHAIN_ASKS = ("{s}的{r}，{f}是什么？", "查一下{s}的{r}的{f}。", "{s}的{r}{f}是什么？")


@dataclass(frozen=True)
class Errand:
    """一件差事。

    Args:
        key: 划分与去重按它。
        question: 用户的话。
        tools: 给出的工具说明。
        steps: 一种办法：依次的 ``(工具名, 参数, 结果)``，一步一回合；空的不用工具。
        response: 最后的回答；``answer``、``grader``、``reject`` 判它对不对，意思同 :class:`Example`。
        lookup: 查资料的工具查得到的几条。
    """

    key: str
    question: str
    tools: tuple[dict, ...]
    steps: tuple[tuple[str, dict, dict], ...]
    response: str
    answer: str
    grader: str = "contains"
    reject: tuple[str, ...] = ()
    lookup: dict[str, dict] = field(default_factory=dict)

    def _opening(self) -> list[dict]:
        return [*system_of(self.tools), {"role": "user", "content": self.question}]

    def record(self, task: str) -> dict:
        """强化学习的一行：公共项目的格式，另有判分与工具要的字段。"""
        row = {
            "conversations": [*self._opening(), {"role": "assistant", "content": ""}],
            "gt": [self.answer],
            "task": task,
            "grader": self.grader,
            "answer": self.answer,
            "calls": len(self.steps),
        }
        if self.reject:
            row["reject"] = list(self.reject)
        if SEARCH in self.tools:
            row["lookup"] = self.lookup
        return row

    def turns(self, upto: int | None = None) -> list[dict]:
        """从问到答的各回合；``upto`` 是照那种办法走几步就作答，``None`` 走完。"""
        turns: list[dict] = [{"role": "user", "content": self.question}]
        for name, arguments, result in self.steps[:upto]:
            call = json.dumps([{"name": name, "arguments": arguments}], ensure_ascii=False)
            turns.append({"role": "assistant", "content": "", "tool_calls": call})
            turns.append({"role": "tool", "content": json.dumps(result, ensure_ascii=False)})
        return [*turns, {"role": "assistant", "content": self.response}]


def system_of(tools: tuple[dict, ...]) -> list[dict]:
    """写着工具说明的系统消息。"""
    return [{"role": "system", "content": "", "tools": json.dumps(list(tools), ensure_ascii=False)}]


def draw_name(rng: random.Random) -> str:
    """人名：姓与名各一个字，都是预训练里抄惯了的；事是现编的，只有工具里才有。

    预训练没见过的字在词表里是几个字节，三位数、编号与两项里挑一项，小模型也都抄不对（docs/log.md）。
    """
    return rng.choice(SURNAMES) + rng.choice(GIVEN)


def draw_page(rng: random.Random) -> dict[str, str]:
    """一页资料：现编的一个词，约一千三百个。"""
    return {rng.choice(FIELDS): "".join(rng.sample(LETTERS, 2))}


class TimesErrand:
    """长乘法：心算不来，一次计算器。"""

    name, title = "agent_times", "长乘法"

    def propose(self, rng: random.Random) -> Errand:
        a, b = rng.randint(112, 989), rng.randint(12, 98)
        text, value = f"{a}*{b}", str(a * b)
        step = ("calculator", {"expression": text}, {"result": value})
        return Errand(
            text,
            fill(rng, TIMES_ASKS, a=a, b=b),
            (CALCULATOR,),
            (step,),
            f"结果是{value}。",
            value,
            "numeric",
        )


class UnitsErrand:
    """连着换算：先换成小单位，再加。"""

    name, title = "agent_units", "连着换算"

    def propose(self, rng: random.Random) -> Errand:
        big, small, times = rng.choice(UNITS)
        n, m = rng.randint(2, 40), rng.randint(11, 99)
        converted, total = str(n * times), str(n * times + m)
        steps = (
            ("convert_unit", {"value": n, "from_unit": big, "to_unit": small}, {"result": converted, "unit": small}),
            ("calculator", {"expression": f"{converted}+{m}"}, {"result": total}),
        )  # fmt: skip
        question = fill(rng, UNIT_ASKS, n=n, u=big, m=m, v=small)
        return Errand(
            f"{n}{big}{m}", question, (CONVERT, CALCULATOR), steps, f"一共{total}{small}。", total, "numeric"
        )


class LookupErrand:
    """查只有工具里才有的事。"""

    name, title = "agent_lookup", "查资料"

    def propose(self, rng: random.Random) -> Errand:
        who, page = draw_name(rng), draw_page(rng)
        (what,) = page
        return Errand(
            f"{who}{page[what]}",
            fill(rng, LOOKUP_ASKS, s=who, f=what),
            (SEARCH,),
            (("search", {"query": who}, page),),
            f"{who}的{what}是{page[what]}。",
            page[what],
            lookup={who: page},
        )


class ChainErrand:
    """接连查两次：先查是谁，再查他的事。"""

    name, title = "agent_chain", "接连查两次"

    def propose(self, rng: random.Random) -> Errand:
        who, other, page = draw_name(rng), draw_name(rng), draw_page(rng)
        relation, (what,) = rng.choice(RELATIONS), page
        first = {relation: other}
        if who == other:
            return self.propose(rng)
        return Errand(
            f"{who}{other}{page[what]}",
            fill(rng, CHAIN_ASKS, s=who, r=relation, f=what),
            (SEARCH,),
            (("search", {"query": who}, first), ("search", {"query": other}, page)),
            f"{other}的{what}是{page[what]}。",
            page[what],
            lookup={who: first, other: page},
        )


class RetryErrand:
    """第一次查不到，照它说的换个查法。"""

    name, title = "agent_retry", "换个查法"

    def propose(self, rng: random.Random) -> Errand:
        who, other, page = draw_name(rng), draw_name(rng), draw_page(rng)
        (what,), failed = page, {"error": f"改名了，要查{other}"}
        if who == other:
            return self.propose(rng)
        return Errand(
            f"{who}{other}{page[what]}",
            fill(rng, LOOKUP_ASKS, s=who, f=what),
            (SEARCH,),
            (("search", {"query": who}, failed), ("search", {"query": other}, page)),
            f"{who}的{what}是{page[what]}。",
            page[what],
            lookup={who: failed, other: page},
        )


class NoToolErrand:
    """给了工具却用不着：平常的问题直接答。

    Args:
        tasks: 从哪些家族出题。
    """

    name, title = "agent_none", "用不着工具"

    def __init__(self, tasks: list[Task]):
        self.tasks = tasks

    def ask(self, rng: random.Random, side: str, tools: tuple[dict, ...] | None = None) -> Errand:
        """``tools`` 是给出的工具，``None`` 随便给一样。"""
        example: Example = rng.choice(self.tasks).example(rng, side)
        return Errand(
            example.key, example.question, tools or (rng.choice((SEARCH, CALCULATOR)),), (), example.response,
            example.answer, example.grader, example.reject,
        )  # fmt: skip


FAMILIES = (TimesErrand, UnitsErrand, LookupErrand, ChainErrand, RetryErrand)
# 微调的一段对话接着问几件，工具相同：说明占一段的大半，只问一件不划算
LESSONS = (
    ((CALCULATOR,), "agent_times agent_none agent_none"),
    ((CONVERT, CALCULATOR), "agent_units agent_none agent_none"),
    ((CONVERT, CALCULATOR), "agent_units agent_times"),
    ((SEARCH,), "agent_lookup agent_none agent_chain agent_retry"),
    ((SEARCH,), "agent_none agent_retry agent_chain agent_none"),
)
# 两步的差事在微调里走完的比例；其余走了一步就作答，多半是错的：要走完，由强化学习自己发现
FINISHED_SHARE = 0.2


class Errands:
    """全部差事家族，轮流出题。

    Args:
        tasks: 普通问答的家族，用不着工具的题从这里出。
        seed: 划分的种子。
    """

    def __init__(self, tasks: list[Task], seed: int):
        self.seed = seed
        self.families = {family.name: family() for family in FAMILIES}
        plain = [t for t in tasks if t.name not in ("tool_call", "tool_result", "memory", "manner")]
        self.no_tool = NoToolErrand(plain)

    def draw(self, rng: random.Random, number: int, side: str) -> tuple[str, Errand]:
        """第 ``number`` 道属于 ``side`` 的题：``(家族名, 差事)``。"""
        names = [*self.families, self.no_tool.name]
        name = names[number % len(names)]
        return name, self.propose(rng, name, side)

    def propose(
        self, rng: random.Random, name: str, side: str, tools: tuple[dict, ...] | None = None
    ) -> Errand:
        """家族 ``name`` 的一道属于 ``side`` 的题；``tools`` 是用不着工具的题给出的。"""
        if name == self.no_tool.name:
            return self.no_tool.ask(rng, side, tools)
        while True:
            errand = self.families[name].propose(rng)
            if side_of(name, errand.key, self.seed) == side:
                return errand

    def lesson(self, rng: random.Random, number: int, side: str) -> dict:
        """监督微调的第 ``number`` 段：接着问几件，各走完或走一步就答。"""
        tools, names = LESSONS[number % len(LESSONS)]
        turns = system_of(tools)
        for name in rng.sample(names.split(), len(names.split())):
            errand = self.propose(rng, name, side, tools)
            whole = len(errand.steps) < 2 or rng.random() < FINISHED_SHARE
            turns += errand.turns(None if whole else 1)
        return {"conversations": turns}
