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
            _reject_repeats(list(batch.schema), "", path)
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


def _reject_repeats(fields: list[Any], place: str, path: Path) -> None:
    """同名的列、同名的结构成员：转成字典时会悄悄只留后一个（或抛异常），与 JSON 里写了两次的键一样不收。

    Args:
        fields: 同一层的各个 ``pyarrow.Field``。
        place: 这一层的字段路径，报错用。
    """
    names = [field.name for field in fields]
    for field in fields:
        if (times := names.count(field.name)) > 1:
            raise DataError(
                f"有 {times} 列都叫这个名字",
                field=f"{place}{field.name}",
                expected="每列的名字只出现一次",
                fix="只留一列，或给另一列改名",
                file=str(path),
            )
        kind = field.type
        inner = [kind.field(k) for k in range(kind.num_fields)]
        if inner and hasattr(kind, "value_type"):  # 列表：它的一项没有自己的名字
            inner = [inner[0].with_name(f"{field.name}[]")]
            _reject_repeats(inner, place, path)
        elif inner:
            _reject_repeats(inner, f"{place}{field.name}.", path)


def _json_value(value: Any) -> Any:
    """列式文件里，一列没有值的地方写着 null（pandas 写 NaN）：那就是没有这个字段。"""
    if type(value) is dict:
        return {k: _json_value(v) for k, v in value.items() if not _missing(v)}
    if type(value) is list:
        if value and all(type(item) is tuple and len(item) == 2 for item in value):  # map 类型
            pairs = {str(k): v for k, v in value}
            if len(pairs) != len(value):
                names = [str(k) for k, _ in value]
                raise DataError(
                    "map 类型的一个值里写了两次",
                    field=next(name for name in names if names.count(name) > 1),
                    expected="每个键只出现一次",
                    fix="只留一个，或给另一个改名",
                )
            return _json_value(pairs)
        return [None if _missing(v) else _json_value(v) for v in value]
    return value


def _missing(value: Any) -> bool:
    return value is None or (type(value) is float and math.isnan(value))


def _json_text(value: Any) -> Any:
    """JSON 没有的类型（时间、定点数、字节）写成文字；不是 UTF-8 的字节不是文字，写成对象，当作正文时由校验报错。"""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return {"不是 UTF-8 的字节": value[:16].hex(" ")}
    return str(value)
