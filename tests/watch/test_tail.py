"""跟着文件读：只读新的整行，换过、截短、原地重写都认得出来。"""

from __future__ import annotations

import os
import random

import pytest
from watch_logs import append

from minimind.watch import tail as tail_module
from minimind.watch.tail import Tail, open_regular


def texts(piece) -> list[str]:
    return [line.decode() for _, line in piece.lines]


def test_只读新长出来的整行_写到一半的末行等它写完(tmp_path):
    path = tmp_path / "a.jsonl"
    append(path, "一\n二\n三")
    tail = Tail(path)
    assert texts(tail.read(1000)) == ["一", "二"]
    assert texts(tail.read(1000)) == []
    append(path, "点\n四\n")
    piece = tail.read(1000)
    assert texts(piece) == ["三点", "四"] and not piece.restarted
    assert [tail.line(at, len(line)) for at, line in piece.lines] == [line for _, line in piece.lines]


@pytest.mark.parametrize("budget", [3, 7, 64, 10_000])
def test_一点点读与一口气读相同(tmp_path, budget):
    path = tmp_path / "a.jsonl"
    lines = ["x" * random.Random(n).randrange(40) for n in range(200)]
    append(path, "".join(f"{line}\n" for line in lines))
    tail, found = Tail(path), []
    while True:
        piece = tail.read(budget)
        found += texts(piece)
        if piece.complete:
            break
    assert found == lines


def replaced(path, text):
    """续训的写法：写临时文件再改名。"""
    path.with_suffix(".tmp").write_text(text, "utf-8")
    os.replace(path.with_suffix(".tmp"), path)


def rewritten(path, text):
    """原地重写：inode 不变。"""
    with open(path, "r+", encoding="utf-8") as file:
        file.truncate(0)
        file.write(text)


@pytest.mark.parametrize("how", [replaced, rewritten])
@pytest.mark.parametrize("text", ["新\n", "新的一行\n" * 50, ""])
def test_文件换过就从头读(tmp_path, how, text):
    path = tmp_path / "a.jsonl"
    append(path, "旧的一行\n" * 20)
    tail = Tail(path)
    tail.read(10_000)
    how(path, text)
    piece = tail.read(10_000)
    assert piece.restarted and texts(piece) == text.splitlines()


def test_只有中间改过的一样长的文件_从已读处之前也看得出(tmp_path):
    path = tmp_path / "a.jsonl"
    append(path, "甲\n" * 400)
    tail = Tail(path)
    tail.read(10_000)
    rewritten(path, "甲\n" * 390 + "乙\n" * 10)
    assert tail.read(10_000).restarted


def test_文件没了又回来(tmp_path):
    path = tmp_path / "a.jsonl"
    tail = Tail(path)
    assert texts(tail.read(10)) == []
    append(path, "一\n")
    assert texts(tail.read(10)) == ["一"]
    path.unlink()
    assert texts(tail.read(10)) == []
    append(path, "二\n")
    piece = tail.read(10)
    assert piece.restarted and texts(piece) == ["二"]


def test_长得不像话的一行跳过_后面的照读(tmp_path, monkeypatch):
    monkeypatch.setattr(tail_module, "LONGEST_LINE", 1000)
    path = tmp_path / "a.jsonl"
    append(path, "一\n" + "x" * 5000)
    tail = Tail(path)
    assert texts(tail.read(100)) == ["一"]
    for _ in range(100):
        tail.read(100)
    append(path, "x" * 5000 + "\n二\n三")
    found = []
    for _ in range(100):
        found += texts(tail.read(100))
    assert found == ["二"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="没有命名管道")
def test_管道不会把服务卡住(tmp_path):
    path = tmp_path / "a.jsonl"
    os.mkfifo(path)
    assert Tail(path).read(10).lines == []
    with pytest.raises(OSError, match="不是普通文件"):
        open_regular(path)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="数打开的描述符只在 Linux 上")
def test_名字像日志的目录_看多少遍都不漏描述符(tmp_path):
    """页面每两秒看一遍：漏一个，半小时就到上限，页面再也打不开。"""
    path = tmp_path / "a.jsonl"
    path.mkdir()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        assert Tail(path).read(10).lines == []
        with pytest.raises(OSError, match="不是普通文件"):
            open_regular(path)
    assert len(os.listdir("/proc/self/fd")) == before
