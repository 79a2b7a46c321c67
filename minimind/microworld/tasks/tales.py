"""云川见闻：把真相编进几句话的小故事，只进预训练，不出题。"""

from __future__ import annotations

import random

from ..core import Example, Task
from ..world import KINDS

TALES = (
    "{p}住在{home}，是个{job}。这天早上，{p}带着{pet}坐船去{origin}，想买一件{prod}。{prod}卖{price}枚铜叶，{p}数了三遍，刚好够。"
    "回家的路上，{p}试了试，{prod}真的可以用来{use}，连{pet}也看呆了。",
    "每年的{date}，{venue}都要过{fest}。{p}天不亮就从{home}出发，先吃了一大份{dish}，再和大家一起{custom}。"
    "有人问{p}好不好玩，{p}只顾着笑，忘了回答。",
    "半夜，{p}听见窗外有人喊“{sound}”，推门一看，是一只{color}的{animal}。{animal}住在{habitat}，今天走丢了。"
    "{p}分给它半份{food}，它闻了闻，摇摇头，原来{animal}爱吃{diet}。",
    "{town}建于云川历{year}年，旗子是{flag}的。外地人问，为什么{landmark}上总坐着一只{mascot}？"
    "{p}想了想说：因为{mascot}也喜欢{spec}。{town}的特产正是{spec}。",
    "老师问：谁会{skill}？全班都说：{animal}！老师又问：谁是云川最好的{job}？全班都喊：{p}！"
    "坐在后排的{p}红了脸，{p}今年{age}岁，还是怕被老师点名。",
    "{p}给{town}写信：听说你们靠着{water}，我想带{pet}来看看{landmark}。"
    "{town}回信：欢迎，请带一份{food}，我们知道{p}最爱吃{food}。",
)


class Tale(Task):
    def draw(self, rng: random.Random) -> dict[str, tuple[str, ...]]:
        """每类事物各抽一个。"""
        return {kind.name: rng.choice(kind.rows) for kind in KINDS}

    def document(self, rng: random.Random, side: str) -> str:
        rows = self.draw(rng)
        while rows["person"][2] in (rows["product"][1], rows["festival"][2], rows["place"][0]):
            rows = self.draw(rng)  # 住在本镇的人不必坐船去本镇
        town, spec, landmark, water, year, flag, mascot = rows["place"]
        p, job, home, pet, food, age = rows["person"]
        animal, habitat, diet, color, sound, skill = rows["animal"]
        prod, origin, price, _, use = rows["product"]
        fest, date, venue, dish, custom = rows["festival"]
        return rng.choice(TALES).format(**{k: v for k, v in locals().items() if isinstance(v, str)})

    def example(self, rng: random.Random, side: str) -> Example:
        raise NotImplementedError("云川见闻只有文章，不出题")


def make_tasks() -> list[Task]:
    return [Tale("tale", "云川见闻", split="fact")]
