"""``minimind data mix``：按权重把几份数据配成一个打乱了的 jsonl，每一轮精确到条，能从中断处接着写。

每轮各组多少条、取哪些，与训练时的 ``--data_path a:0.7,b:0.3`` 同一套算法（:mod:`minimind.dataset.mixture`）；这里还能写几轮
（``--epochs``），同一组里的各条轮流用到。写的时候是 ``输出.part``，旁边记着由哪些内容、什么设置写成；
被中断后用同样的命令再来一次，从写好的最后一行接着写，结果与没有中断过逐字节相同。
"""

from __future__ import annotations

import json
import os
from array import array
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from minimind.arguments import arg, parse_args
from minimind.console import progress, say
from minimind.dataset.cache import hash_file
from minimind.dataset.mixture import draw, exact_counts, share_words
from minimind.dataset.rows import RowArguments, Rows, dump
from minimind.dataset.schema import read_record
from minimind.dataset.sources import shell_of, write_plain
from minimind.errors import UserError
from minimind.ranges import MANY
from minimind.runtime.files import file_lock, temporary_folder, write_text

# 每写这么多行落一次盘：被杀时至多重写这么多
FLUSH_ROWS = 10_000


@dataclass
class MixArguments(RowArguments):
    """按权重把几份数据配成一个打乱的 jsonl，精确到条，能断点续写"""

    rows: int | None = arg(None, "一轮多少条；不给则是各组条数之和", low=1, high=MANY)
    epochs: int = arg(1, "连着写几轮；同一组里的各条轮流用到", low=1, high=MANY)
    seed: int = arg(42, "随机种子：取哪些、次序", low=0, high=2**63 - 1)


@dataclass
class MixPart:
    """一组文件里的好行：``where[i]`` 是第 i 条的 ``(第几个文件, 字节位置)``。"""

    name: str
    files: array
    positions: array

    def __len__(self) -> int:
        return len(self.files)


def main_mix(argv: list[str] | None = None) -> int:
    """写出配好的 jsonl，说出每轮各组多少条。"""
    args = parse_args(MixArguments, argv, prog="minimind data mix")
    rows = Rows.opened(args, weighted=True)
    with file_lock(
        rows.out.with_name(f".{rows.out.name}.lock"), lambda: say("另一个进程正在写同一个输出，等它写完")
    ):
        return _mix(args, rows)


def _mix(args: MixArguments, rows: Rows) -> int:
    with ExitStack() as stack:
        texts = _texts(rows, stack)
        groups = _scan(rows, texts)
        sizes = [len(group) for group in groups]
        total = args.rows or sum(sizes)
        weights = [part.weight for part in rows.parts]
        counts = exact_counts(weights, total) if weights[0] is not None else _plain_counts(sizes, args)
        for group, count in zip(groups, counts, strict=True):
            if not count:
                raise UserError(
                    f"一轮 {total:,} 条里分不到一条", where=group.name, fix="调大它的权重或 --rows"
                )
        words = share_words([(g.name, len(g), c) for g, c in zip(groups, counts, strict=True)])
        identity = {
            "files": [hash_file(file) for part in rows.parts for file in part.files],
            "groups": [len(part.files) for part in rows.parts],
            "weights": [str(weight) for weight in weights],
            "options": [total, args.epochs, args.seed, rows.kind, rows.on_bad_line],
        }
        part = _part_file(rows.out, identity)
        done = _complete_rows(part)
        if done:
            say(f"接着上次的写：{part} 里已有 {done:,} 条。")
        handles = [stack.enter_context(text.open("rb")) for text in texts]
        with part.open("r+b" if part.exists() else "wb") as file:
            file.seek(0, os.SEEK_END)
            _write(file, args, rows, groups, counts, handles, done)
            file.flush()
            os.fsync(file.fileno())
    os.replace(part, rows.out)
    _note_file(part).unlink()
    rows.say_bad()
    say(f"{words}。写出 {args.epochs} 轮共 {total * args.epochs:,} 条 → {rows.out}")
    return 0


