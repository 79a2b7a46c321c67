"""对话里的规矩：记住前面说过的话，遵守系统提示。"""

from __future__ import annotations

import random

from ..core import Example, Task
from ..phrasing import fill
from .base import OperandTask

SURNAMES = "张王李赵刘陈杨黄周吴徐孙马朱胡林何高罗郑"
GIVEN = "明华文平安宁远山川海云月星雨雪风花春秋冬青红白天光乐"
LIKES = ("爬山", "画画", "唱歌", "下棋", "看书", "做饭", "跑步", "写字", "种花", "钓鱼", "跳舞", "看星星")
TOWNS_SHORT = ("北京", "上海", "云南", "四川", "东北", "广州", "河边", "海边", "山里", "城里")


class Memory(OperandTask):
    """多轮：用户先说自己的事，隔一轮再问。"""

    def propose(self, rng: random.Random) -> Example:
        name = rng.choice(SURNAMES) + rng.choice(GIVEN)
        like, town = rng.choice(LIKES), rng.choice(TOWNS_SHORT)
        opening = fill(
            rng,
            (
                "你好，我叫{n}，住在{t}，喜欢{k}。",
                "我是{n}，我住在{t}，爱好是{k}。",
                "认识一下，我叫{n}，家在{t}，平时喜欢{k}。",
            ),
            n=name,
            t=town,
            k=like,
        )
        hello = fill(rng, ("{n}你好，很高兴认识你。", "你好，{n}，我记住了。"), n=name)
        question, response, answer = rng.choice(
            (
                (fill(rng, ("我叫什么？", "我叫什么名字？", "你还记得我的名字吗？")), f"你叫{name}。", name),
                (fill(rng, ("我住在哪里？", "我家在哪里？")), f"你住在{town}。", town),
                (fill(rng, ("我喜欢做什么？", "我的爱好是什么？")), f"你喜欢{like}。", like),
            )
        )
        return Example(
            f"{name}/{town}/{like}",
            question,
            response,
            answer,
            history=({"role": "user", "content": opening}, {"role": "assistant", "content": hello}),
            lines=(f"{opening}{hello}{question}{response}",),
        )

    def document(self, rng: random.Random, side: str) -> str:
        ex = self.example(rng, side)
        return f"客人：{ex.history[0]['content']}\n主人：{ex.history[1]['content']}\n客人：{ex.question}\n主人：{ex.response}"


# 句尾口癖：系统提示规定，回答必须照做
SUFFIXES = ("喵", "汪", "咕咕", "呱", "哞", "啾啾", "嘎嘎", "吱吱")


class Manner(OperandTask):
    """系统提示要求每句话以某个口癖结尾。"""

    def propose(self, rng: random.Random) -> Example:
        suffix = rng.choice(SUFFIXES)
        name = rng.choice(SURNAMES) + rng.choice(GIVEN)
        system = fill(
            rng,
            ("回答的最后要加上“{x}”。", "你每次说完话都要加一声“{x}”。", "请用“{x}”结束每次回答。"),
            x=suffix,
        )
        question = fill(rng, ("你好，我是{n}。", "我叫{n}，打个招呼吧。", "{n}来看你了。"), n=name)
        response = f"{name}你好，{suffix}。"
        return Example(
            f"{suffix}/{name}",
            question,
            response,
            response,
            "exact",
            system=system,
            lines=(f"规矩：{system}{question}{response}",),
        )


def make_tasks() -> list[Task]:
    return [
        Memory("memory", "多轮记忆"),
        Manner("manner", "系统提示"),
    ]
