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
        for a, op, b in steps:
            if op == "+" and self.add.side_of(self.add.key_of(a, b)) != TRAIN:
                return False
            if op == "-" and self.sub.side_of(f"{a}-{b}") != TRAIN:
                return False
        return True

    def draw(self, rng: random.Random) -> tuple[str, list[tuple[int, str, int]], str]:
        """``(key, 步骤, 问句)``。"""
        raise NotImplementedError

    def example(self, rng: random.Random, side: str) -> Example:
        while True:
            key, steps, question = self.draw(rng)
            if self.side_of(key) != side or (side == TRAIN and not self.steps_are_trainable(steps)):
                continue
            worked = [f"{a}{op}{b}={a + b if op == '+' else a - b}" for a, op, b in steps]
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


class Sum3(Chain):
    """三到四个数连加。"""

    def draw(self, rng: random.Random):
        numbers = [rng.randint(2, 29) for _ in range(rng.choice((3, 3, 4)))]
        steps, total = [], numbers[0]
        for n in numbers[1:]:
            steps.append((total, "+", n))
            total += n
        if total > 99:
            return self.draw(rng)
        text = "+".join(map(str, numbers))
        return text, steps, fill(rng, ("{t}=？", "{t}等于多少？", "算一算{t}。", "连加：{t}"), t=text)


STORIES = (
    "阿圆有{a}颗莲子，又摘了{b}颗，送人{c}颗，还剩多少颗？",
    "书店有{a}本书，新到{b}本，卖出{c}本，还剩多少本？",
    "渡船上有{a}人，上来{b}人，下去{c}人，船上还有多少人？",
    "米婆婆蒸了{a}块米糕，又蒸了{b}块，吃掉{c}块，还剩多少块？",
    "树上有{a}只鸟，飞来{b}只，飞走{c}只，还有多少只？",
    "金爷爷有{a}支笔，买来{b}支，弄丢{c}支，还有多少支？",
)


class Word2(Chain):
    """先加后减的应用题。"""

    def draw(self, rng: random.Random):
        a, b = rng.randint(5, 49), rng.randint(3, 40)
        c = rng.randint(2, a + b - 1)
        key = f"{a}+{b}-{c}"
        return key, [(a, "+", b), (a + b, "-", c)], fill(rng, STORIES, a=a, b=b, c=c)


class Twice(Chain):
    """“比……多几个，一共几个”：两个数要用到同一个中间结果。"""

    def draw(self, rng: random.Random):
        a, d = rng.randint(5, 40), rng.randint(1, 18)
        question = fill(
            rng,
            (
                "左篮有{a}个梨，右篮比左篮多{d}个，两篮一共多少个？",
                "阿豆送了{a}封信，苗苗比他多送{d}封，两人一共送了多少封？",
                "白猫捉了{a}条鱼，花猫多捉{d}条，一共捉了多少条？",
            ),
            a=a,
            d=d,
        )
        return f"{a}|{d}", [(a, "+", d), (a, "+", a + d)], question


def make_tasks() -> list[Task]:
    return [
        Sum3("sum3", "连加", level="hard"),
        Word2("word2", "两步应用题", level="hard"),
        Twice("twice", "比多比少", level="hard"),
    ]
