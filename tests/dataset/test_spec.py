"""``--data_path`` 的写法：几个文件、权重、文件夹、通配符；写错的说出哪里错、怎么改。"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

from minimind.dataset.spec import parse_spec
from minimind.errors import UserError


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """几个数据文件的当前目录。"""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "夹").mkdir()
    names = (
        "a.jsonl",
        "b.jsonl",
        "c.parquet",
        "甲,乙.jsonl",
        "x:0.5",
        "x",
        "n[1].jsonl",
        "夹/p.jsonl",
        "夹/q.jsonl.gz",
        "夹/读我.md",
    )
    for name in names:
        (tmp_path / name).write_text('{"text": "x"}\n')
    return tmp_path


def parsed(spec: str, folder: Path) -> list[tuple[list[str], Fraction | None]]:
    return [([str(f.relative_to(folder)) for f in part.files], part.weight) for part in parse_spec(spec)]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("a.jsonl", [(["a.jsonl"], None)]),
        ("a.jsonl, b.jsonl", [(["a.jsonl"], None), (["b.jsonl"], None)]),
        ("a.jsonl:0.7,b.jsonl:0.3", [(["a.jsonl"], Fraction(7, 10)), (["b.jsonl"], Fraction(3, 10))]),
        ("a.jsonl:7e-1,b.jsonl: .3", [(["a.jsonl"], Fraction(7, 10)), (["b.jsonl"], Fraction(3, 10))]),
        ("夹", [(["夹/p.jsonl", "夹/q.jsonl.gz"], None)]),
        ("夹:0.5,[ab].jsonl:0.5", [(["夹/p.jsonl", "夹/q.jsonl.gz"], Fraction(1, 2)), (["a.jsonl", "b.jsonl"], Fraction(1, 2))]),
        ("**/*.gz", [(["夹/q.jsonl.gz"], None)]),
        # 真有这个名字的就是文件
        ("甲,乙.jsonl", [(["甲,乙.jsonl"], None)]),
        ("甲,乙.jsonl:0.4,a.jsonl:0.6", [(["甲,乙.jsonl"], Fraction(2, 5)), (["a.jsonl"], Fraction(3, 5))]),
        ("x:0.5", [(["x:0.5"], None)]),
        ("x:0.5:0.5,x:0.5", [(["x:0.5"], Fraction(1, 2)), (["x"], Fraction(1, 2))]),
        ("n[1].jsonl", [(["n[1].jsonl"], None)]),
    ],
)  # fmt: skip
def test_写法与意思(spec, expected, here):
    if spec == "x:0.5:0.5,x:0.5":  # 名字里带冒号的文件与它的前半同时在，写全了权重才分得清
        (here / "x:0.5").rename(here / "x:0.50")
        spec, expected = "x:0.50:0.5,x:0.5", [(["x:0.50"], Fraction(1, 2)), (["x"], Fraction(1, 2))]
    assert parsed(spec, here) == expected


def test_三份0_333按比例补到恰好是1(here):
    weights = [part.weight for part in parse_spec("a.jsonl:0.333,b.jsonl:0.333,c.parquet:0.333")]
    assert weights == [Fraction(1, 3)] * 3


@pytest.mark.parametrize("spec", ["C:\\a.jsonl", "D:/数据/a.jsonl", "\\\\server\\a.jsonl"])
def test_Windows路径里的冒号不是权重(spec, here):
    with pytest.raises(UserError, match="不存在") as caught:
        parse_spec(spec)
    assert spec in caught.value.where


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("a.jsonl:0,b.jsonl:1", "权重是 0"),
        ("a.jsonl:-0.5,b.jsonl:1.5", "权重是 -0.5"),
        ("a.jsonl:nan,b.jsonl:1", "权重是 nan"),
        ("a.jsonl:inf,b.jsonl:1", "权重是 inf"),
        ("a.jsonl:1e999,b.jsonl:1", "权重是 1e999"),
        ("a.jsonl:多,b.jsonl:1", "权重 '多' 不是数"),
        ("a.jsonl:,b.jsonl:1", "冒号后面没有权重"),
        ("夹:七成", "不是数"),
        ("a.jsonl:0.7,b.jsonl", "b.jsonl 没有写权重"),
        ("a.jsonl:0.7,b.jsonl:0.7", "权重加起来是 1.4"),
        ("a.jsonl:7,b.jsonl:3", "a.jsonl:0.7,b.jsonl:0.3"),
        ("a.jsonl,,b.jsonl", "第 2 项是空的"),
        ("a.jsonl,没有.jsonl", "不存在"),
        ("a.jsonl：0.5，b.jsonl：0.5", "写成 a.jsonl:0.5,b.jsonl:0.5"),
        ("没有：的.jsonl", "不存在"),
        ("a.jsonl;b.jsonl", "写成 a.jsonl,b.jsonl"),
        ("a.jsonl、b.jsonl", "写成 a.jsonl,b.jsonl"),
        ("a.jsonl:1/4,b.jsonl:3/4", "写成 a.jsonl:0.25"),
        ("没有.jsonl:0.5,a.jsonl:0.5", "不存在"),
        ("*.csv", "没有匹配到文件"),
        ("a.jsonl,./a.jsonl", "出现了两次"),
        ("夹,夹/p.jsonl", "出现了两次"),
    ],
)
def test_写错的说出哪里错怎么改(spec, words, here):
    with pytest.raises(UserError) as caught:
        parse_spec(spec, "--val_path")
    assert words in str(caught.value) and "--val_path" in str(caught.value) and caught.value.fix


def test_文件夹里没有数据_说出哪里有(here, capsys):
    (here / "外").mkdir()
    (here / "夹").rename(here / "外" / "夹")
    with pytest.raises(UserError, match=r"夹/p\.jsonl") as caught:
        parse_spec("外")
    assert "**" in caught.value.fix
    assert len(parse_spec("外/夹")[0].files) == 2
    assert "没有用的：读我.md" in capsys.readouterr().err
