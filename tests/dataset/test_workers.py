"""分词子进程：按次序交回、意外退出时一句话而不是挂住、主进程中断时不留孤儿。"""

from __future__ import annotations

import os
import signal

import pytest

from minimind.dataset.workers import WorkerPool, run_inline
from minimind.errors import UserError


@pytest.fixture
def setup(write_jsonl):
    path = write_jsonl([{"text": f"第 {i} 行"} for i in range(100)])
    return {"path": path, "kind": "pretrain", "tokenizer": None, "options": {}}


def tasks_of(setup):
    from minimind.dataset.jsonl import line_ranges

    return [("scan", *r) for r in line_ranges(setup["path"], 100)]


def test_结果的次序与任务相同(setup):
    tasks = tasks_of(setup)
    assert len(tasks) > 10
    with WorkerPool(2, setup) as pool:
        assert list(pool.map(tasks)) == list(run_inline(setup, tasks))


def test_子进程被杀时一句话而不是挂住(setup):
    tasks = tasks_of(setup)
    with WorkerPool(1, setup) as pool:
        results = pool.map(tasks)
        next(results)
        os.kill(pool.processes[0].pid, signal.SIGKILL)
        with pytest.raises(UserError, match=r"退出码 -9.*num_workers"):
            list(results)


def test_离开时子进程都已结束(setup):
    with pytest.raises(KeyboardInterrupt), WorkerPool(2, setup) as pool:
        next(pool.map(tasks_of(setup)))
        raise KeyboardInterrupt
    assert all(process.poll() is not None for process in pool.processes)


def test_子进程里的错误带回原因(setup):
    setup["kind"] = "没有这种"
    with WorkerPool(1, setup) as pool, pytest.raises(UserError, match="KeyError"):
        list(pool.map(tasks_of(setup)))


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="要读 /proc")
def test_子进程不导入torch(setup, tokenizer):
    """它只需要分词器；torch 会让每个子进程多占两三百兆。"""
    setup["tokenizer"] = tokenizer
    tasks = [("encode", start, end) for _, start, end in tasks_of(setup)]
    with WorkerPool(1, setup) as pool:
        next(pool.map(tasks))
        with open(f"/proc/{pool.processes[0].pid}/maps", encoding="utf-8") as file:
            maps = file.read()
    assert "tokenizers" in maps
    assert "libtorch" not in maps
