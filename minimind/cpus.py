"""本进程到底能用几个核：调度限制（taskset、作业系统）与容器的 CPU 配额，取小的。

容器常常看得见几十个核，配额却只有两个：按看见的核数开线程，线程会在屏障前互相空等，比两个线程慢几十倍。
"""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUP_ROOT, CGROUP_OF_SELF = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def available_cpus(root: Path = CGROUP_ROOT, own: Path = CGROUP_OF_SELF) -> int:
    """能用的核数，至少为 1；配额不是整数时向上取整。

    Args:
        root: cgroup 的挂载点。
        own: 写着本进程属于哪个 cgroup 的文件。
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(root, own)
    return count if quota is None else max(1, min(count, math.ceil(quota)))


def cpu_quota(root: Path = CGROUP_ROOT, own: Path = CGROUP_OF_SELF) -> float | None:
    """容器给多少个核的时间，例如 2.0；没有限制、不在 Linux 上、读不到时为 None。

    上层的限制对下层同样有效，所以从自己所在的一层往上各看一眼，取最紧的。
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # v2：0::/路径
            quotas += [_quota_v2(folder) for folder in _upwards(root, path)]
        elif "cpu" in controllers.split(","):
            # 容器里自己的那一层通常直接挂在根上，/proc 里的路径是宿主机的
            quotas += [
                _quota_v1(folder) for name in (controllers, "cpu") for folder in _upwards(root / name, path)
            ]
    found = [quota for quota in quotas if quota is not None]
    return min(found, default=None)


def _upwards(root: Path, path: str) -> list[Path]:
    """``root/a/b``、``root/a``、``root``。"""
    inner = Path(path.strip("/"))
    return [root / part for part in (inner, *inner.parents)]


def _quota_v2(folder: Path) -> float | None:
    """``cpu.max``：``max 100000`` 表示不限，``200000 100000`` 表示两个核。"""
    numbers = _read(folder / "cpu.max").split()
    return _ratio(*numbers) if len(numbers) == 2 else None


def _quota_v1(folder: Path) -> float | None:
    """``cpu.cfs_quota_us``（−1 不限）除以 ``cpu.cfs_period_us``。"""
    return _ratio(_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us"))


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # 没有这一层，或不让读：当作没有限制
        return ""


def _ratio(quota: str, period: str) -> float | None:
    if not (quota.isdigit() and period.isdigit() and int(quota) and int(period)):
        return None
    return int(quota) / int(period)
