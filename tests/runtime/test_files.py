"""原子写入：几十个进程同时写也不出错、文件永远是其中完整的一份；被杀的残留会清掉，正在写的不会。"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading

import pytest

from minimind.errors import UserError
from minimind.runtime import files
from minimind.runtime.files import atomic_write, replacing, temporary_folder, write_text

SIZE = 20_000


def write_versions(path, name, start, failures):
    """每个进程写自己的几版；任何失败都送回去。"""
    start.wait()
    for k in range(3):
        try:
            data = bytes([name]) * (SIZE + name + k)
            atomic_write(path, lambda file, data=data: file.write(data))
        except BaseException as error:
            failures.put(repr(error))


def test_八十个进程同时写同一个文件_零次失败_内容总是完整的一版(tmp_path):
    path, context = tmp_path / "同一个[文件].bin", multiprocessing.get_context("fork")
    start, failures = context.Event(), context.SimpleQueue()
    writers = [context.Process(target=write_versions, args=(path, i, start, failures)) for i in range(80)]
    for writer in writers:
        writer.start()
    start.set()
    seen = 0
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            data = path.read_bytes()
            assert len(set(data)) == 1 and len(data) - data[0] - SIZE in (0, 1, 2)
            seen += 1
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert failures.empty(), failures.get()
    assert seen and os.listdir(tmp_path) == [path.name]


def test_同一个进程的几十个线程也互不相撞(tmp_path):
    failures = []

    def work(i):
        try:
            write_text(tmp_path / "a.json", f"{i}" * 1000)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(80)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and os.listdir(tmp_path) == ["a.json"]


def die_midway(path):
    with replacing(path) as temporary:
        temporary.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)


def die_in_folder(path):
    with temporary_folder(path) as temporary:
        (temporary / "x").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("die", [die_midway, die_in_folder])
def test_被杀的残留由下一次写清掉(tmp_path, die):
    path = tmp_path / "w.pth"
    child = multiprocessing.get_context("fork").Process(target=die, args=(path,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 1 and not path.exists()
    write_text(path, "新")
    assert os.listdir(tmp_path) == ["w.pth"] and path.read_text("utf-8") == "新"


def test_正在写的不当作残留(tmp_path):
    path = tmp_path / "w.pth"
    with replacing(path) as temporary:
        temporary.write_bytes(b"slow")
        write_text(path, "fast")
        assert temporary.read_bytes() == b"slow"
    assert path.read_bytes() == b"slow" and os.listdir(tmp_path) == ["w.pth"]


def test_别的机器的临时文件放够一天才清(tmp_path):
    fresh, old = (tmp_path / f".w.pth.00000000-1-{name}.tmp" for name in ("aaaaaaaa", "bbbbbbbb"))
    for file in (fresh, old):
        file.write_bytes(b"x")
    os.utime(old, (0, 0))
    write_text(tmp_path / "w.pth", "x")
    assert sorted(os.listdir(tmp_path)) == [fresh.name, "w.pth"]


def test_出错时旧文件完好且没有临时文件(tmp_path):
    path = tmp_path / "a"
    write_text(path, "旧")
    with pytest.raises(ZeroDivisionError):
        atomic_write(path, lambda file: (file.write(b"new"), 1 / 0))
    assert path.read_text("utf-8") == "旧" and os.listdir(tmp_path) == ["a"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="换一个可写的位置"):
        write_text(tmp_path / "file" / "a", "x")


def test_很长的名字也写得下(tmp_path):
    path = tmp_path / ("很长的名字" * 16 + ".json")  # 245 字节，加前后缀就过了 255
    write_text(path, "x")
    assert os.listdir(tmp_path) == [path.name]


def test_没有文件锁的系统上照样写得成(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    write_text(tmp_path / "a", "甲")
    with temporary_folder(tmp_path / "b") as folder:
        (folder / "x").write_text("1")
        folder.rename(tmp_path / "b")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
