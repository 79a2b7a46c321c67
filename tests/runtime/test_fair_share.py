"""机器忙时让出线程，空下来要回来；闲的机器上不误判，账读不到时不动。"""

from __future__ import annotations

import pytest
import torch

from minimind.runtime import device
from minimind.runtime import fair_share as module
from minimind.runtime.fair_share import FairShare, queued_seconds, vacant_seconds


class Machine:
    """一台假机器：``cores`` 个核，``others`` 个别人的忙碌进程；时间由测试推着走。"""

    def __init__(self, monkeypatch, cores: int = 2, threads: int | None = None):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        self.cores, self.others, self.threads = cores, 0, threads or cores
        self.now = self.queued = self.vacant = 0.0
        self.said: list[str] = []
        self.share = FairShare(
            threads=lambda: self.threads,
            set_threads=lambda n: setattr(self, "threads", n),
            queued=lambda: self.queued,
            vacant=lambda: self.vacant,
            clock=lambda: self.now,
            tell=self.said.append,
        )

    def run(self, seconds: float, step: float = 0.1) -> list[int]:
        """走这么久，返回每一步的线程数。"""
        used = []
        for _ in range(round(seconds / step)):
            wanted = self.threads + self.others
            self.now += step
            # 每个线程分到 cores / wanted 个核，其余时间在排队
            self.queued += step * self.threads * max(0.0, 1 - self.cores / wanted)
            self.vacant += step * max(0.0, self.cores - wanted)
            self.share.lap()
            used.append(self.threads)
        return used


@pytest.mark.parametrize("cores", [2, 4, 16])
def test_闲着的机器一直用满(monkeypatch, cores):
    machine = Machine(monkeypatch, cores)
    assert set(machine.run(300)) == {cores}
    assert not machine.said


@pytest.mark.parametrize(("cores", "others", "left"), [(2, 1, 1), (2, 3, 1), (4, 1, 3), (4, 2, 2), (8, 3, 5)])
def test_别人来了就让开_走了就要回来(monkeypatch, cores, others, left):
    machine = Machine(monkeypatch, cores)
    machine.run(10)
    machine.others = others
    machine.run(20)
    assert machine.threads == left
    steady = machine.run(300)
    assert steady.count(left) >= 0.95 * len(steady)  # 不来回摇摆
    machine.others = 0
    machine.run(130)
    assert machine.threads == cores
    assert any("别的程序占着处理器" in s for s in machine.said) and "空下来" in machine.said[-1]


def test_一阵风不算(monkeypatch):
    machine = Machine(monkeypatch)
    for _ in range(20):
        machine.run(8)
        machine.others = 1
        machine.run(0.9)
        machine.others = 0
    assert machine.threads == 2 and not machine.said


def test_时忙时闲不会每次都跟着跳(monkeypatch):
    machine = Machine(monkeypatch)
    for _ in range(60):
        machine.others = 1
        machine.run(5)
        machine.others = 0
        machine.run(5)
    assert len(machine.said) < 60  # 每次都跟要改 120 次


def test_使用者定了线程数_或读不到账_就不动(monkeypatch):
    machine = Machine(monkeypatch)
    machine.share._queued = lambda: None
    machine.others = 3
    machine.run(30)
    assert machine.threads == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    fixed = FairShare(
        threads=lambda: 2, set_threads=pytest.fail, queued=pytest.fail, vacant=pytest.fail, tell=pytest.fail
    )
    for _ in range(5):
        fixed.lap()


def test_一个线程没有可让的(monkeypatch):
    machine = Machine(monkeypatch, cores=2, threads=1)
    machine.others = 3
    machine.run(30)
    assert machine.threads == 1 and not machine.said


def test_开头就忙_空下来仍能加到上限(monkeypatch):
    machine = Machine(monkeypatch, cores=4, threads=1)
    machine.share.limit(4)
    machine.others = 3
    machine.run(30)
    assert machine.threads == 1
    machine.others = 0
    machine.run(30)
    assert machine.threads == 4


def test_账的读法(tmp_path, monkeypatch):
    for task, text in (("7", "5000000000 1500000000 9\n"), ("8", "1 500000000 2\n")):
        (tmp_path / "self/task" / task).mkdir(parents=True)
        (tmp_path / "self/task" / task / "schedstat").write_text(text)
    (tmp_path / "self/task/9").mkdir()  # 刚结束的线程，文件已经没了
    assert queued_seconds(tmp_path) == pytest.approx(2.0)
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: {0, 2}, raising=False)
    monkeypatch.setattr(module.os, "sysconf", lambda _: 100)
    rows = ["cpu  9 9 9 9 9 9", "cpu0 1 2 3 400 50 6 0", "cpu1 1 2 3 999 9 6 0", "cpu2 1 2 3 100 0 6 0"]
    (tmp_path / "stat").write_text("\n".join([*rows, "intr 1 2 3"]))
    assert vacant_seconds(tmp_path) == pytest.approx(5.5)
    assert queued_seconds(tmp_path / "没有") is None and vacant_seconds(tmp_path / "没有") is None
    (tmp_path / "self/task/7/schedstat").write_text("0\n")
    assert queued_seconds(tmp_path) is None


@pytest.fixture
def fake_threads(monkeypatch):
    """假的线程数与本进程的份额，不动真的。"""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    state = {"threads": 4}
    monkeypatch.setattr(torch, "get_num_threads", lambda: state["threads"])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: state.update(threads=n))
    monkeypatch.setattr(module, "_share", FairShare())
    return state


def test_演示挑线程时正忙_上限不随之降低(fake_threads, monkeypatch):
    monkeypatch.setattr(device, "available_cpus", lambda: 4)
    monkeypatch.setattr(device, "time_call", lambda _: {1: 1.0, 2: 5.0}[fake_threads["threads"]])
    for waiting, most in ((0.0, 1), (1e6, 4)):
        accounts = iter([0.0, waiting])
        monkeypatch.setattr(device, "queued_seconds", lambda accounts=accounts: next(accounts))
        fake_threads["threads"] = 4
        assert device.pick_threads(lambda: None) == 1
        assert module.fair_share().most == most


def test_续训沿用存档的线程数_办不到就说(fake_threads, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(device, "available_cpus", lambda: 4)
    device.reuse_threads(4, said.append)
    assert fake_threads["threads"] == 4 and not said
    device.reuse_threads(2, said.append)
    assert fake_threads["threads"] == 2 == module.fair_share().most and not said
    device.reuse_threads(8, said.append)
    assert fake_threads["threads"] == 2 and "由 8 变为 2" in said.pop()
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    device.reuse_threads(1, said.append)
    assert fake_threads["threads"] == 2 and "由 1 变为 2" in said.pop()
