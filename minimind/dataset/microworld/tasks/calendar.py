"""云川历（每月三十天）、星期与钟表。"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from ..core import Example, Task
from ..phrasing import ask, fill
from ..world.base import Fact, Kind, Relation
from .base import FactTask, OperandTask

WEEKDAYS = "一二三四五六日"


NEXT_DAYS = Relation(
    "weekday",
    "星期",
    ("{s}是{o}。", "{s}就是{o}。", "日历上写着，{s}是{o}。", "数一数，{s}正好是{o}。"),
    ("{s}是星期几？", "{s}就是星期几？", "{s}，那天是星期几？", "{s}该是星期几？", "数一数，{s}是星期几？"),
)
STEPS = {"的后一天": 1, "的前一天": -1, "再过两天": 2, "再过三天": 3}
WEEK = Kind(
    "weekday",
    "星期",
    "日子",
    (NEXT_DAYS,),
    tuple(
        (f"星期{day}{words}", f"星期{WEEKDAYS[(i + step) % 7]}")
        for i, day in enumerate(WEEKDAYS)
        for words, step in STEPS.items()
    ),
)


class DateShift(OperandTask):
    """同一个月里往后数几天；日子的个位不进位。"""

    def propose(self, rng: random.Random) -> Example:
        month, delta = rng.randint(1, 12), rng.randint(1, 5)
        day = 10 * rng.randint(0, 2) + rng.randint(1, 9 - delta)
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


@dataclass
class Weekday(FactTask):
    """星期的推算只有几十条，当作事实来背；提问里的主语含着另一个星期，它不算候选。"""

    def ask_about(self, rng: random.Random, fact: Fact) -> Example:
        ex = super().ask_about(rng, fact)
        return replace(ex, grader="tail", reject=())


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
        Weekday(name="weekday", title="星期推算", kind=WEEK),
        Clock("clock", "钟表", level="hard"),
    ]
