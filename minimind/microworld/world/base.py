"""世界的骨架：事物的种类、关系与事实。真相只写在一处，语料与题目都由它展开。"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """一种关系，例如“特产”。

    Args:
        name: 英文标识，在同一种类里唯一。
        label: 名片上的短名（``柳桥镇的特产：柳条篮。``）。
        statements: 陈述句模板，``{s}`` 是主语，``{o}`` 是答案；主语总在答案之前，
            这样“由主语想起答案”的方向在预训练里就练到了。前两句也用作回答。
        questions: 问句模板，只含 ``{s}``，不带句首的客套（客套在 phrasing.py）。
        numeric: 答案是数字（按数值判分，而不是按子串）。
        quoted: 主语是词语，名片上要加引号。
    """

    name: str
    label: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    numeric: bool = False
    quoted: bool = False

    def blank(self, subject: str) -> str:
        """名片写法的前半，也是填空题的前文：``柳桥镇的特产：``。"""
        return f"“{subject}”的{self.label}：" if self.quoted else f"{subject}的{self.label}："


@dataclass(frozen=True)
class Fact:
    """一条事实；``key`` 是划分训练与留出的单位。"""

    kind: str
    subject: str
    relation: Relation
    value: str

    @property
    def key(self) -> str:
        return f"{self.subject}/{self.relation.name}"


@dataclass(frozen=True)
class Kind:
    """一类事物（小镇、人物……）：``rows`` 每行是名字加各关系的取值，顺序与 ``relations`` 一致。"""

    name: str
    title: str
    noun: str
    relations: tuple[Relation, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def subjects(self) -> tuple[str, ...]:
        return tuple(row[0] for row in self.rows)

    def facts_of(self, subject: str) -> list[Fact]:
        row = next(row for row in self.rows if row[0] == subject)
        return [Fact(self.name, subject, rel, value) for rel, value in zip(self.relations, row[1:])]

    @property
    def facts(self) -> list[Fact]:
        return [fact for subject in self.subjects for fact in self.facts_of(subject)]

    def values_of(self, relation: Relation) -> list[str]:
        """这种关系出现过的全部取值，去重，按出现顺序。"""
        column = self.relations.index(relation) + 1
        return list(dict.fromkeys(row[column] for row in self.rows))
