"""agent 阶段的题目与考试：留出的差事，给不给工具都考同一份。"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bench_stages import Bench

from minimind.evaluate.errands import share_by_task, solved, walk_errands
from minimind.evaluate.microworld import accuracy, by_task, evaluate_items
from minimind.microworld import build_tasks
from minimind.microworld.core import HELDOUT
from minimind.microworld.stages import Corpus
from minimind.microworld.tasks.agent import FAMILIES, NoToolErrand
from minimind.report.logs import read_log


@dataclass
class Exam:
    """一次考试。

    Args:
        tasks: 各家族答对的比例；signs: 体征（``valid_calls``、``unfinished``……）。
        chat: 普通问答（``eval.jsonl`` 的简单题）答对的比例。
        samples: 每个家族头一道题的整段对话。
    """

    tasks: dict[str, float]
    signs: dict[str, float]
    chat: float
    samples: list[str]


def kinds() -> list[tuple[str, str]]:
    """``[(家族名, 中文名), …]``。"""
    return [(family.name, family.title) for family in (*FAMILIES, NoToolErrand)]


@cache
def corpus(bench: Bench) -> Corpus:
    """底座的微世界，同一种子与规模。"""
    meta = json.loads((bench.world / "meta.json").read_text("utf-8"))
    return Corpus(build_tasks(meta["seed"]), meta["scale"], meta["seed"])


@cache
def heldout(bench: Bench) -> list[dict[str, Any]]:
    """留出的题，问句各不相同。"""
    rows = corpus(bench).agent(HELDOUT)
    return list({row["conversations"][1]["content"]: row for row in rows}.values())


def one_turn(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """同样的题，不给工具：一问一答。"""
    keep = ("task", "grader", "answer", "reject")
    return [
        {
            "conversations": [row["conversations"][1], {"role": "assistant", "content": row["answer"]}],
            **{name: row[name] for name in keep if name in row},
        }
        for row in rows
    ]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def exam(bench: Bench, folder: Path, weight: str, args: Any) -> Exam:
    """贪心走一遍留出的题，再答普通问答。

    Args:
        args: train_agent 的参数，回合与长度的上限用它的。
    """
    loaded = bench.open(folder, weight, dtype="float32")
    results, signs = walk_errands(loaded.model, loaded.tokenizer, heldout(bench), args)
    easy = evaluate_items(loaded.model, loaded.tokenizer, bench.items("easy"), description="普通问答")
    samples = [f"{group[0].item['prompt']}\n{group[0].response}" for group in by_task(results).values()]
    return Exam(share_by_task(results), signs, accuracy(easy), samples)


def ask(bench: Bench, folder: Path, weight: str) -> float:
    """不给工具，一问一答：五种题答对的平均。"""
    loaded = bench.open(folder, weight, dtype="float32")
    items = [{**row, "messages": row["conversations"][:-1]} for row in one_turn(heldout(bench))]
    results = evaluate_items(loaded.model, loaded.tokenizer, items, max_new_tokens=48, description="不给工具")
    return solved(share_by_task(results))


def heldout_curve(log: Path, name: str, each: int) -> list[list[float]]:
    """训练日志 → ``[[采样了多少段, 途中留出的题答对的比例], …]``，六种题都在内；``each`` 是每步几段。"""
    return [[row["step"] * each, round(row[name], 4)] for row in read_log(log) if name in row]
