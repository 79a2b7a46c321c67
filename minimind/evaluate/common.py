"""各项评测共用：打开模型的参数、置信区间、表格、结果文件。"""

from __future__ import annotations

import datetime
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from minimind.arguments import arg
from minimind.console import format_duration, say
from minimind.errors import UserError
from minimind.inference.arguments import LoadArguments
from minimind.paths import file_problem, resolve_path
from minimind.ranges import MANY
from minimind.runtime.files import check_writable, write_text

T = TypeVar("T")
# 95 % 置信区间的正态分位数
Z95 = 1.959963984540054


@dataclass
class EvalArguments(LoadArguments, group="评测"):
    """打开哪个模型、考多少题、结果写到哪里。"""

    limit: int = arg(0, "至多考多少题，按种子随机抽；0 表示全部", low=0, high=MANY)
    seed: int = arg(42, "抽题的随机种子", low=0, high=2**63 - 1)
    out_dir: str = arg("out/eval", "结果文件的目录，每次评测写一个 {权重}_{项目}.json", text="path")

    def load(self, **changes: Any) -> Any:
        """先看结果写不写得了，再打开模型：考完几千道题才知道就晚了。"""
        check_writable(resolve_path(self.out_dir), "--out_dir")
        return super().load(**changes)


def data_file(
    path: str | None, usual: str, what: str, flag: str = "--data_path", folders: bool = False
) -> Path:
    """``--data_path``，没给就用 ``dataset/`` 下的惯用文件。

    Args:
        what: 期望的是什么文件。
        flag: 由哪个参数给出，报错时用。
        folders: 文件夹也可以。

    Raises:
        UserError: 都没有，或读不了；说出那里有什么。
    """
    found = resolve_path(path) if path else resolve_path("dataset") / usual
    problem = None if folders and found.is_dir() else file_problem(found)
    if problem:
        raise UserError(
            f"文件{problem}" if path else f"没有给 {flag}，也没有惯用的文件",
            where=str(found),
            expected=what,
            fix=f"用 {flag} 指定文件",
        )
    return found


def need_examples(args: Any) -> None:
    """``--shots`` 大于 0 就要有 ``--dev_path``。

    Raises:
        UserError: 没有。
    """
    if args.shots and args.dev_path is None:
        raise UserError(
            "需要示例而没有说从哪里取",
            where=f"--shots {args.shots}",
            fix="用 --dev_path 指定示例文件，例如 dataset/mc_dev.jsonl",
        )


def pick(items: Sequence[T], limit: int, seed: int) -> list[T]:
    """随机抽 ``limit`` 个，保持原来的次序；0 是全部。同一份数据、同一个种子抽到的总是同样的题。

    Raises:
        UserError: ``limit`` 是负数。
    """
    if limit < 0:
        raise UserError(f"--limit={limit} 不能是负数", fix="改成 0（全部）或正整数")
    if not limit or limit >= len(items):
        return list(items)
    return [items[i] for i in sorted(random.Random(seed).sample(range(len(items)), limit))]


@dataclass(frozen=True)
class Rate:
    """答对的比例与它的 95 % 置信区间。

    区间用 Wilson 法（Wilson 1927）：题少、比例接近 0 或 1 时也不会超出 [0, 1]，正态近似会。
    """

    correct: int
    total: int

    @property
    def value(self) -> float:
        return self.correct / self.total if self.total else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        if not self.total:
            return 0.0, 1.0
        n, p = self.total, self.value
        center = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
        half = Z95 / (1 + Z95**2 / n) * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
        return max(0.0, center - half), min(1.0, center + half)

    def show(self) -> str:
        low, high = self.interval
        return f"{self.value:.1%} [{low * 100:.1f}, {high * 100:.1f}]" if self.total else "—"

    def to_dict(self) -> dict[str, Any]:
        low, high = self.interval
        return {
            "accuracy": self.value,
            "ci95": [low, high],
            "correct": self.correct,
            "total": self.total,
        }


def rate(hits: Sequence[bool]) -> Rate:
    """一串对错的比例。"""
    return Rate(sum(map(bool, hits)), len(hits))


class Stopwatch:
    """计时，最后报告每秒多少题。"""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """结果表，走 stdout。"""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # 宽度由内容定，不按终端折行：重定向到文件时也整齐
    console = Console(width=200, highlight=False)
    console.print(title, markup=False)
    console.print(table)


def save_result(
    args: EvalArguments, task: str, loaded: Any, clock: Stopwatch, result: dict[str, Any]
) -> Path:
    """写 ``{out_dir}/{权重}_{项目}.json``；参数、数据与日期都在里面，好让别人照着再跑一遍。"""
    from minimind.model import count_parameters

    folder = resolve_path(args.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{loaded.source.name.removesuffix('.pth')}_{task}.json"
    content = {
        "task": task,
        "model": loaded.source.name,
        "parameters": count_parameters(loaded.model),
        "arguments": {name: value for name, value in asdict(args).items() if not name.endswith("_dir")},
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "seconds": round(clock.seconds, 2),
        **result,
    }
    write_text(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    say(f"用时 {format_duration(clock.seconds)}，结果写进 {path}")
    return path
