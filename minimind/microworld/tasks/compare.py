"""比较与排序。"""

from __future__ import annotations

import random

from ..core import Example, Task
from ..phrasing import ask, fill
from .base import OperandTask


class Bigger(OperandTask):
    def propose(self, rng: random.Random) -> Example:
        a, b = rng.sample(range(1, 100), 2)
        big, small = max(a, b), min(a, b)
        if rng.random() < 0.5:
            question = fill(
                rng,
                (
                    "{a}和{b}哪个大？",
                    "{a}与{b}，哪个更大？",
                    "比一比，{a}和{b}谁大？",
                    "一条鱼重{a}斤，一条鱼重{b}斤，哪个数大？",
                    "Which is bigger, {a} or {b}?",
                ),
                a=a,
                b=b,
            )
            best, word = big, "大"
        else:
            question = fill(
                rng,
                (
                    "{a}和{b}哪个小？",
                    "{a}与{b}，哪个更小？",
                    "比一比，{a}和{b}谁小？",
                    "一只猫{a}岁，一只猫{b}岁，哪个数小？",
                    "Which is smaller, {a} or {b}?",
                ),
                a=a,
                b=b,
            )
            best, word = small, "小"
        response = f"更{word}的是{best}。"
        lines = (f"{a}和{b}，{response}", f"{big}比{small}大。", f"{small}比{big}小。")
        return Example(f"{small}|{big}", ask(rng, question), response, str(best), "numeric", lines=lines)


class Extreme(OperandTask):
    """两到四个一位数里最大或最小的。"""

    def propose(self, rng: random.Random) -> Example:
        numbers = rng.sample(range(1, 10), rng.randint(2, 4))
        text = "、".join(map(str, numbers))
        word = rng.choice(("大", "小"))
        best = max(numbers) if word == "大" else min(numbers)
        question = fill(
            rng,
            (
                "{t}里最{w}的数是几？",
                "{t}，最{w}的是哪个？",
                "在{t}中，最{w}的数是多少？",
                "四处找找，{t}当中哪个最{w}？",
            ),
            t=text,
            w=word,
        )
        response = f"最{word}的是{best}。"
        key = f"{word}|{','.join(map(str, sorted(numbers)))}"
        return Example(
            key, ask(rng, question), response, str(best), "numeric", lines=(f"{text}，{response}",)
        )


class Sort(OperandTask):
    def propose(self, rng: random.Random) -> Example:
        numbers = rng.sample(range(1, 10), rng.randint(2, 4))
        up = rng.random() < 0.5
        word = "从小到大" if up else "从大到小"
        text, done = "、".join(map(str, numbers)), "、".join(map(str, sorted(numbers, reverse=not up)))
        question = fill(
            rng, ("把{t}{w}排一排。", "{t}，{w}怎么排？", "请{w}排列：{t}", "{w}排好{t}。"), t=text, w=word
        )
        key = f"{word}|{','.join(map(str, sorted(numbers)))}"
        return Example(key, question, f"{word}：{done}。", done, lines=(f"{text}，{word}：{done}。",))


def make_tasks() -> list[Task]:
    return [
        Bigger("bigger", "两位数比大小", level="hard"),
        Extreme("extreme", "最大最小"),
        Sort("sort", "排序", level="hard"),
    ]