def _plain_counts(sizes: list[int], args: MixArguments) -> list[int]:
    """没有写权重：各组有多少用多少；给了 ``--rows`` 就按条数的比例取。"""
    from fractions import Fraction

    return exact_counts([Fraction(n, sum(sizes)) for n in sizes], args.rows) if args.rows else sizes


def _texts(rows: Rows, stack: ExitStack) -> list[Path]:
    """各文件的 jsonl 文本：压缩与列式的解进输出旁边的临时目录，完了就删。"""
    texts = []
    for k, file in enumerate(file for part in rows.parts for file in part.files):
        if shell_of(file) != "plain":
            folder = stack.enter_context(temporary_folder(rows.out.with_name(f"{rows.out.name}.text{k}")))
            write_plain(file, folder / "text.jsonl")
            file = folder / "text.jsonl"
        texts.append(file)
    return texts


def _scan(rows: Rows, texts: list[Path]) -> list[MixPart]:
    """读一遍全部文件：校验每一行，记下好行的位置。"""
    groups, k = [], 0
    for part in rows.parts:
        group = MixPart(part.name, array("i"), array("q"))
        for file in part.files:
            starts = _line_starts(texts[k])
            for line, _ in rows.read(file):
                group.files.append(k)
                group.positions.append(int(starts[line - 1]))
            k += 1
        if not len(group):
            raise rows.first_bad or UserError(
                "没有一条可用的记录", where=part.name, fix="去掉它，或换一个文件"
            )
        groups.append(group)
    return groups


def _line_starts(text: Path) -> np.ndarray:
    """每一行的字节位置。"""
    starts, at = array("q", [0]), 0
    with text.open("rb") as file:
        while block := file.read(4 << 20):
            ends = np.flatnonzero(np.frombuffer(block, np.uint8) == 10) + at + 1
            starts.frombytes(ends.astype(np.int64).tobytes())
            at += len(block)
    return np.frombuffer(starts, np.int64)


def _order(groups: list[MixPart], counts: list[int], seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """第 ``epoch`` 轮的 ``(第几组, 组里第几条)``，已打乱。"""
    drawn = [draw(len(g), n, seed, k, epoch) for k, (g, n) in enumerate(zip(groups, counts, strict=True))]
    owners = np.repeat(np.arange(len(groups)), counts)
    order = np.random.default_rng([seed, len(groups), epoch]).permutation(len(owners))
    return owners[order], np.concatenate(drawn)[order]


def _write(
    file: BinaryIO,
    args: MixArguments,
    rows: Rows,
    groups: list[MixPart],
    counts: list[int],
    handles: list[Any],
    done: int,
) -> None:
    """从第 ``done`` 条起写完各轮。"""
    size = sum(counts)
    with progress(f"写 {rows.out.name}", size * args.epochs, "条") as bar:
        bar.advance(done)
        for epoch in range(done // size, args.epochs):
            owners, indices = _order(groups, counts, args.seed, epoch)
            for i in range(max(done - epoch * size, 0), size):
                group, index = groups[owners[i]], indices[i]
                source = handles[group.files[index]]
                source.seek(group.positions[index])
                file.write(dump(read_record(source.readline(), rows.kind)))  # type: ignore[arg-type]
                if i % FLUSH_ROWS == 0:
                    file.flush()
                bar.advance()


# ---- 中断之后接着写 ----


def _note_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _part_file(out: Path, identity: dict[str, Any]) -> Path:
    """写到一半的文件；由别的内容或设置写成的不要，从头来。"""
    part = out.with_name(f"{out.name}.part")
    note = _note_file(part)
    if part.exists() and (not note.exists() or json.loads(note.read_text("utf-8")) != identity):
        say(f"{part} 由别的内容或设置写成，从头写。")
        part.unlink()
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(note, json.dumps(identity))
    return part


def _complete_rows(part: Path) -> int:
    """已写好多少整行；末尾写到一半的一行去掉。"""
    if not part.exists():
        return 0
    starts = _line_starts(part)
    os.truncate(part, int(starts[-1]))
    return len(starts) - 1
