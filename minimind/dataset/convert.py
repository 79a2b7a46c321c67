"""``minimind data convert``：任何读得懂的写法 → 这里的 jsonl，一条不少，逐条校验过。"""

from __future__ import annotations

from dataclasses import dataclass

from minimind.arguments import parse_args
from minimind.console import say
from minimind.dataset.rows import RowArguments, Rows, dump
from minimind.runtime.files import atomic_write


@dataclass
class ConvertArguments(RowArguments):
    """把 Alpaca、ShareGPT、OpenAI messages，压缩、Parquet、Arrow、JSON 数组等文件写成本项目的 jsonl"""


def main_convert(argv: list[str] | None = None) -> int:
    """写出改写并校验过的 jsonl；出错时什么也不留下。"""
    args = parse_args(ConvertArguments, argv, prog="minimind data convert")
    rows, count = Rows.opened(args), 0

    def write(file) -> None:
        nonlocal count
        for _, _, record in rows.read_all():
            file.write(dump(record))
            count += 1

    atomic_write(rows.out, write)
    rows.say_bad()
    say(f"写出 {count:,} 条 → {rows.out}")
    return 0
