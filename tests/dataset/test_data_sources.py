"""外壳：压缩的、列式的、JSON 数组的文件，读出的每一行、行号与报错都与 jsonl 一样。"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sys

import numpy as np
import pytest
from data_helpers import SHELLS, chat, lines_of, write_shell
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.dataset import PretrainDataset, RLAIFDataset, SFTDataset, json_array, jsonl
from minimind.dataset.cache import build_cache, cache_root
from minimind.dataset.jsonl import DataError, parse_line
from minimind.dataset.schema import detect_kind, read_record
from minimind.dataset.sources import is_data_file, raw_lines, read_records, shell_of
from minimind.errors import UserError

TEXTS = [{"text": f'第{i}篇，表情😀与引号"、反斜杠\\、换行\n都在。'} for i in range(20)]


@pytest.mark.parametrize("shell", SHELLS)
def test_各种外壳读出同样的记录与行号(shell, tmp_path):
    path = write_shell(tmp_path / f"a.{shell}", TEXTS)
    assert list(read_records(path)) == list(enumerate(TEXTS, 1))
    assert detect_kind(path) == "pretrain"


@pytest.mark.parametrize("shell", SHELLS)
def test_各种外壳分出同样的词(shell, tmp_path, tokenizer):
    plain = build_cache(write_shell(tmp_path / "plain.jsonl", TEXTS), "pretrain", tokenizer)
    other = build_cache(write_shell(tmp_path / f"a.{shell}", TEXTS), "pretrain", tokenizer)
    for name in ("ids", "offsets", "split_hash", "lines"):
        assert np.array_equal(getattr(plain, name), getattr(other, name)), name
    assert other.origin(3) == (tmp_path / f"a.{shell}", 4)
    assert other.record(3) == TEXTS[3]
    # 预训练用不着原文：除了缓存，解出来的文本什么也不留
    assert not list(cache_root().rglob("text.jsonl"))


@pytest.mark.parametrize("shell", SHELLS)
def test_强化学习从解出的文本取原始记录(shell, tmp_path, tokenizer):
    records = [{**chat(f"第{i}问", f"第{i}答"), "level": i} for i in range(9)]
    dataset = RLAIFDataset(write_shell(tmp_path / f"a.{shell}", records), tokenizer, 128)
    for i in range(9):
        item = dataset[i]
        assert (item["reference"], item["line"], item["record"]["level"]) == (f"第{i}答", i + 1, i)
        assert item["source"] == str(tmp_path / f"a.{shell}")


@pytest.mark.parametrize("shell", SHELLS)
def test_坏行说出原来的文件与行号_什么也不留下(shell, tmp_path, tokenizer):
    path = write_shell(tmp_path / f"a.{shell}", [*TEXTS[:5], {"text": " "}, *TEXTS[:2]])
    with pytest.raises(DataError) as caught:
        PretrainDataset(path, tokenizer, 64)
    assert (caught.value.file, caught.value.line, caught.value.field) == (str(path), 6, "text")
    assert not cache_root().exists()
    cache = build_cache(path, "pretrain", tokenizer, on_bad_line="skip")
    assert cache.lines.tolist() == [1, 2, 3, 4, 5, 7, 8]
    assert [(error["file"], error["line"]) for error in cache.meta["bad"]] == [(str(path), 6)]


def test_列式文件里的空值就是没有这个字段(tmp_path):
    pytest.importorskip("pyarrow")
    turns = [
        {"role": "user", "content": "问", "tool_calls": None},
        {"role": "assistant", "content": "答", "tool_calls": None},
    ]
    path = write_shell(tmp_path / "a.parquet", [{"messages": turns, "text": None, "score": float("nan")}])
    assert [read_record(raw, "sft") for raw in raw_lines(path)] == [chat("问", "答")]


def test_外壳按内容认_不看后缀(tmp_path):
    path = tmp_path / "其实压缩过.jsonl"
    path.write_bytes(gzip.compress(lines_of(TEXTS)))
    assert shell_of(path) == "gzip" and [r for _, r in read_records(path)] == TEXTS


@pytest.mark.parametrize("cut", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("shell", ["jsonl.gz", "jsonl.zst", "json", "json.gz", "parquet", "stream.arrow"])
def test_没有下载完的文件报错_不当作读完了(shell, cut, tmp_path):
    records = [{"text": f"{i} {hash(str(i))}"} for i in range(3000)]
    path = write_shell(tmp_path / f"a.{shell}", records)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * cut)])
    with pytest.raises(DataError) as caught:
        list(raw_lines(path))
    assert caught.value.file == str(path) and caught.value.line >= 1 and caught.value.fix


def test_几段相接的压缩文件都读完(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    for name, compress in (("a.gz", gzip.compress), ("a.zst", zstandard.compress)):
        (tmp_path / name).write_bytes(b"".join(compress(lines_of([record])) for record in TEXTS))
        assert [record for _, record in read_records(tmp_path / name)] == TEXTS


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"PK\x03\x04", "zip 压缩文件"),
        (gzip.compress(b"{}"), "这是gzip 压缩文件.*gunzip"),  # 只解一层
        (b"\x28\xb5\x2f\xfd...", "这是zstd 压缩文件.*zstd -d"),
        (b"PAR1...", "这是parquet 文件"),
        (bz2.compress(b"x"), "bzip2 压缩文件"),
        (lzma.compress(b"x"), "xz 压缩文件"),
        ("文".encode("utf-16"), "UTF-16"),
        (b"\0" * 64, "二进制文件"),
        (b"", "是空的"),
    ],
)
def test_压缩包里不是文本_说出是什么(data, words, tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(data))
    with pytest.raises(UserError, match=words):
        list(raw_lines(path))


def test_压缩文件里过长的行报行号(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(b'{"text": "x"}\n' * 3 + b'{"text": "' + b"x" * 5000 + b'"}\n'))
    with pytest.raises(DataError) as caught:
        list(raw_lines(path))
    assert caught.value.line == 4


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ('[{"text": "甲"}, {"text": "乙"} {"text": "丙"}]', 3, "逗号"),
        ('[{"text": "甲"}, {"text": 乙}]', 2, "不是合法的 JSON"),
        ('[{"text": "甲"}, {"text": "乙"}', 3, "没有结束"),
        ('[{"text": "甲"}]\n[{"text": "乙"}]', 2, "结束之后还有"),
        ('[{"text": "甲"},]', 2, "多了一个逗号"),
        ('[{"text": "甲"},\n \n]', 2, "多了一个逗号"),
    ],
)
def test_写坏的JSON数组说出第几项(text, line, words, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(text, "utf-8")
    with pytest.raises(DataError, match=words) as caught:
        list(raw_lines(path))
    assert (caught.value.file, caught.value.line) == (str(path), line)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("ab键", max_size=2), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(
    records=st.lists(
        st.dictionaries(st.text("ab键", max_size=2), _VALUES, max_size=3), min_size=1, max_size=6
    ),
    indent=st.sampled_from([None, 0, 2]),
    ascii_only=st.booleans(),
    block=st.integers(1, 9),
)
def test_JSON数组怎样排版_一次读多少_都读出同样的各项(records, indent, ascii_only, block, tmp_path_factory):
    path = tmp_path_factory.mktemp("array") / "a.json"
    path.write_text(json.dumps(records, ensure_ascii=ascii_only, indent=indent), "utf-8")
    saved, json_array.BLOCK = json_array.BLOCK, block
    try:
        assert [parse_line(raw) for raw in raw_lines(path)] == records
    finally:
        json_array.BLOCK = saved


@pytest.mark.parametrize(
    ("name", "head", "library"),
    [
        ("a.parquet", b"PAR1rest", "pyarrow"),
        ("a.arrow", b"ARROW1rest", "pyarrow"),
        ("a.zst", b"\x28\xb5\x2f\xfdrest", "zstandard"),
    ],
)
def test_没有装读它的库_给出安装的命令(name, head, library, tmp_path, monkeypatch):
    if library == "zstandard" and sys.version_info >= (3, 14):
        pytest.skip("标准库里有")
    monkeypatch.setitem(sys.modules, library, None)
    (tmp_path / name).write_bytes(head)
    with pytest.raises(UserError, match=library) as caught:
        list(raw_lines(tmp_path / name))
    assert "[data]" in caught.value.fix and f"pip install {library}" in caught.value.fix


def test_文件夹里哪些是数据(tmp_path):
    contents = {
        "a.jsonl": b"{}", "b.json": b'[{"a": 1}]', "c.json": b'{"text": "x"}\n', "d.parquet": b"", "e.jsonl.gz": b"",
        "f.jsonl.zst": b"", "g.arrow": b"", "设置.json": b'{\n "a": 1\n}', "dataset_info.json": b"{}", "README.md": b"",
        ".隐藏.jsonl": b"{}", "h.tar.gz": b"",
    }  # fmt: skip
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    found = {path.name for path in tmp_path.iterdir() if is_data_file(path)}
    assert found == {"a.jsonl", "b.json", "c.json", "d.parquet", "e.jsonl.gz", "f.jsonl.zst", "g.arrow"}


def test_旧缓存里的坏行_认得的写法变多之后重新来过(tmp_path, tokenizer):
    path = write_shell(tmp_path / "a.jsonl", [chat("问", "答"), {"instruction": "提问", "output": "回答"}])
    cache = build_cache(path, "sft", tokenizer, on_bad_line="skip")
    meta = json.loads((cache.folder / "meta.json").read_text("utf-8"))
    # 从前的版本不认得第二行
    meta.update(bad_count=1, bad=[DataError("缺少字段", line=2).to_dict()])
    del meta["formats"]
    (cache.folder / "meta.json").write_text(json.dumps(meta), "utf-8")
    assert len(build_cache(path, "sft", tokenizer)) == 2
    assert len(SFTDataset(path, tokenizer, 64).packing.doc) == 2


def _table(kind: str, path, table) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if kind == "parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_列式文件里同名的列_不悄悄只留后一个(kind, tmp_path):
    pa = pytest.importorskip("pyarrow")
    turn = pa.StructArray.from_arrays(
        [pa.array(["user"]), pa.array(["问"]), pa.array(["又问"])], names=["role", "content", "content"]
    )
    tables = {
        "text": pa.Table.from_arrays([pa.array(["甲"]), pa.array(["乙"])], names=["text", "text"]),
        "conversations[].content": pa.table(
            {"conversations": pa.ListArray.from_arrays(pa.array([0, 1]), turn)}
        ),
    }
    for field, table in tables.items():
        path = tmp_path / f"a.{kind}"
        _table(kind, path, table)
        with pytest.raises(DataError, match="2 列都叫这个名字") as caught:
            list(raw_lines(path))
        assert (caught.value.file, caught.value.field) == (str(path), field)


def test_列式文件里map的同名的键_说出是哪一行(tmp_path):
    pa = pytest.importorskip("pyarrow")
    rows = [[("text", "甲")], [("text", "乙"), ("text", "丙")]]
    _table(
        "parquet", tmp_path / "a.parquet", pa.table({"m": pa.array(rows, pa.map_(pa.string(), pa.string()))})
    )
    with pytest.raises(DataError, match="写了两次") as caught:
        list(raw_lines(tmp_path / "a.parquet"))
    assert (caught.value.line, caught.value.field) == (2, "text")


def test_列式文件里不是文字的字节_不当作正文(tmp_path):
    pa = pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    _table("parquet", path, pa.table({"text": pa.array(["甲".encode(), b"\xff\xfe"])}))
    first, second = raw_lines(path)
    assert read_record(first, "pretrain") == {"text": "甲"}
    with pytest.raises(DataError, match=r"不是 UTF-8 的字节.*ff fe"):
        read_record(second, "pretrain")
    # 用不着的一列里有字节（向量、图的散列）不碍事
    _table("parquet", path, pa.table({"text": ["甲"], "hash": pa.array([b"\xff"])}))
    assert read_record(next(iter(raw_lines(path))), "pretrain")["text"] == "甲"


def test_以可跳过的帧开头的zstd也读得了(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    body = zstandard.compress(lines_of(TEXTS))
    frame = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"abcd"
    for name, data in {"head.zst": frame + body, "tail.zst": body + frame}.items():
        (tmp_path / name).write_bytes(data)
        assert [record for _, record in read_records(tmp_path / name)] == TEXTS


@pytest.mark.parametrize("text", ["\n\n \n", "[]", " [\n] "])
def test_一条记录也没有的_说没有记录_不说认不出种类(text, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(text, "utf-8")
    with pytest.raises(UserError, match="没有一条记录"):
        detect_kind(path)
