"""小故事与一个问题：答案就在故事里；hard 的故事有两三个人，要找对人。"""

from __future__ import annotations

import random
from dataclasses import dataclass

from ..core import Example, Task
from ..phrasing import fill
from ..world import NAMES
from .base import OperandTask

COLORS = ("红", "黄", "蓝", "绿", "白", "黑")
THINGS = ("伞", "帽子", "灯笼", "书包", "球", "风筝", "信", "篮子")
SPOTS = ("石桥边", "树洞里", "钟楼下", "船上", "窗台上", "井边", "屋顶上", "草堆里", "磨坊后面", "码头上")
OPENINGS = ("早上，", "下雨天，", "天刚亮，", "放学以后，", "赶集那天，", "刮大风的晚上，", "")
ENDINGS = ("", "", "后来天晴了。", "镇上的钟响了三下。", "一只花猫路过，什么也没说。", "风把云吹走了。")


@dataclass(frozen=True)
class Line:
    """故事里的一件事：谁把什么颜色的什么放在哪里。"""

    who: str
    color: str
    thing: str
    spot: str

    def told(self, rng: random.Random) -> str:
        return fill(
            rng,
            (
                "{s.who}把{s.color}{s.thing}放在{s.spot}",
                "{s.who}把{s.color}{s.thing}忘在{s.spot}",
                "{s.who}把{s.color}{s.thing}藏在{s.spot}",
            ),
            s=self,
        )


class Story(OperandTask):
    def propose(self, rng: random.Random) -> Example:
        count = 1 if self.level == "easy" else rng.choice((2, 3))
        lines = [
            Line(*parts)
            for parts in zip(
                rng.sample(NAMES, count),
                rng.sample(COLORS, count),
                rng.sample(THINGS, count),
                rng.sample(SPOTS, count),
            )
        ]
        target = rng.choice(lines)
        story = (
            rng.choice(OPENINGS) + "，".join(line.told(rng) for line in lines) + "。" + rng.choice(ENDINGS)
        )
        question, response, answer, pool = rng.choice(
            (
                (
                    fill(
                        rng,
                        (
                            "{s.who}的{s.thing}在哪里？",
                            "去哪里找{s.who}的{s.thing}？",
                            "{s.who}把{s.thing}放在了哪里？",
                        ),
                        s=target,
                    ),
                    f"{target.who}的{target.thing}在{target.spot}。",
                    target.spot,
                    [line.spot for line in lines],
                ),
                (
                    fill(rng, ("{s.spot}的{s.thing}是谁的？", "谁的{s.thing}在{s.spot}？"), s=target),
                    f"{target.spot}的{target.thing}是{target.who}的。",
                    target.who,
                    [line.who for line in lines],
                ),
                (
                    fill(
                        rng, ("{s.who}的{s.thing}是什么颜色？", "{s.who}的{s.thing}是什么颜色的？"), s=target
                    ),
                    f"{target.who}的{target.thing}是{target.color}色的。",
                    f"{target.color}色",
                    [f"{line.color}色" for line in lines],
                ),
            )
        )
        key = ";".join(sorted("/".join((x.who, x.color, x.thing, x.spot)) for x in lines))
        return Example(
            key,
            fill(rng, ("{s}{q}", "{s}问：{q}", "读故事：{s}{q}"), s=story, q=question),
            response,
            answer,
            reject=tuple(p for p in pool if p != answer),
            lines=(f"{story}{response}",),
        )


def make_tasks() -> list[Task]:
    return [Story("story", "小故事"), Story("story_hard", "几个人的小故事", level="hard")]
