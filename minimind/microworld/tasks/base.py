"""两类家族的共同做法：操作数题（算得出来）与事实题（记得住才答得出）。"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from ..core import HELDOUT, TRAIN, Example, Task, side_of
from ..phrasing import ask, fill, say
from ..world import Fact, Kind, Relation

T = TypeVar("T")

QA_MARKS = (("问：", "答："), ("甲：", "乙："), ("学生：", "老师："), ("阿豆：", "米婆婆："), ("Q: ", "A: "))


def words(text: str) -> list[str]:
    """空格隔开的词表。"""
    return text.split()


def dialogue(rng: random.Random, examples: Sequence[Example]) -> str:
    """把几道题写成纯文本的一问一答。"""
    asker, answerer = rng.choice(QA_MARKS)
    return "\n".join(f"{asker}{ex.question}\n{answerer}{ex.response}" for ex in examples)


def deck(rng: random.Random, cards: Sequence[T]) -> Iterator[T]:
    """洗好的牌一张张发，发完再洗。"""
    while True:
        yield from rng.sample(cards, len(cards))


class OperandTask(Task):
    """操作数题：训练与留出的操作数不相交，预训练文本也只用训练一侧的。"""

    def propose(self, rng: random.Random) -> Example:
        """随便出一道题，不管它属于哪一侧。"""
        raise NotImplementedError

    def example(self, rng: random.Random, side: str) -> Example:
        while True:
            ex = self.propose(rng)
            if self.side_of(ex.key) == side:
                return ex

    def document(self, rng: random.Random, side: str) -> str:
        if rng.random() < 0.5:
            return "\n".join(rng.choice(self.example(rng, side).lines) for _ in range(rng.randint(4, 9)))
        return dialogue(rng, [self.example(rng, side) for _ in range(rng.randint(2, 5))])


@dataclass
class FactTask(Task):
    """事实题：预训练陈述全部事实，SFT 只问训练一侧，留出题问的是从没问过的事实。"""

    split: str = "fact"
    kind: Kind = None  # type: ignore[assignment]
    heldout_ratio: float = 0.25
    _pools: dict[str, list[Fact]] = field(default_factory=dict, repr=False)

    def group(self, fact: Fact) -> str:
        """划分的单位；默认每条事实自成一组。"""
        return fact.key

    def side_of(self, key: str) -> str:
        return side_of(self.name, key, self.seed, self.heldout_ratio)

    def pool(self, side: str) -> list[Fact]:
        if not self._pools:
            self._pools = {TRAIN: [], HELDOUT: []}
            for fact in self.kind.facts:
                self._pools[self.side_of(self.group(fact))].append(fact)
        return self._pools[side]

    def example(self, rng: random.Random, side: str) -> Example:
        return self.ask_about(rng, rng.choice(self.pool(side)))

    def ask_about(self, rng: random.Random, fact: Fact) -> Example:
        """就一条事实发问。"""
        rel = fact.relation
        others = [v for v in self.kind.values_of(rel) if v not in (fact.value, fact.subject)]
        if "“{o}”" in rel.statements[0]:  # 一两个字的词处处可见，带引号的才算给出了那个答案
            others = [f"“{v}”" for v in others]
        return Example(
            key=fact.key,
            question=ask(rng, fill(rng, rel.questions, s=fact.subject)),
            response=fill(rng, rel.statements[:2], s=fact.subject, o=fact.value),
            answer=fact.value,
            grader="numeric" if rel.numeric else "contains",
            reject=() if rel.numeric else tuple(others),
        )

    def state(self, rng: random.Random, fact: Fact) -> str:
        """陈述一条事实。"""
        if rng.random() < 0.12:
            return f"{fact.relation.blank(fact.subject)}{fact.value}。"
        return say(rng, fill(rng, fact.relation.statements, s=fact.subject, o=fact.value))

    def documents(self, rng: random.Random, side: str) -> Iterator[str]:
        """短文、同类并列、一问一答三种写法；主语与事实都按洗好的牌轮流出现，次数均匀。"""
        subjects = deck(rng, self.kind.subjects)
        by_relation = {rel.name: deck(rng, self.facts_of(rel)) for rel in self.kind.relations}
        relations = deck(rng, tuple(by_relation))
        asked = deck(rng, tuple(self.pool(TRAIN)))
        single = len(self.kind.relations) == 1
        while True:
            style = rng.random()
            if style < 0.2 and side == TRAIN:
                yield dialogue(rng, [self.ask_about(rng, next(asked)) for _ in range(rng.randint(2, 4))])
            elif style < 0.4 or single:
                facts = by_relation[next(relations)]
                chosen = dict.fromkeys(next(facts) for _ in range(rng.randint(3, 6)))
                yield "".join(self.state(rng, fact) for fact in chosen)
            else:
                yield self.article(rng, next(subjects))

    def facts_of(self, relation: Relation) -> tuple[Fact, ...]:
        return tuple(fact for fact in self.kind.facts if fact.relation is relation)

    def article(self, rng: random.Random, subject: str) -> str:
        """一件事物的短文：几条事实打乱顺序。"""
        facts = self.kind.facts_of(subject)
        rng.shuffle(facts)
        return "".join(self.state(rng, fact) for fact in facts[: rng.randint(2, len(facts))])

    def cloze(self, rng: random.Random, side: str) -> tuple[str, str, str]:
        fact = rng.choice(self.kind.facts)
        return fact.key, fact.relation.blank(fact.subject), fact.value
