"""文件锁：任何时刻只有一个持有者，哪怕锁文件每次都被删掉；用完不留痕迹。"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from minimind.runtime import files
from minimind.runtime.files import file_lock


@pytest.fixture(autouse=True)
def fast_poll(monkeypatch):
    monkeypatch.setattr(files, "POLL_SECONDS", 0.0005)


def test_同时只有一个持有者且不留锁文件(tmp_path):
    """锁文件随放锁而删：等待者若锁在已删的文件上，就会有两个持有者。"""
    inside, most = 0, 0

    def work():
        nonlocal inside, most
        for _ in range(40):
            with file_lock(tmp_path / "a.lock"):
                inside += 1
                most = max(most, inside)
                time.sleep(0.0002)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert list(tmp_path.iterdir()) == []


def test_别人用完收走空目录时照样拿得到(tmp_path):
    """分词缓存放锁之后把空目录也收走，等着的、刚来的会撞上目录不在的一刻。"""
    inside, most, failed = 0, 0, []

    def work():
        nonlocal inside, most
        try:
            for _ in range(60):
                with file_lock(tmp_path / "locks" / "a.lock"):
                    inside += 1
                    most = max(most, inside)
                    inside -= 1
                with contextlib.suppress(OSError):
                    (tmp_path / "locks").rmdir()
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, failed) == (1, [])


def test_出错也放锁(tmp_path):
    with pytest.raises(KeyError), file_lock(tmp_path / "a.lock"):
        raise KeyError
    with file_lock(tmp_path / "a.lock"):
        pass


def test_持锁的进程被杀后锁立刻可用(tmp_path):
    script = f"""
import time
from pathlib import Path
from minimind.runtime.files import file_lock
with file_lock(Path({str(tmp_path / "a.lock")!r})):
    print("拿到", flush=True)
    time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    waited = []
    os.kill(process.pid, signal.SIGSTOP)  # 还活着时确实等得到
    timer = threading.Timer(0.1, process.kill)
    timer.start()
    with file_lock(tmp_path / "a.lock", lambda: waited.append(1)):
        assert process.wait() == -signal.SIGKILL
    assert waited == [1]
