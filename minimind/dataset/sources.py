"""数据文件的外壳：压缩的、列式的、整个文件是一个 JSON 数组的，都读成“一行一个 JSON 对象”。

==============  =========================================================
外壳             一行是
==============  =========================================================
``plain``        jsonl 的一行
``gzip`` ``zstd``  解压后的一行（里面是 JSON 数组时，是它的一项）
``json``         数组的一项（``[{…}, {…}]``，公开的 Alpaca、ShareGPT 多是这样发的）
``parquet``      一行（行组里的次序）
``arrow``        一行（IPC 的文件与流两种写法；Hugging Face ``save_to_disk`` 写的是流）
==============  =========================================================

外壳按内容认，不看后缀。行号一律从 1 起，报错里的 ``文件:行`` 说的是这里的行，不是解压出来的临时文件。
全部边读边解，内存里只有当前的一块；一行的上限与 jsonl 相同。
"""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from minimind.dataset import jsonl
from minimind.dataset.jsonl import DataError, check_head, line_ranges, parse_line, read_head, read_lines

# 文件夹里带这些后缀的当作数据（jsonl、json 后面还可以有 .gz、.zst）
TEXT_SUFFIXES = (".jsonl", ".json")
PACKED_SUFFIXES = (".gz", ".zst")
TABLE_SUFFIXES = (".parquet", ".arrow")
# Hugging Face 的数据集文件夹里与数据并排的说明
NOT_DATA = frozenset(("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"))

_MAGIC = (
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"PAR1", "parquet"),
    (b"ARROW1", "arrow"),
    (b"\xff\xff\xff\xff", "arrow"),  # IPC 流的续行标记
    *((bytes((k, 0x2A, 0x4D, 0x18)), "zstd") for k in range(0x50, 0x60)),  # 以可跳过的帧开头，pzstd 写的就是
)
_NAMES = {"gzip": "gzip 压缩文件", "zstd": "zstd 压缩文件"}
_ARRAY = re.compile(rb"\s*\[\s*(?:[{\]]|$)")
_BLOCK = 1 << 20


def is_data_name(name: str) -> bool:
    """文件夹里叫这个名字的是不是数据。"""
    name = name.lower()
    if name in NOT_DATA or name.startswith("."):
        return False
    for suffix in PACKED_SUFFIXES:
        if name.endswith(suffix):
            return name.removesuffix(suffix).endswith(TEXT_SUFFIXES)
    return name.endswith(TEXT_SUFFIXES + TABLE_SUFFIXES)


def is_data_file(path: Path) -> bool:
    """文件夹里的这个文件是不是数据：名字像；``.json`` 还要看内容，许多说明与设置也叫这个后缀。"""
    if not (path.is_file() and is_data_name(path.name)):
        return False
    if not path.name.lower().endswith(".json"):
        return True
    with path.open("rb") as file:
        first = file.readline(jsonl.MAX_LINE_BYTES)
        if _ARRAY.match((first + file.read(4096)).removeprefix(jsonl.BOM)):
            return True
    try:
        return parse_line(first) is not None
    except DataError:
        return False


def shell_of(path: Path) -> str:
    """文件是哪种外壳，见模块说明；顺带检查它存在、非空、像是数据。

    Raises:
        UserError: 读不了、是空的，或是别的二进制文件（说出是什么、怎么办）。
    """
    head = read_head(path, 4096)
    for magic, shell in _MAGIC:
        if head.startswith(magic):
            return shell
    if _ARRAY.match(head.removeprefix(jsonl.BOM)):
        return "json"
    check_head(head[:64], path)
    return "plain"


def raw_lines(path: Path) -> Iterator[bytes]:
    """任一种外壳，逐行给出字节（不含换行符）；第 n 个就是第 n 行。

    Raises:
        UserError: 读不了；缺少读它的库（附安装的命令）。
        DataError: 压缩文件坏了或没有下载完、列式文件读不出、一行太长；说出到了第几行。
    """
    shell = shell_of(path)
    if shell == "plain":
        for start, end in line_ranges(path, 4 << 20):
            yield from read_lines(path, start, end)
        return
    line = 0
    if shell in ("parquet", "arrow"):
        from minimind.dataset.tables import table_lines  # 别的文件用不着

        source = table_lines(path, shell)
    else:
        source = _stream_lines(path, shell)
    try:
        for raw in source:
            line += 1
            yield raw
    except DataError as error:
        raise error if error.file else error.at(path, line + 1) from error.__cause__


