"""``data convert | mix | dedup`` 共同的开头：认出种类，逐条读，坏行照规矩办，说出每个文件读到了什么。"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minimind.arguments import Arguments, arg
from minimind.console import progress, say
from minimind.dataset.jsonl import DataError
from minimind.dataset.schema import KINDS, detect_kind, read_record
from minimind.dataset.sources import raw_lines
from minimind.dataset.spec import Part, parse_spec
from minimind.errors import UserError
from minimind.paths import resolve_path
from minimind.runtime.files import check_target

# 一行里可能有 NaN、无穷大（1e999 读出来也是）的记号，再细看
NOT_JSON = re.compile(rb"NaN|Infinity|[eE]\+?\d{3}|\d{300}")


@dataclass
class RowArguments(Arguments):
    """三个命令共同的参数"""

    data: str = arg(
        "", "数据：文件、文件夹或通配符，几个用逗号隔开，写法同 --data_path", metavar="数据", text="paths"
    )
    out: str = arg("", "写到哪个 .jsonl 文件", metavar="输出.jsonl", text="path")
    kind: str = arg("auto", "数据种类；auto 看开头的记录", ("auto", *KINDS))
    on_bad_line: str = arg("error", "遇到坏行：error 报错停下，skip 跳过并计数", ("error", "skip"))
    force: bool = arg(False, "覆盖已有的输出文件")


@dataclass
class Rows:
    """读一份数据的全过程：要读的各组、种类、输出的路径，与读的时候的统计。"""

    parts: list[Part]
    kind: str
    out: Path
    on_bad_line: str
    bad: int = 0
    first_bad: DataError | None = None
    notes: Counter[str] = field(default_factory=Counter)

    @classmethod
    def opened(cls, args: RowArguments, weighted: bool = False) -> Rows:
        """核对参数：输入在、输出能写且不是输入之一，各文件是同一种数据。

        Args:
            weighted: 认不认 ``文件:权重``；不认的写了就是错误。

        Raises:
            UserError: 有一样不合。
        """
        parts, out = parse_spec(args.data, "数据"), resolve_path(args.out)
        if not weighted and (given := [part for part in parts if part.weight is not None]):
            raise UserError(
                f"{given[0].name} 写着权重 {float(given[0].weight):g}，这条命令把每一条都写出来，用不到它",
                where="数据",
                expected="文件、文件夹或通配符，逗号分隔",
                fix="去掉权重；要按份额混合，用 minimind data mix",
            )
        if out.suffix.lower() != ".jsonl":
            raise UserError(
                f"输出文件叫 {out.name}",
                where="输出",
                expected="以 .jsonl 结尾的名字",
                fix=f"写成 {out.name.split('.')[0] or 'out'}.jsonl",
            )
        files = [file for part in parts for file in part.files]
        if out.resolve() in {file.resolve() for file in files}:
            raise UserError("输出就是输入之一，会毁掉它", where=str(out), fix="换一个输出文件名")
        check_target(out, args.force)
        kinds = {file: detect_kind(file) if args.kind == "auto" else args.kind for file in files}
        if len(set(kinds.values())) > 1:
            raise UserError(
                "各文件不是同一种数据："
                + "、".join(f"{file.name} 是 {kind}" for file, kind in kinds.items()),
                where="数据",
                expected="同一种（预训练、对话、偏好、强化学习不能混在一个文件里）",
                fix="分开做；本来就是同一种的，用 --kind 指明",
            )
        return cls(parts, kinds[files[0]], out, args.on_bad_line)

    def read(self, file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        """一个文件的各条 ``(行号, 改写并校验过的记录)``；读完说一行：认出了什么写法，多少条。

        Raises:
            DataError: 坏行（``on_bad_line`` 为 skip 时跳过并计数）。
        """
        count, bad, notes = 0, 0, Counter()
        with progress(f"读 {file.name}", None, "条") as bar:
            for line, raw in enumerate(raw_lines(file), 1):
                said: set[str] = set()
                try:
                    record = read_record(raw, self.kind, said.add)
                    if record is not None and NOT_JSON.search(raw):
                        check_numbers(record)
                except DataError as error:
                    error = error.at(file, line)
                    if self.on_bad_line == "error":
                        raise error from None
                    self.first_bad, bad = self.first_bad or error, bad + 1
                    continue
                if record is not None:
                    notes.update(said)
                    count += 1
                    bar.advance()
                    yield line, record
        said_notes = [f"{sentence} {times:,} 条" for sentence, times in notes.most_common()]
        words = [f"{count:,} 条 {self.kind} 数据", *said_notes, *([f"跳过坏行 {bad:,} 条"] if bad else [])]
        say(f"{file.name}：{'；'.join(words)}。")
        self.bad += bad

    def read_all(self) -> Iterator[tuple[Path, int, dict[str, Any]]]:
        """全部文件的各条 ``(文件, 行号, 记录)``，按写出的次序。

        Raises:
            UserError: 一条也没有。
        """
        empty = True
        for part in self.parts:
            for file in part.files:
                for line, record in self.read(file):
                    empty = False
                    yield file, line, record
        if empty:
            raise self.first_bad or UserError("没有一条记录", where="数据", fix="换一个文件")

    def say_bad(self) -> None:
        """跳过的坏行共多少，第一条是什么。"""
        if self.first_bad:
            say(f"共跳过 {self.bad:,} 条坏行，第一条：{self.first_bad}")


def check_numbers(record: dict[str, Any]) -> None:
    """训练用不到的字段也照抄到新文件里，所以也要是别的程序读得了的数。

    Raises:
        DataError: 某个字段里有 NaN 或无穷大。
    """
    for name, value in record.items():
        try:
            json.dumps(value, allow_nan=False)
        except ValueError:
            raise DataError(
                "有 NaN 或 Infinity，JSON 里没有这样的数，写出的文件别的程序读不了",
                field=name,
                expected="数、null 或字符串",
                fix="改成 null，或去掉这个字段",
            ) from None


def dump(record: dict[str, Any]) -> bytes:
    """一条记录的一行，含换行符。"""
    return json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n"
