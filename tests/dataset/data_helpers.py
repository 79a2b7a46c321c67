"""数据测试里反复用到的小构造。"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest


def chat(*contents: str, system: str | None = None) -> dict:
    """交替的 user / assistant 对话。"""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    if system is not None:
        turns.insert(0, {"role": "system", "content": system})
    return {"conversations": turns}


def lines_of(records: list[dict]) -> bytes:
    """一行一个 JSON。"""
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


SHELLS = ("jsonl", "json", "jsonl.gz", "json.gz", "jsonl.zst", "parquet", "arrow", "stream.arrow")


def write_shell(path: Path, records: list[dict]) -> Path:
    """按后缀把同样的记录写成各种外壳；缺少写它的库时跳过这个测试。"""
    name = path.name
    if name.endswith((".parquet", ".arrow")):
        pyarrow = pytest.importorskip("pyarrow")
        table = pyarrow.Table.from_pylist(records)
        if name.endswith(".parquet"):
            import pyarrow.parquet

            pyarrow.parquet.write_table(table, path, row_group_size=7)
            return path
        make = pyarrow.ipc.new_stream if name.endswith(".stream.arrow") else pyarrow.ipc.new_file
        with pyarrow.OSFile(str(path), "wb") as file, make(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
        return path
    array = json.dumps(records, ensure_ascii=False, indent=1).encode()
    data = array if ".json" in path.suffixes else lines_of(records)
    if name.endswith(".gz"):
        data = gzip.compress(data)
    elif name.endswith(".zst"):
        data = pytest.importorskip("zstandard").compress(data)
    path.write_bytes(data)
    return path