def read_records(
    path: Path, bad: list[DataError] | None = None
) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """逐行给出 ``(行号, 记录)``，行号从 1 起；不核对字段，空行的记录是 None。

    Args:
        bad: 给了就把坏行的错误追加到这里，记录也是 None；不给则抛出。

    Raises:
        UserError: 文件读不了、是空的。
        DataError: 坏行（含文件与行号）。
    """
    for line, raw in enumerate(raw_lines(path), 1):
        try:
            record = parse_line(raw)
        except DataError as error:
            if bad is None:
                raise error.at(path, line) from None
            bad.append(error.at(path, line))
            record = None
        yield line, record


def write_plain(path: Path, target: Path) -> None:
    """把 ``path`` 解成 jsonl 写进 ``target``：第 n 行还是第 n 行，内容不改。"""
    with target.open("wb") as file:
        for raw in raw_lines(path):
            file.write(raw)
            file.write(b"\n")


# ---- 压缩与 JSON 数组 ----


def _stream_lines(path: Path, shell: str) -> Iterator[bytes]:
    """解压后的各行，或数组的各项。"""
    with path.open("rb") as file, _decoded(file, shell) as stream:
        try:
            head = stream.peek(4096)[:4096]
            if shell != "json":
                check_head(head[:64], path)
            if _ARRAY.match(head.removeprefix(jsonl.BOM)):
                from minimind.dataset.json_array import array_items

                yield from array_items(stream)
                return
            while raw := stream.readline(jsonl.MAX_LINE_BYTES):
                if len(raw) == jsonl.MAX_LINE_BYTES and not raw.endswith(b"\n"):
                    raise jsonl.too_long()
                yield raw.removesuffix(b"\n")
        except (EOFError, OSError, zlib.error, _ZstdFault) as error:
            raise DataError(
                f"{_NAMES.get(shell, '文件')}坏了，或没有下载完（{error}）",
                expected="完整的文件",
                fix="重新下载或重新压缩；用 gzip -t 或 zstd -t 核对",
            ) from error


@contextmanager
def _decoded(file: BinaryIO, shell: str) -> Iterator[io.BufferedReader]:
    """解压的流；能 ``peek`` 与 ``readline``。"""
    if shell == "gzip":
        raw: Any = gzip.GzipFile(fileobj=file)
    elif shell == "zstd":
        raw = _ZstdReader(file)
    else:
        raw = file.raw  # type: ignore[attr-defined]
    yield io.BufferedReader(raw, _BLOCK)


class _ZstdFault(Exception):
    """zstd 报的错，统一成一种。"""


class _ZstdReader(io.RawIOBase):
    """zstd 的解压流：几帧相接的也读完，末尾截断的报错（库里的读流遇到截断只当作结束）。"""

    def __init__(self, file: BinaryIO):
        self.file, self.make, self.fault = file, *_zstd()
        self.decoder, self.fresh, self.ready = self.make(), True, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.ready:
            data = b""
            if self.decoder.eof:
                data = self.decoder.unused_data
                self.decoder, self.fresh = self.make(), True
            data = data or self.file.read(_BLOCK >> 4)
            if not data:
                if self.fresh:
                    return 0
                raise EOFError("末尾不完整")
            try:
                self.ready, self.fresh = self.decoder.decompress(data), False
            except self.fault as error:
                raise _ZstdFault(str(error)) from error
        size = min(len(buffer), len(self.ready))
        buffer[:size], self.ready = self.ready[:size], self.ready[size:]
        return size


def _zstd() -> tuple[Any, type[Exception]]:
    """``(造解压器, 它的错误)``：Python 3.14 起在标准库里，此前用 zstandard。"""
    try:
        from compression import zstd  # type: ignore[import-not-found]

        return zstd.ZstdDecompressor, zstd.ZstdError
    except ImportError:
        from minimind.dataset.tables import need

        zstandard = need("zstandard", "zstd 压缩文件")
        return zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError
