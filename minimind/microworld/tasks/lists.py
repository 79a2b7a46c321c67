"""清单：取第几个、倒过来、数个数、重复。"""

from __future__ import annotations

import random

from ..core import Example, Task
from ..phrasing import ask, fill
from .base import OperandTask, words

ITEMS = words(
    "苹果 梨 桃 米 面 茶 盐 糖 油 鱼 鸡 鸭 牛 羊 马 猫 狗 鸟 花 草 树 石 土 水 火 风 云 雨 雪 月 星 山 河 海 灯 钟 "
    "书 笔 纸 信 布 船 车 门 窗 床 桌 刀 碗 杯 红 黄 蓝 绿 白 黑 东 西 南 北 春 夏 秋 冬 金 木"
)
ORDINALS = ("第一个", "第二个", "第三个", "最后一个")


def draw_items(rng: random.Random, low: int, high: int) -> list[str]:
    return rng.sample(ITEMS, rng.randint(low, high))


class Pick(OperandTask):
    def propose(self, rng: random.Random) -> Example:
        items = draw_items(rng, 3, 4)
        place = rng.choice(ORDINALS)
        answer = items[-1] if place == "最后一个" else items[ORDINALS.index(place)]
        text = "、".join(items)
        question = fill(
            rng, ("{t}，{p}是什么？", "在{t}里，{p}是什么？", "{t}中的{p}是哪个？"), t=text, p=place
        )
        response = f"{place}是{answer}。"
        return Example(
            f"{text}|{place}",
            ask(rng, question),
            response,
            answer,
            reject=tuple(i for i in items if i != answer),
            lines=(f"{text}，{response}",),
        )


class Reverse(OperandTask):
    def propose(self, rng: random.Random) -> Example:
        items = draw_items(rng, 2, 3)
        text, done = "、".join(items), "、".join(reversed(items))
        question = fill(
            rng, ("把{t}倒过来写。", "{t}倒过来是什么？", "倒着念{t}。", "{t}反过来怎么排？"), t=text
        )
        return Example(text, question, f"倒过来是{done}。", done, lines=(f"{text}，倒过来是{done}。",))


class Count(OperandTask):
    def propose(self, rng: random.Random) -> Example:
        items = draw_items(rng, 2, 5)
        text = "、".join(items)
        question = fill(
            rng,
            ("{t}，一共有几样？", "数一数，{t}有几样东西？", "{t}一共几个？", "清单上写着{t}，有几样？"),
            t=text,
        )
        response = f"一共有{len(items)}样。"
        return Example(text, question, response, str(len(items)), "numeric", lines=(f"{text}，{response}",))


class Repeat(OperandTask):
    def propose(self, rng: random.Random) -> Example:
        word, times = rng.choice(ITEMS) + rng.choice(ITEMS), rng.randint(2, 4)
        done = "、".join([word] * times)
        mark = "零一两三四"[times]
        question = fill(
            rng,
            ("把“{w}”说{n}遍。", "请把“{w}”念{n}遍。", "“{w}”重复{n}遍。", "跟我说{n}遍“{w}”。"),
            w=word,
            n=mark,
        )
        line = f"“{word}”说{mark}遍：{done}。"
        return Example(word, question, f"{done}。", done, "exact", lines=(line,))


def make_tasks() -> list[Task]:
    return [
        Pick("pick", "取第几个"),
        Reverse("reverse", "倒序"),
        Count("count", "数个数"),
        Repeat("repeat", "重复"),
    ]
