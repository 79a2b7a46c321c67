"""云川历（每月三十天）、星期与钟表。"""

from __future__ import annotations

import random

from ..core import Example, Task
from ..phrasing import ask, fill
from .base import OperandTask

WEEKDAYS = "一二三四五六日"


class DateShift(OperandTask):
    """同一个月里往后数几天。"""

    def propose(self, rng: random.Random) -> Example:
        month, delta = rng.randint(1, 12), rng.randint(1, 9)
        day = rng.randint(1, 30 - delta)
        start, done = f"{month}月{day}日", f"{month}月{day + delta}日"
        question = fill(
            rng,
            (
                "{s}再过{n}天是几月几日？",
                "{s}之后的第{n}天是哪天？",
                "今天是{s}，{n}天后是哪一天？",
                "船{s}出发，走了{n}天，哪天到？",
                "信在{s}寄出，{n}天后送到，送到那天是几月几日？",
            ),
            s=start,
            n=delta,
        )
        line = f"{start}再过{delta}天是{done}。"
        return Example(f"{start}+{delta}", ask(rng, question), line, done, "tail", lines=(line,))


class Weekday(OperandTask):
    def propose(self, rng: random.Random) -> Example:
        month, delta, first = rng.randint(1, 12), rng.randint(1, 3), rng.randrange(7)
        day = rng.randint(1, 30 - delta)
        start, later = f"{month}月{day}日", f"{month}月{day + delta}日"
        a, b = WEEKDAYS[first], WEEKDAYS[(first + delta) % 7]
        question = fill(
            rng,
            (
                "{s}是星期{a}，{l}是星期几？",
                "如果{s}是星期{a}，那么{l}是星期几？",
                "日历上{s}是星期{a}，{l}呢？",
            ),
            s=start,
            a=a,
            l=later,
        )
        line = f"{start}是星期{a}，{later}是星期{b}。"
        return Example(
            f"{start}|{a}|{delta}",
            question,
            f"{later}是星期{b}。",
            f"星期{b}",
            reject=tuple(f"星期{w}" for w in WEEKDAYS if w != b),
            lines=(line,),
        )


class Clock(OperandTask):
    def propose(self, rng: random.Random) -> Example:
        hour, delta = rng.randint(1, 12), rng.choice((5, 10, 15, 20, 25, 30))
        minute = rng.randint(1, 59 - delta)
        start, done = f"{hour}点{minute}分", f"{hour}点{minute + delta}分"
        question = fill(
            rng,
            (
                "现在{s}，再过{n}分钟是几点几分？",
                "{s}过{n}分钟是什么时候？",
                "面包{s}进炉，要烤{n}分钟，几点几分出炉？",
                "船{s}开，{n}分钟后到，几点几分到？",
            ),
            s=start,
            n=delta,
        )
        line = f"{start}再过{delta}分钟是{done}。"
        return Example(f"{start}+{delta}", ask(rng, question), line, done, "tail", lines=(line,))


def make_tasks() -> list[Task]:
    return [
        DateShift("date", "日期推算"),
        Weekday("weekday", "星期推算"),
        Clock("clock", "钟表"),
    ]
