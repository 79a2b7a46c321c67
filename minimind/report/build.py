"""把考试的结果变成报告里的东西：各任务的表、样例和全部回答。"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from minimind.evaluate.microworld import Answered, accuracy, by_task
from minimind.microworld import TASKS
from minimind.report.report import BeforeAfter
from minimind.runtime.files import write_text

# 报告里展示多少道题；每个任务一道，按任务次序均匀地取，不挑好的
SAMPLES = 12


def task_table(before: Sequence[Answered], after: Sequence[Answered]) -> dict[str, dict]:
    """``{任务: {"title", "items", "before", "after", "level"}}``。"""
    old = by_task(before)
    return {
        task: {
            "title": TASKS[task].title if task in TASKS else task,
            "level": group[0].item["level"],
            "items": len(group),
            "before": accuracy(old[task]) if task in old else None,
            "after": accuracy(group),
        }
        for task, group in by_task(after).items()
    }


def pick_samples(before: Sequence[Answered], after: Sequence[Answered]) -> list[BeforeAfter]:
    """每个任务的第一道题，均匀取 :data:`SAMPLES` 个任务；答错的照样列出。没考过“之前”的那一格空着。"""
    pairs = {}
    for old, new in zip(before or [None] * len(after), after):
        pairs.setdefault(new.item["task"], (old, new))
    chosen = list(pairs.values())
    step = max(len(chosen) / SAMPLES, 1.0)
    picked = [chosen[int(i * step)] for i in range(min(SAMPLES, len(chosen)))]
    return [
        BeforeAfter(
            task=new.item["task"],
            prompt=_question(new.item),
            reference=new.item.get("reference", new.item["answer"]),
            before=old.response if old else "",
            after=new.response,
            score=new.score,
        )
        for old, new in picked
    ]


def _question(item: dict) -> str:
    """题面：最后一个用户或工具回合的文字。"""
    turns = [turn for turn in item.get("messages", []) if turn["role"] in ("user", "tool")]
    return turns[-1]["content"] if turns else item["prompt"]


def read_answers(path: Path) -> list[str]:
    """:func:`write_answers` 写下的各行；没有这个文件是空的，断在半截的一行不要。"""
    lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    return [f"{line}\n" for line in lines if line.endswith("}")]


def write_answers(path: Path, exams: dict[str, Sequence[Answered]], before: Sequence[str] = ()) -> None:
    """全部题目与回答，一行一题，便于自己核对。

    Args:
        before: 上一次写下的各行；这一次没有考的几份卷子照旧。
    """
    kept = [line for line in before if json.loads(line)["exam"] not in exams]
    records = (
        {
            "exam": exam,
            "task": answered.item["task"],
            "question": _question(answered.item),
            "answer": answered.item["answer"],
            "response": answered.response,
            "score": answered.score,
        }
        for exam, results in exams.items()
        for answered in results
    )
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_text(path, "".join([*kept, *lines]))
