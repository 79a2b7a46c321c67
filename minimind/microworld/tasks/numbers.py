"""单位换算与找规律。"""

from __future__ import annotations

import random

from ..core import Example, Task
from ..phrasing import ask, fill
from .arithmetic import Equation
from .base import OperandTask

# 后三行是云川自己的单位
UNITS = (
    ("米", "厘米", 100),
    ("厘米", "毫米", 10),
    ("千克", "克", 1000),
    ("公里", "米", 1000),
    ("元", "角", 10),
    ("吨", "千克", 1000),
    ("竹尺", "豆寸", 10),
    ("铜叶", "沙籽", 100),
    ("月壶", "星杯", 10),
)


class Convert(Equation):
    def propose(self, rng: random.Random) -> Example:
        big, small, factor = rng.choice(UNITS)
        n = rng.randint(1, 99)
        line = f"{n}{big}={n * factor}{small}"
        question = fill(
            rng,
            (
                "{n}{b}是多少{s}？",
                "{n}{b}等于多少{s}？",
                "{n}{b}换成{s}是多少？",
                "把{n}{b}换算成{s}。",
                "{n}{b}合多少{s}？",
            ),
            n=n,
            b=big,
            s=small,
        )
        return Example(
            f"{n}{big}{small}", ask(rng, question), f"{line}。", str(n * factor), "numeric", lines=(line,)
        )

    def side_of(self, key: str) -> str:
        # “1米=100厘米”这样的定义留给训练，否则推不出来
        return "train" if key[0] == "1" and not key[1].isdigit() else super().side_of(key)


class NumberSequence(OperandTask):
    def propose(self, rng: random.Random) -> Example:
        step, start = rng.choice((1, 2, 3, 4, 5, 10)), rng.randint(1, 49)
        terms = [start + step * i for i in range(5)]
        text = "、".join(map(str, terms[:4]))
        question = fill(
            rng,
            (
                "{t}，下一个数是几？",
                "找规律：{t}，后面是几？",
                "{t}，接着写下去是几？",
                "数列{t}的下一项是多少？",
            ),
            t=text,
        )
        return Example(
            f"{start}|{step}",
            question,
            f"下一个数是{terms[4]}。",
            str(terms[4]),
            "numeric",
            lines=(f"{text}、{terms[4]}", f"{text}，下一个数是{terms[4]}。"),
        )


def make_tasks() -> list[Task]:
    return [
        Convert("convert", "单位换算"),
        NumberSequence("sequence", "找规律", level="hard"),
    ]
