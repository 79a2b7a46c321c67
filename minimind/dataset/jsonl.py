"""逐行读 jsonl：按字节切块、跳过空行，坏行变成一句说清文件、行号、字段与修法的话。"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minimind.errors import UserError
from minimind.paths import file_problem

BOM = b"\xef\xbb\xbf"
# 一行超过 64 MiB 的几乎总是“整个文件写成一个 JSON 数组”，继续读只会耗尽内存
MAX_LINE_BYTES = 64 << 20

# 一看就是一条记录的字段
RECORDS = frozenset(("conversations", "messages", "chosen", "instruction"))
# 一条记录里总有一个的；都没有、字段又不超过 ``WRAPPER_FIELDS`` 个的，可能是把各条记录装在一起的外壳
RECORD_FIELDS = RECORDS | {"text", "rejected", "prompt", "completion", "question"}
WRAPPER_FIELDS = 4
# 说的是谁的话：有它的是对话里的一个回合
SPEAKERS = frozenset(("role", "from", "speaker", "author", "name", "user"))

# 文件开头的魔数 → (是什么, 怎么修)
_FOREIGN = [
    (b"\xff\xfe", "UTF-16 编码的文本", "iconv -f UTF-16 -t UTF-8 原文件 > 新文件.jsonl"),
    (b"\xfe\xff", "UTF-16 编码的文本", "iconv -f UTF-16 -t UTF-8 原文件 > 新文件.jsonl"),
    (b"\x1f\x8b", "gzip 压缩文件", "gunzip 原文件"),
    (b"PK\x03\x04", "zip 压缩文件", "unzip 原文件"),
    (b"BZh", "bzip2 压缩文件", "bunzip2 原文件"),
    (b"\xfd7zXZ\x00", "xz 压缩文件", "xz -d 原文件"),
    (b"7z\xbc\xaf\x27\x1c", "7z 压缩文件", "7z x 原文件"),
    (b"\x28\xb5\x2f\xfd", "zstd 压缩文件", "zstd -d 原文件"),
    (
        b"PAR1",
        "parquet 文件",
        "用 pandas.read_parquet(…).to_json(…, orient='records', lines=True) 转成 jsonl",
    ),
    (
        b"version https://git-lfs",
        "Git LFS 指针，不是数据本身",
        "git lfs pull，或用 minimind data download 下载",
    ),
]

# json 模块的英文消息 → 中文；没有列出的原样附上
_JSON_MESSAGES = {
    "Extra data": "一行里第一个 JSON 对象之后还有多余内容",
    "Expecting value": "此处应当是一个值",
    "Expecting property name enclosed in double quotes": "此处应当是双引号括起的字段名",
    "Expecting ',' delimiter": "此处缺少逗号，或字符串里的双引号没有转义",
    "Expecting ':' delimiter": "此处缺少冒号",
    "Unterminated string starting at": "字符串没有结束",
    "Invalid control character at": "字符串里有没转义的控制字符（如制表符）",
    "Invalid \\escape": "非法的反斜杠转义",
    "Invalid \\uXXXX escape": "非法的 \\uXXXX 转义",
    "Illegal trailing comma before end of object": "对象末尾多了一个逗号",
    "Illegal trailing comma before end of array": "数组末尾多了一个逗号",
}


class DataError(UserError):
    """一条数据不合要求。

    Args:
        found: 实际看到了什么（短）。
        field: 字段路径，例如 ``conversations[2].role``；整行的问题为 None。
        expected: 期望什么。
        fix: 怎么修。
        file: 文件路径；校验函数不知道文件，由读文件的一方用 :meth:`at` 补上。
        line: 行号，从 1 起。
    """

    def __init__(
        self,
        found: str,
        *,
        field: str | None = None,
        expected: str | None = None,
        fix: str | None = None,
        file: str | None = None,
        line: int | None = None,
    ):
        self.found, self.field, self.file, self.line = found, field, file, line
        where = f"{file}:{line}" if line else (file or "")
        if field:
            where = f"{where} 字段 {field}".strip()
        super().__init__(found, where=where or None, expected=expected, fix=fix)

    def at(self, file: str | Path, line: int) -> DataError:
        """同一个错误，补上文件与行号。"""
        return DataError.from_dict({**self.to_dict(), "file": str(file), "line": line})

    def to_dict(self) -> dict[str, Any]:
        """可写进 JSON、可跨进程传的形式。"""
        names = ("found", "field", "expected", "fix", "file", "line")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DataError:
        data = dict(data)
        return cls(data.pop("found"), **data)

    def __reduce__(self):
        return DataError.from_dict, (self.to_dict(),)


def short(value: Any, limit: int = 40) -> str:
    """报错里用的短写法，过长的中间省略。"""
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    text = repr(text) if isinstance(value, str) else text
    # 孤立代理符等打印不出来的字符换成转义，免得报错本身再报错
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= limit else text[: limit - 10] + "…" + text[-9:]


def parse_line(raw: bytes) -> dict[str, Any] | None:
    """一行字节 → 字典；空行返回 None。

    容忍行首的 BOM 与行尾的 CR：Windows 编辑器和 ``cat a b > c`` 会带来它们，而意思没有歧义。

    Raises:
        DataError: 不是 UTF-8、不是 JSON、不是对象、有重复的键、含孤立代理符。
    """
    if raw.startswith(BOM):
        raw = raw[3:]
    raw = raw.strip(b" \t\r\n")
    if not raw:
        return None
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"第 {error.start + 1} 个字节 0x{raw[error.start]:02x} 不是合法的 UTF-8",
            expected="UTF-8 编码",
            fix="若文件是 GBK 编码，先转码：iconv -f GBK -t UTF-8 原文件 > 新文件；只坏几行时可用 --on_bad_line skip",
        ) from None
    try:
        record = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise json_error(text, error) from None
    except RecursionError:
        raise DataError("JSON 嵌套过深", expected="普通的 JSON 对象", fix="删掉这一行") from None
    except ValueError as error:  # 例如上万位的整数
        raise DataError(f"JSON 读不出来（{error}）", expected="普通的 JSON 对象", fix="删掉这一行") from None
    if type(record) is not dict:
        raise DataError(
            f"这一行是 {short(record)}",
            expected="每行一个 JSON 对象 {…}",
            fix="若整个文件是一个 JSON 数组，先拆成一行一个对象：jq -c '.[]' 原文件 > 新文件.jsonl"
            if type(record) is list
            else "改成 JSON 对象，或删掉这一行",
        )
    if len(record) <= WRAPPER_FIELDS and RECORD_FIELDS.isdisjoint(record):
        _reject_wrapper(record)
    # 转义写成的孤立代理符（\ud83d 而没有后半）编不成 UTF-8，分词器遇到会报一句看不懂的错
    if "\\ud" in text or "\\uD" in text:
        _reject_surrogates(record, "")
    return record


def _reject_wrapper(record: dict[str, Any]) -> None:
    """``{"version": 1, "data": [{…}, {…}]}``：各条记录都装在一个字段里，整行不是一条记录。里面的认得出是记录才算。"""
    for name, value in record.items():
        if type(value) is not list or not value:
            continue
        if not all(type(one) is dict and _is_record(one) for one in value):
            continue
        raise DataError(
            f"{len(value)} 条记录都在这一个对象的 {short(name)} 里",
            field=name,
            expected="每行一个 JSON 对象，就是一条记录",
            fix=f"拆成一行一个：jq -c {shlex.quote(f'.[{json.dumps(name, ensure_ascii=False)}][]')} 原文件 > 新文件.jsonl",
        )


def _is_record(inner: dict[str, Any]) -> bool:
    """像一条记录，不像对话里的一个回合。"""
    if not RECORDS.isdisjoint(inner):
        return True
    return type(inner.get("text")) is str and SPEAKERS.isdisjoint(inner)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """一个 JSON 对象；同一个键写了两次时，json 模块悄悄只留后一个，前一个的内容就没了。"""
    record = dict(pairs)
    if len(record) != len(pairs):
        names = [name for name, _ in pairs]
        name = next(name for k, name in enumerate(names) if name in names[:k])
        values = [short(value, 24) for key, value in pairs if key == name]
        raise DataError(
            f"同一个对象里写了 {len(values)} 次：{'、'.join(values)}",
            field=name,
            expected="每个键只出现一次",
            fix="只留一个，或给另一个改名",
        )
    return record


def json_error(text: str, error: json.JSONDecodeError) -> DataError:
    """``json`` 模块的报错 → 指出位置与修法的一句话。"""
    message = _JSON_MESSAGES.get(error.msg, error.msg)
    around = short(text[max(0, error.pos - 15) : error.pos + 15])
    fix = "改正这一处；用 json.dumps(记录, ensure_ascii=False) 写出的行总是合法的"
    if text[0] == "[":
        fix = "若整个文件是一个 JSON 数组，先拆成一行一个对象：jq -c '.[]' 原文件 > 新文件.jsonl"
    elif text == "{" or (text[0] == '"' and text.endswith(("{", "[", ","))):
        fix = (
            "若一个对象写成了多行，先压成一行一个：jq -c . 原文件 > 新文件.jsonl；"
            "若各条记录都在这个对象的一个字段（如 data）里：jq -c '.data[]' 原文件 > 新文件.jsonl"
        )
    elif error.pos >= len(text) - 1 or error.msg.startswith("Unterminated"):
        fix = "这一行像是被截断了；若是文件末尾，重新下载或重新生成文件"
    elif text.startswith("{'"):
        fix = "这是 Python 字典的写法，不是 JSON；用 json.dumps 重新写出"
    return DataError(
        f"不是合法的 JSON：第 {error.pos + 1} 个字符处 {around}，{message}",
        expected="每行一个完整的 JSON 对象 {…}",
        fix=fix,
    )


def _reject_surrogates(value: Any, path: str) -> None:
    """找出含孤立代理符的字段并报错。"""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"第 {error.start + 1} 个字符 \\u{ord(value[error.start]):04x} 是孤立的代理符",
                field=path,
                expected="合法的 Unicode 文本",
                fix="表情等字符要写成完整的一对 \\ud83d\\ude00，或直接写字符本身",
            ) from None
    elif isinstance(value, dict):
        for key, item in value.items():
            _reject_surrogates(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _reject_surrogates(item, f"{path}[{i}]")


def check_exists(path: Path) -> None:
    """文件在，也读得了；否则说清怎么办。"""
    if problem := file_problem(path):
        raise UserError(
            problem.replace("不存在", "找不到数据文件", 1),
            where=str(path),
            expected="一个 jsonl 文件",
            fix="检查路径；公开数据可用 minimind data download 下载，内置语料用 minimind data make-microworld 生成",
        )


def read_head(path: Path, size: int) -> bytes:
    """文件开头的至多 ``size`` 个字节；不在、读不了的说清怎么办。"""
    check_exists(path)
    try:
        with path.open("rb") as file:
            return file.read(size)
    except OSError as error:  # 挂载断了、坏道、/proc 里不让读的
        raise UserError(
            f"读不了（{error.strerror}）",
            where=str(path),
            expected="一个 jsonl 文件",
            fix="换一个文件，或检查磁盘",
        ) from error


def check_head(head: bytes, path: Path) -> None:
    """开头的几十个字节像是文本；不像就说出是什么（``path`` 只用来报错）。"""
    if not head:
        raise UserError(f"数据文件 {path} 是空的", expected="每行一个 JSON 对象", fix="重新下载或生成")
    for magic, name, fix in _FOREIGN:
        if head.startswith(magic):
            raise DataError(
                f"这是{name}", expected="UTF-8 编码的 jsonl 文本", fix=fix, file=str(path), line=1
            )
    if b"\0" in head:
        raise DataError(
            "这像是二进制文件（有 NUL 字节）",
            expected="UTF-8 编码的 jsonl 文本",
            fix="换一个文件",
            file=str(path),
            line=1,
        )


def too_long() -> DataError:
    """一行（或数组的一项）超过 ``MAX_LINE_BYTES``。"""
    return DataError(
        f"一行超过 {MAX_LINE_BYTES >> 20} MiB",
        expected="每行一个 JSON 对象",
        fix="把它拆开，或删掉这一行",
    )


def line_ranges(path: Path, chunk_bytes: int) -> Iterator[tuple[int, int]]:
    """把文件切成首尾落在行边界上的字节区间，每段约 ``chunk_bytes``。

    Raises:
        DataError: 有一行超过 ``MAX_LINE_BYTES``。
    """
    size = os.path.getsize(path)
    with path.open("rb") as file:
        start = 0
        while start < size:
            file.seek(min(start + chunk_bytes, size))
            tail = file.readline(MAX_LINE_BYTES)
            if len(tail) == MAX_LINE_BYTES and not tail.endswith(b"\n"):
                raise DataError(
                    f"一行超过 {MAX_LINE_BYTES >> 20} MiB",
                    expected="每行一个 JSON 对象",
                    fix="若整个文件是一个 JSON 数组，先拆成一行一个对象：jq -c '.[]' 原文件 > 新文件.jsonl",
                    file=str(path),
                    line=_count_lines(path, file.tell() - len(tail)) + 1,
                )
            end = file.tell()
            yield start, end
            start = end


def _count_lines(path: Path, end: int) -> int:
    """前 ``end`` 个字节里的换行数。"""
    count = 0
    with path.open("rb") as file:
        while end > 0 and (block := file.read(min(end, 1 << 20))):
            count += block.count(b"\n")
            end -= len(block)
    return count


def read_lines(path: Path, start: int, end: int) -> list[bytes]:
    """读 ``[start, end)``（由 :func:`line_ranges` 给出）里的各行，不含换行符。"""
    with path.open("rb") as file:
        file.seek(start)
        data = file.read(end - start)
    lines = data.split(b"\n")
    if not lines[-1]:
        lines.pop()
    return lines
