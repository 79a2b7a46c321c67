"""能用的核数：容器的 CPU 配额说了算，读假的 cgroup 文件。"""

import os

import pytest
import torch

from minimind.runtime import device
from minimind.runtime import fair_share as cpus


def cgroup(folder, own: str, files: dict[str, str]):
    (folder / "self").write_text(own)
    for name, text in files.items():
        path = folder / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return {"root": folder / "cgroup", "own": folder / "self"}


@pytest.mark.parametrize(
    "own, files, quota",
    [
        ("0::/\n", {"cpu.max": "200000 100000"}, 2.0),
        ("0::/\n", {"cpu.max": "max 100000"}, None),
        ("0::/\n", {"cpu.max": "50000 100000"}, 0.5),
        ("0::/\n", {}, None),
        ("0::/pod/box\n", {"pod/box/cpu.max": "max 100000", "pod/cpu.max": "300000 100000"}, 3.0),  # 上层更紧
        ("0::/pod/box\n", {"pod/box/cpu.max": "150000 100000", "pod/cpu.max": "300000 100000"}, 1.5),
        ("0::/host/path\n", {"cpu.max": "200000 100000"}, 2.0),  # 路径是宿主机的，容器里只有根这一层
        ("4:memory:/x\n3:cpu,cpuacct:/x\n", {"cpu,cpuacct/cpu.cfs_quota_us": "400000", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, 4.0),
        ("3:cpu,cpuacct:/x\n", {"cpu/x/cpu.cfs_quota_us": "100000", "cpu/x/cpu.cfs_period_us": "100000"}, 1.0),
        ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("3:cpuset:/\n", {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "乱码", "cpu/cpu.cfs_period_us": "0"}, None),
    ],
)  # fmt: skip
def test_读配额(tmp_path, own, files, quota):
    assert cpus.cpu_quota(**cgroup(tmp_path, own, files)) == quota


def test_配额与调度限制取小的_向上取整至少一个(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for text, count in (("250000 100000", 3), ("1000 100000", 1), ("6400000 100000", 8), ("max 100000", 8)):
        assert cpus.available_cpus(**cgroup(tmp_path, "0::/\n", {"cpu.max": text})) == count
    assert cpus.available_cpus(tmp_path / "没有", tmp_path / "没有") == 8  # 不是 Linux


@pytest.fixture
def threads(monkeypatch):
    """假的线程数，不去动真的：别的测试在同一个进程里。"""
    state = {"threads": 8}
    monkeypatch.setattr(torch, "get_num_threads", lambda: state["threads"])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: state.update(threads=n))
    return state


def test_线程数不超过配额_除非使用者自己定了(threads, monkeypatch):
    monkeypatch.setattr(device, "available_cpus", lambda: 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    device.prepare_device(torch.device("cpu"))
    assert threads["threads"] == 8
    monkeypatch.delenv("OMP_NUM_THREADS")
    device.prepare_device(torch.device("cpu"))
    assert threads["threads"] == 2
    monkeypatch.setattr(device, "available_cpus", lambda: 16)
    device.prepare_device(torch.device("cpu"))
    assert threads["threads"] == 2  # 只会减，不会加


def test_演示挑线程也不超过配额(threads, monkeypatch):
    monkeypatch.setattr(device, "available_cpus", lambda: 3)
    seconds = {1: 8.0, 2: 4.0, 3: 2.0, 4: 1.0, 8: 0.5}  # 越多越快，还是只能到 3
    monkeypatch.setattr(device, "time_call", lambda _: seconds[threads["threads"]])
    assert device.pick_threads(lambda: None) == 3 == threads["threads"]
