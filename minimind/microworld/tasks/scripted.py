"""话题固定的问答（自我介绍、寒暄）：按问法划分，留出的问法在训练里从没出现过。"""

from __future__ import annotations

import random
from dataclasses import dataclass

from ..core import Example, Task, side_of

ZH_HEADS = (
    "",
    "请问",
    "你好，",
    "嗨，",
    "早上好，",
    "我想问问，",
    "第一次见面，",
    "对了，",
    "打扰一下，",
    "好奇地问一句，",
)
ZH_TAILS = ("？", "呀？", "呢？", "，可以告诉我吗？", "，说来听听。", "？谢谢。")
EN_HEADS = ("", "Hello! ", "Hi, ", "Good morning. ", "Excuse me, ", "By the way, ")
EN_TAILS = ("?", ", please?", "? Thank you.")


@dataclass(frozen=True)
class Topic:
    """一个话题。

    Args:
        stems: 问法的主干，与句首、句尾组合成完整的问法。
        answers: 几种答法，每种都含关键词 ``key``。
        key: 判分用的关键词；``rivals`` 出现就算错。
    """

    name: str
    stems: tuple[str, ...]
    answers: tuple[str, ...]
    key: str
    rivals: tuple[str, ...] = ()
    heads: tuple[str, ...] = ZH_HEADS
    tails: tuple[str, ...] = ZH_TAILS

    def questions(self) -> list[str]:
        return [f"{head}{stem}{tail}" for stem in self.stems for head in self.heads for tail in self.tails]


@dataclass
class ScriptedTask(Task):
    """``topics`` 里的话题等概率出现；问法的两成留出。"""

    split: str = "phrasing"
    topics: tuple[Topic, ...] = ()

    def side_of(self, key: str) -> str:
        # 不看家族名字：两个身份用同一套划分，LoRA 的留出问法在 SFT 里也没出现过
        return side_of("scripted", key, self.seed, 0.2)

    def prepare(self) -> None:
        self._pools: dict[str, list[list[str]]] = {}

    def pool(self, side: str) -> list[list[str]]:
        """各话题属于 ``side`` 的问法。"""
        if side not in self._pools:
            self._pools[side] = [[q for q in t.questions() if self.side_of(q) == side] for t in self.topics]
        return self._pools[side]

    def example(self, rng: random.Random, side: str) -> Example:
        index = rng.randrange(len(self.topics))
        topic, question = self.topics[index], rng.choice(self.pool(side)[index])
        return Example(question, question, rng.choice(topic.answers), topic.key, reject=topic.rivals)

    def document(self, rng: random.Random, side: str) -> str:
        examples = [self.example(rng, side) for _ in range(rng.randint(2, 3))]
        return "\n".join(f"问：{ex.question}\n答：{ex.response}" for ex in examples)
