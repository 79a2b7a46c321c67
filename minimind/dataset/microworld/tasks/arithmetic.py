"""算术：加、减、九九乘法。加减的留出题至少有一个两位数，一位数的表全部留给训练。"""

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


class Add(OperandTask):
    def propose(self, rng: random.Random) -> Example:
        a, b = draw(rng), draw(rng)
        while a + b > 99:
            a, b = draw(rng), draw(rng)
        return self.build(rng, a, b)

    def side_of_pair(self, a: int, b: int) -> str:
        """供别的家族检查：推导里的一步是否撞上留出的加法。"""
        return self.side_of(self.key_of(a, b))

    def key_of(self, a: int, b: int) -> str:
        return f"{min(a, b)}+{max(a, b)}"

    def side_of(self, key: str) -> str:
        return "train" if max(map(int, key.split("+"))) < 10 else super().side_of(key)

    def build(self, rng: random.Random, a: int, b: int) -> Example:
        done = f"{a}+{b}={a + b}"
        return Example(
            key=self.key_of(a, b),
            question=ask(rng, fill(rng, ADD_QUESTIONS, a=a, b=b)),
            response=f"{done}。",
            answer=str(a + b),
            grader="numeric",
            lines=(done, done, f"{done}。", f"{a}加{b}：{done}"),
        )

    def cloze(self, rng: random.Random, side: str) -> tuple[str, str, str]:
        ex = self.example(rng, side)
        left, right = ex.response.rstrip("。").split("=")
        return ex.key, f"{left}=", right


class Sub(OperandTask):
    def propose(self, rng: random.Random) -> Example:
        a, b = rng.randint(2, 99), draw(rng)
        while b >= a:
            a, b = rng.randint(2, 99), draw(rng)
        done = f"{a}-{b}={a - b}"
        return Example(
            key=f"{a}-{b}",
            question=ask(rng, fill(rng, SUB_QUESTIONS, a=a, b=b)),
            response=f"{done}。",
            answer=str(a - b),
            grader="numeric",
            lines=(done, done, f"{done}。", f"{a}减{b}：{done}"),
        )

    def side_of(self, key: str) -> str:
        return "train" if int(key.split("-")[0]) < 10 else super().side_of(key)

    cloze = Add.cloze


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
        Times(name="times", title="九九乘法", kind=TIMES_TABLE),
    ]
