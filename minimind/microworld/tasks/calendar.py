"""云川历（每月三十天）、星期与钟表。"""

from __future__ import annotations

import random

from ..core import Example, Task
from ..phrasing import ask, fill
from ..world.base import Kind, Relation
from .base import FactTask, OperandTask

WEEKDAYS = "一二三四五六日"


def weekday_relation(name: str, words: str) -> Relation:
    return Relation(
        name,
        words,
        (
            f"{{s}}的{words}是{{o}}。",
            f"{{s}}的{words}就是{{o}}。",
            f"日历上，{{s}}的{words}写着{{o}}。",
            f"过完{{s}}，要说{{s}}的{words}，那是{{o}}。",
        ),
        (
            f"{{s}}的{words}是星期几？",
            f"{{s}}的{words}是哪一天？",
            f"日历上，{{s}}的{words}写着什么？",
            f"今天是{{s}}，{{s}}的{words}是星期几？",
        ),
    )


WEEKDAY_ENGLISH = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
ENGLISH_NAME = Relation(
    "english",
    "英文",
    ("{s}的英文是{o}。", "{s}用英文说是{o}。", "英文日历上，{s}写作{o}。", "{s}翻译成英文是{o}。"),
    ("{s}的英文是什么？", "{s}用英文怎么说？", "把{s}翻译成英文。", "英文日历上，{s}写作什么？"),
)
# 一共二十一条，当作事实来背
WEEK = Kind(
    "weekday",
    "星期",
    "日子",
    (weekday_relation("next", "后一天"), weekday_relation("previous", "前一天"), ENGLISH_NAME),
    tuple(
        (f"星期{day}", f"星期{WEEKDAYS[(i + 1) % 7]}", f"星期{WEEKDAYS[i - 1]}", WEEKDAY_ENGLISH[i])
        for i, day in enumerate(WEEKDAYS)
    ),
)


class DateShift(OperandTask):
    """前后一两天是几月几日；不跨月，日子的个位不进位。"""

    def propose(self, rng: random.Random) -> Example:
        words, delta = rng.choice((("后一天", 1), ("前一天", -1), ("后两天", 2)))
        month = rng.randint(1, 12)
        day = 10 * rng.randint(0, 2) + rng.randint(2, 7)
        start, done = f"{month}月{day}日", f"{month}月{day + delta}日"
        question = fill(
            rng,
            (
                "{s}的{w}是几月几日？",
                "{s}的{w}是哪天？",
                "今天是{s}，{s}的{w}是哪一天？",
                "翻翻日历，{s}的{w}是几月几日？",
                "船在{s}的{w}出发，那是哪天？",
            ),
            s=start,
            w=words,
        )
        line = f"{start}的{words}是{done}。"
        return Example(f"{start}{delta:+d}", ask(rng, question), line, done, "tail", lines=(line,))


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
        FactTask(name="weekday", title="星期推算", kind=WEEK),
        Clock("clock", "钟表", level="hard"),
    ]
