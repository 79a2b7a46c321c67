"""逐行读文件：容忍的写法、各种坏行、按字节切块不多不少。"""

from __future__ import annotations

import json
import pickle
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimind.dataset import jsonl
from minimind.dataset.jsonl import DataError, line_ranges, parse_line, read_lines
from minimind.dataset.sources import read_records, shell_of
from minimind.errors import UserError


@pytest.mark.parametrize(
    "raw",
    [b'{"text": "\xe6\x96\x87"}', b'\xef\xbb\xbf{"text": "\xe6\x96\x87"}', b'  {"text": "\\u6587"}\r'],
)
def test_容忍BOM与CRLF(raw):
    assert parse_line(raw) == {"text": "文"}


@pytest.mark.parametrize("raw", [b"", b"\r", b" \t ", b"\xef\xbb\xbf"])
def test_空行不是错误(raw):
    assert parse_line(raw) is None


@pytest.mark.parametrize(
    ("raw", "found", "fix"),
    [
        ("{“text”: “x”}".encode(), "JSON", "json.dumps"),
        (b'{"text": "\xb0\xa1"}', "第 11 个字节 0xb0", "iconv"),
        (b'{"text": "x"', "JSON", "截断"),
        (b'{"text": "x', "没有结束", "截断"),
        (b"{'text': 'x'}", "JSON", "Python 字典"),
        (b'{"text": "x"} {"text": "y"}', "多余内容", "json.dumps"),
        (b'{"text": "x"},', "多余内容", "截断"),
        (b'[{"text": "x"}]', "这一行是", "jq -c '.[]'"),
        (b"[", "JSON", "jq -c '.[]'"),
        (b"{", "JSON", "jq -c ."),
        (b'"x"', "这一行是", "对象"),
        (b'{"text": "a\tb"}', "控制字符", "json.dumps"),
        (b"\x00\x00", "JSON", "json.dumps"),
        (b"[" * 100_000, "嵌套", "删掉"),
        (b'{"a": ' + b"9" * 5000 + b"}", "读不出", "删掉"),
    ],
    ids=lambda v: repr(v)[:30],
)
def test_坏行说清哪里坏与怎么修(raw, found, fix):
    with pytest.raises(DataError) as caught:
        parse_line(raw)
    assert found in caught.value.found
    assert fix in caught.value.fix
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        (b'{"text": "a", "text": "b"}', "text"),
        (b'{"conversations": [{"role": "user", "content": "a", "content": "a"}]}', "content"),
        ('{"text": "a", "元": {"键": 1, "x": 2, "键": 3}}'.encode(), "键"),
    ],
)
def test_重复的键报错而不是悄悄只留后一个(raw, field):
    with pytest.raises(DataError) as caught:
        parse_line(raw)
    error = caught.value.at("a.jsonl", 7)
    assert error.field == field and str(error).startswith(f"a.jsonl:7 字段 {field}：同一个对象里写了 2 次")
    assert parse_line(b'{"a": {"x": 1}, "b": {"x": 1}}') == {"a": {"x": 1}, "b": {"x": 1}}


@pytest.mark.parametrize(
    ("name", "fix"), [("data", """jq -c '.["data"][]'"""), ("一 条", """jq -c '.["一 条"][]'""")]
)
def test_各条记录装在一个字段里时说怎么拆(name, fix):
    raw = json.dumps({name: [{"text": "甲"}, {"text": "乙"}]}, ensure_ascii=False).encode()
    with pytest.raises(DataError) as caught:
        parse_line(raw)
    assert caught.value.field == name and "2 条记录" in caught.value.found and fix in caught.value.fix
    with pytest.raises(DataError, match=r"\.data\[\]"):
        parse_line(b"{")  # 缩进着写的同一种文件，第一行只有一个括号


def test_外壳里还有别的字段也认得出():
    inner = [{"instruction": "甲", "output": "乙"}] * 3
    with pytest.raises(DataError, match="3 条记录") as caught:
        parse_line(json.dumps({"version": 1, "data": inner}).encode())
    assert caught.value.field == "data"


@pytest.mark.parametrize(
    "record",
    [
        {"turns": [{"role": "user", "content": "甲"}, {"role": "assistant", "content": "乙"}]},
        {"conversation": [{"speaker": "user", "text": "甲"}, {"speaker": "bot", "text": "乙"}]},
        {"dialog": [{"user": "甲", "assistant": "乙"}]},
        {"tools": [{"name": "search", "text": "说明"}]},
        {"prompt": "甲", "data": [{"text": "乙"}]},
        {"text": "甲", "parts": [{"text": "乙"}]},
    ],
)
def test_一条记录里的列表不当作外壳(record):
    assert parse_line(json.dumps(record).encode()) == record


@pytest.mark.skipif(not Path("/proc/self/mem").is_file(), reason="没有 /proc")
def test_开头就读不出的文件有一句话():
    with pytest.raises(UserError, match="/proc/self/mem"):
        list(read_records(Path("/proc/self/mem")))


def test_孤立代理符指到字段():
    line = json.dumps({"conversations": [{"role": "user", "content": "好\ud83d"}]}).encode()
    with pytest.raises(DataError) as caught:
        parse_line(line)
    assert caught.value.field == "conversations[0].content"
    str(caught.value).encode()  # 报错本身能打印
    assert parse_line(b'{"text": "\\ud83d\\ude00"}') == {"text": "😀"}


@given(st.lists(st.binary(max_size=30).map(lambda b: b.replace(b"\n", b"")), max_size=30), st.integers(1, 80))
def test_切块不多不少正好是全部的行(lines, chunk_bytes):
    data = b"\n".join(lines)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        path.write_bytes(data)
        ranges = list(line_ranges(path, chunk_bytes))
        read = [line for start, end in ranges for line in read_lines(path, start, end)]
    expected = data.split(b"\n")
    if not expected[-1]:
        expected.pop()
    assert read == expected
    assert [start for start, _ in ranges] == [0, *(end for _, end in ranges)][: len(ranges)]


def test_过长的行报行号而不是吃光内存(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "x"}\n' * 3 + b"[" + b"1," * 5000 + b"1]\n")
    with pytest.raises(DataError) as caught:
        list(line_ranges(path, 64))
    assert caught.value.line == 4
    assert "jq" in caught.value.fix


@pytest.mark.parametrize(
    ("head", "word"),
    [
        ("文".encode("utf-16"), "UTF-16"),
        (b"PK\x03\x04", "zip"),
        (b"version https://git-lfs.github.com/spec/v1", "LFS"),
    ],
)
def test_认出不是文本的文件(tmp_path, head, word):
    path = tmp_path / "a.jsonl"
    path.write_bytes(head + b"...")
    with pytest.raises(UserError, match=word):
        shell_of(path)


def test_文件不存在与空文件各有一句话(tmp_path):
    with pytest.raises(UserError, match="minimind data download"):
        shell_of(tmp_path / "没有.jsonl")
    (tmp_path / "空.jsonl").touch()
    with pytest.raises(UserError, match="是空的"):
        shell_of(tmp_path / "空.jsonl")
    with pytest.raises(UserError, match="文件夹"):
        shell_of(tmp_path)


def test_数据错误可以跨进程传递():
    error = DataError("坏", field="text", expected="好", fix="改", file="a", line=3)
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error)
    assert copy.to_dict() == error.to_dict()
