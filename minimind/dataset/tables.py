"""Parquet 与 Arrow：一行写成一个 JSON 对象。"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minimind.dataset.jsonl import DataError
from minimind.distribution import install_command
from minimind.errors import UserError

NAMES = {"parquet": "parquet 文件", "arrow": "Arrow 文件"}
BLOCK = 1 << 20
_TABLE_ROWS = 256


def need(module: str, what: str) -> Any:
    """导入一个可选的库。

    Raises:
        UserError: 没有装；附安装的命令。
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.split(".")[0]
        raise UserError(
            f"没有装 {name}（{error}），{what}要用它", fix=f"{install_command('data')}，或 pip install {name}"
        ) from error


def table_lines(path: Path, shell: str) -> Iterator[bytes]:
    """列式文件的各行，写成 JSON。"""
    pyarrow = need("pyarrow", f"读 {NAMES[shell]}")
    try:
        for batch in _parquet(path) if shell == "parquet" else _arrow(pyarrow, path):
            for at in range(0, batch.num_rows, _TABLE_ROWS):
                for row in batch.slice(at, _TABLE_ROWS).to_pylist():
                    yield json.dumps(_json_value(row), ensure_ascii=False, default=_json_text).encode()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{NAMES[shell]}读不出来（{str(error).splitlines()[0] if str(error) else type(error).__name__}）",
            expected="完整的文件",
            fix="重新下载或重新写出",
        ) from error


def _parquet(path: Path) -> Iterator[Any]:
    parquet = need("pyarrow.parquet", "读 parquet 文件")
    # 不预读整个行组，逐页地取：有的文件只有一个几 GB 的行组
    with parquet.ParquetFile(path, pre_buffer=False, buffer_size=BLOCK) as file:
        yield from file.iter_batches(batch_size=_TABLE_ROWS)


def _arrow(pyarrow: Any, path: Path) -> Iterator[Any]:
    with pyarrow.memory_map(str(path)) as source:
        head = source.read(6)
        source.seek(0)
        if head == b"ARROW1":
            with pyarrow.ipc.open_file(source) as reader:
                for k in range(reader.num_record_batches):
                    yield reader.get_batch(k)
        else:
            with pyarrow.ipc.open_stream(source) as reader:
                yield from reader


def _json_value(value: Any) -> Any:
    """列式文件里，一列没有值的地方写着 null（pandas 写 NaN）：那就是没有这个字段。"""
    if type(value) is dict:
        return {k: _json_value(v) for k, v in value.items() if not _missing(v)}
    if type(value) is list:
        if value and all(type(item) is tuple and len(item) == 2 for item in value):  # map 类型
            return _json_value({str(k): v for k, v in value})
        return [None if _missing(v) else _json_value(v) for v in value]
    return value


def _missing(value: Any) -> bool:
    return value is None or (type(value) is float and math.isnan(value))


def _json_text(value: Any) -> str:
    """JSON 没有的类型（时间、定点数、字节）写成文字。"""
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return str(value)
