"""多步题（hard）：每一步都不难，一口气说出答案却难。留给推理、强化学习两课。"""

from __future__ import annotations

import random

from ..core import TRAIN, Example, Task
from ..phrasing import fill
from .arithmetic import Add, Sub
from .base import OperandTask


class Chain(OperandTask):
    """几步加减连成的题；训练一侧的每一步都避开留出的加减题。"""

    def prepare(self) -> None:
        self.add, self.sub = Add("add", "加法", seed=self.seed), Sub("sub", "减法", seed=self.seed)

    def steps_are_trainable(self, steps: list[tuple[int, str, int]]) -> bool:
        judges = {"+": self.add, "-": self.sub}
        return all(judges[sign].side_of(f"{a}{sign}{b}") == TRAIN for a, sign, b in steps)

    def draw(self, rng: random.Random) -> tuple[str, list[tuple[int, str, int]], str]:
        """``(key, 步骤, 问句)``。"""
        raise NotImplementedError

    def example(self, rng: random.Random, side: str) -> Example:
        while True:
            key, steps, question = self.draw(rng)
            if self.side_of(key) != side or (side == TRAIN and not self.steps_are_trainable(steps)):
                continue
            worked = [f"{a}{sign}{b}={a + b if sign == '+' else a - b}" for a, sign, b in steps]
            answer = worked[-1].split("=")[1]
            derivation = "，".join(worked)
            return Example(
                key,
                question,
                f"答案是{answer}。",
                answer,
                "numeric",
                steps=derivation,
                lines=(f"{question}{derivation}，答案是{answer}。",),
            )

    def document(self, rng: random.Random, side: str) -> str:
        return "\n".join(self.example(rng, side).lines[0] for _ in range(rng.randint(2, 4)))


def easy_add(rng: random.Random, total: int) -> int | None:
    """不进位还能加多少；加不了就返回 None。"""
    room = 9 - total % 10
    return rng.randint(1, room) if room else None


def easy_sub(rng: random.Random, total: int) -> int | None:
    """不退位还能减多少；减不了就返回 None。"""
    return rng.randint(1, total % 10) if total % 10 else None


class Sum3(Chain):
    """连加与加减混合的算式，三到四个数。"""

    def draw(self, rng: random.Random):
        total, text, steps = rng.randint(10, 99), "", []
        text = str(total)
        for _ in range(rng.choice((2, 2, 3))):
            sign = rng.choice("+-")
            n = (easy_add if sign == "+" else easy_sub)(rng, total)
            if n is None:
                return self.draw(rng)
            steps.append((total, sign, n))
            text += f"{sign}{n}"
            total += n if sign == "+" else -n
        return text, steps, fill(rng, ("{t}=？", "{t}等于多少？", "算一算{t}。", "连着算：{t}"), t=text)


STORIES = (
    "阿圆有{a}颗莲子，又摘了{b}颗，送人{c}颗，还剩多少颗？",
    "书店有{a}本书，新到{b}本，卖出{c}本，还剩多少本？",
    "渡船上有{a}人，上来{b}人，下去{c}人，船上还有多少人？",
    "米婆婆蒸了{a}块米糕，又蒸了{b}块，吃掉{c}块，还剩多少块？",
    "树上有{a}只鸟，飞来{b}只，飞走{c}只，还有多少只？",
    "云姐有{a}个线团，买来{b}个，用掉{c}个，还有多少个？",
)


class Word2(Chain):
    """先加后减的应用题。"""

    def draw(self, rng: random.Random):
        a = rng.randint(10, 99)
        b = easy_add(rng, a)
        if b is None:
            return self.draw(rng)
        c = rng.randint(1, (a + b) % 10)
        return f"{a}+{b}-{c}", [(a, "+", b), (a + b, "-", c)], fill(rng, STORIES, a=a, b=b, c=c)


DAYS = (
    "邮差有{a}封信，上午送了{b}封，下午送了{c}封，晚上又收到{d}封，现在有多少封？",
    "麦小姐烤了{a}个面包，卖掉{b}个，自己吃了{c}个，又烤了{d}个，现在有多少个？",
    "羊圈里有{a}只羊，走丢了{b}只，借出{c}只，又生了{d}只，现在有多少只？",
    "口袋里有{a}枚铜叶，买茶花了{b}枚，买糖花了{c}枚，又捡到{d}枚，现在有多少枚？",
)


class Word3(Chain):
    """减、减、加的三步应用题。"""

    def draw(self, rng: random.Random):
        a = 10 * rng.randint(1, 9) + rng.randint(2, 9)
        b = rng.randint(1, a % 10 - 1)
        c = rng.randint(1, (a - b) % 10)
        rest = a - b - c
        d = rng.randint(1, 9 - rest % 10)
        steps = [(a, "-", b), (a - b, "-", c), (rest, "+", d)]
        return f"{a}-{b}-{c}+{d}", steps, fill(rng, DAYS, a=a, b=b, c=c, d=d)


def make_tasks() -> list[Task]:
    return [
        Sum3("sum3", "连算", level="hard"),
        Word2("word2", "两步应用题", level="hard"),
        Word3("word3", "三步应用题", level="hard"),
    ]
