"""算术：加、减、九九乘法。"""

from __future__ import annotations

import random
from dataclasses import dataclass

from ..core import Example, Task
from ..phrasing import ask, fill
from ..world.base import Kind, Relation
from .base import FactTask, OperandTask

ADD_QUESTIONS = (
    "{a}+{b}=？",
    "{a}+{b}等于多少？",
    "{a}加{b}等于几？",
    "{a}加上{b}是多少？",
    "{a}与{b}的和是多少？",
    "算一算，{a}+{b}是多少？",
    "左边有{a}只鸭子，右边有{b}只，一共有多少只？",
    "果园上午摘了{a}个梨，下午摘了{b}个，一共摘了多少个？",
    "阿豆昨天送了{a}封信，今天送了{b}封，一共送了多少封？",
    "What is {a}+{b}?",
    "How much is {a} plus {b}?",
)
SUB_QUESTIONS = (
    "{a}-{b}=？",
    "{a}-{b}等于多少？",
    "{a}减{b}等于几？",
    "{a}减去{b}是多少？",
    "{a}与{b}的差是多少？",
    "算一算，{a}-{b}是多少？",
    "树上有{a}只鸟，飞走了{b}只，还剩多少只？",
    "面包师烤了{a}个面包，卖掉{b}个，还剩多少个？",
    "阿圆带着{a}枚铜叶，花掉{b}枚，还剩多少枚？",
    "What is {a}-{b}?",
    "How much is {a} minus {b}?",
)


def draw(rng: random.Random) -> int:
    """一位数占四分之一，其余两位数。"""
    return rng.randint(1, 9) if rng.random() < 0.25 else rng.randint(10, 89)


def worked(rng: random.Random, key: str, questions: tuple[str, ...], a: int, sign: str, b: int) -> Example:
    """一道加减题；回答先把算式抄一遍，和预训练里的写法一致。"""
    value = a + b if sign == "+" else a - b
    done = f"{a}{sign}{b}={value}"
    return Example(
        key=key,
        question=ask(rng, fill(rng, questions, a=a, b=b)),
        response=f"{done}。",
        answer=str(value),
        grader="numeric",
        lines=(done, done, f"{done}。", f"{a}{'加' if sign == '+' else '减'}{b}：{done}"),
    )


class Equation(OperandTask):
    """``左边=右边`` 的题：填空就是等号之后。"""

    def cloze(self, rng: random.Random, side: str) -> tuple[str, str, str]:
        ex = self.example(rng, side)
        left, right = ex.response.rstrip("。").split("=")
        return ex.key, f"{left}=", right


class Add(Equation):
    """两位数加一位数，不进位。"""

    def propose(self, rng: random.Random) -> Example:
        b = rng.randint(1, 9)
        a = 10 * rng.randint(1, 9) + rng.randint(0, 9 - b)
        return worked(rng, f"{a}+{b}", ADD_QUESTIONS, a, "+", b)


class Sub(Equation):
    """两位数减一位数，不退位。"""

    def propose(self, rng: random.Random) -> Example:
        b = rng.randint(1, 9)
        a = 10 * rng.randint(1, 9) + rng.randint(b, 9)
        return worked(rng, f"{a}-{b}", SUB_QUESTIONS, a, "-", b)


class Carry(Equation):
    """百以内任意两数相加，多半要进位（hard）。"""

    def propose(self, rng: random.Random) -> Example:
        a, b = draw(rng), draw(rng)
        while a + b > 99 or max(a, b) < 10 or a % 10 + b % 10 < 10:
            a, b = draw(rng), draw(rng)
        return worked(rng, f"{min(a, b)}+{max(a, b)}", ADD_QUESTIONS, a, "+", b)


PRODUCT = Relation(
    "product",
    "积",
    ("{s}={o}。", "{s}等于{o}，也就是{s}={o}。", "背口诀：{s}={o}。", "{s}={o}，记住了。"),
    ("{s}=？", "{s}等于多少？", "{s}的积是多少？", "口诀里{s}得几？", "{s}是多少？", "What is {s}?"),
    numeric=True,
)
TIMES_TABLE = Kind(
    "times",
    "九九乘法",
    "口诀",
    (PRODUCT,),
    tuple((f"{a}×{b}", str(a * b)) for a in range(2, 10) for b in range(2, 10)),
)


@dataclass
class Times(FactTask):
    """九九表是事实：全部写进预训练，SFT 只问一部分。3×4 与 4×3 同组。"""

    def group(self, fact) -> str:
        return "×".join(sorted(fact.subject.split("×")))

    def ask_about(self, rng: random.Random, fact) -> Example:
        question = ask(rng, fill(rng, PRODUCT.questions, s=fact.subject))
        done = f"{fact.subject}={fact.value}"
        return Example(self.group(fact), question, f"{done}。", fact.value, grader="numeric")

    def cloze(self, rng: random.Random, side: str) -> tuple[str, str, str]:
        fact = rng.choice(self.kind.facts)
        return self.group(fact), f"{fact.subject}=", fact.value


def make_tasks() -> list[Task]:
    return [
        Add("add", "加法"),
        Sub("sub", "减法"),
        Carry("carry", "进位加法", level="hard"),
        Times(name="times", title="九九乘法", level="hard", kind=TIMES_TABLE),
    ]
