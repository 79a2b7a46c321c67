"""本进程该用几个核：先看准许用几个（调度限制与容器的配额，取小的），再看忙不忙。

容器常常看得见几十个核，配额却只有两个：按看见的核数开线程，线程会在屏障前互相空等，比两个线程慢几十倍。

别的程序占着处理器，就让出线程；它走了，再要回来。OpenMP 的线程在每个并行区末尾空转着等最慢的一个。两核两线程时旁边只要有一个忙碌的进程，就有一个线程只得半个核，另一个
陪着空转，训练从每秒 4,900 词元掉到 1,090；只用一个线程有 2,500，因为它独占一个核。闲的时候一个线程只有 2,700，所以
哪个固定的线程数都不能两头兼顾，要边跑边看。

看的是系统的账，不是步时：一步多长随数据而变，账不会。本进程各线程“想跑而在排队”的秒数（``/proc/self/task/*/schedstat``）
说明有没有人来抢；让出线程之后，各核空闲的秒数（``/proc/stat``）说明人走了没有。闲的机器上排队的时间近乎零，所以不会误判。

线程数变了，求和的次序就变，结果只差舍入；要逐位相同就用 ``OMP_NUM_THREADS`` 定下线程数，那时这里什么也不做。
只在 Linux 上有这两本账；别的系统上也什么也不做。
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path

from minimind.console import say

#: 隔多久看一次账（秒）；连着几次都这样才动，免得一阵风就改
WINDOW, CONFIRM = 1.0, 3
#: 每秒排队的秒数过了这个数就是有人来抢：一个忙碌的进程至少让我们排队半秒，闲时不到百分之三
CROWDED = 0.25
#: 空出来的核要有这么多才要回一个线程
VACANT = 0.85
#: 要回来又立刻被抢，下次就等久一倍才再试，最多等这么久（秒）
LONGEST_WAIT = 120.0

PROC = Path("/proc")
CGROUP_ROOT, CGROUP_OF_SELF = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


# ---------------------------------------------------------------- 准许用几个


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


# ---------------------------------------------------------------- 忙不忙


def queued_seconds(proc: Path = PROC) -> float | None:
    """本进程所有线程至今排队等处理器的秒数之和；系统不记这本账时为 None。"""
    total = 0
    try:
        tasks = list((proc / "self/task").iterdir())
    except OSError:
        return None
    for task in tasks:
        try:
            total += int((task / "schedstat").read_text().split()[1])
        except FileNotFoundError:  # 线程刚结束
            continue
        except (OSError, IndexError, ValueError):
            return None
    return total / 1e9


def vacant_seconds(proc: Path = PROC) -> float | None:
    """准许本进程用的各核至今空着的秒数之和；没有这本账时为 None。"""
    try:
        lines = (proc / "stat").read_text().splitlines()
        cores = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        ticks = 0
        for line in lines:
            name, *numbers = line.split()
            if name in cores:
                ticks += int(numbers[3]) + int(numbers[4])  # idle 与 iowait
        return ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, IndexError, ValueError):
        return None


class FairShare:
    """本进程的线程数随机器的忙闲增减；每算完一步调用一次 :meth:`lap`。

    Args:
        threads: 读线程数的函数，默认 ``torch.get_num_threads``；上限是第一次 :meth:`lap` 时的线程数，或 :meth:`limit` 给的。
        set_threads: 设线程数的函数，默认 ``torch.set_num_threads``。
        queued, vacant: 两本账，见 :func:`queued_seconds`、:func:`vacant_seconds`；任一个给出 None 就从此不动。
        clock: 秒表。
        tell: 改了线程数时说一句。
    """

    def __init__(
        self,
        *,
        threads: Callable[[], int] | None = None,
        set_threads: Callable[[int], None] | None = None,
        queued: Callable[[], float | None] = queued_seconds,
        vacant: Callable[[], float | None] = vacant_seconds,
        clock: Callable[[], float] = time.monotonic,
        tell: Callable[[str], None] = say,
    ):
        import torch

        self._threads = threads or torch.get_num_threads
        self._set_threads = set_threads or torch.set_num_threads
        self._queued, self._vacant, self._clock, self._tell = queued, vacant, clock, tell
        self._most: int | None = None
        self._mark: tuple[float, float, float] | None = None  # 上次看账的时刻与两本账
        self._streak = 0  # 连着几次看到同一个苗头，正为拥挤，负为空闲
        self._wait, self._raised_at, self._lowered_at = 0.0, -LONGEST_WAIT, -LONGEST_WAIT
        self._off = "OMP_NUM_THREADS" in os.environ

    @property
    def most(self) -> int:
        """机器空闲时用几个线程。"""
        return self._most or self._threads()

    def limit(self, most: int) -> None:
        """至多用 ``most`` 个线程；此刻用得更少也无妨，空下来会加上去。"""
        self._most, self._mark, self._streak = most, None, 0

    def lap(self) -> None:
        """一步算完了：该看账时看一眼，必要时增减线程数。要在做计算的那个线程里调用。"""
        if self._off:
            return
        now = self._clock()
        if self._mark is not None and now - self._mark[0] < WINDOW:
            return
        if self._most is None:
            self._most = self._threads()
        queued, vacant = (self._queued(), self._vacant()) if self._most > 1 else (None, None)
        if queued is None or vacant is None:
            self._off = True
            return
        before, self._mark = self._mark, (now, queued, vacant)
        if before is not None:
            seconds = now - before[0]
            self._judge(now, (queued - before[1]) / seconds, (vacant - before[2]) / seconds)

    def _judge(self, now: float, queued: float, vacant: float) -> None:
        """``queued``、``vacant``：这段时间里每秒有几个线程在排队、几个核空着。"""
        threads = self._threads()
        if threads > 1 and queued > CROWDED:
            self._streak = max(self._streak, 0) + 1
        elif threads < self._most and vacant > VACANT and now - self._lowered_at >= self._wait:
            self._streak = min(self._streak, 0) - 1
        else:
            self._streak = 0
        if abs(self._streak) < CONFIRM:
            return
        if self._streak > 0:
            fewer = max(1, threads - max(1, round(queued)))
            # 刚要回来就又被抢：下次等久一点再试
            again = now - self._raised_at < 10 * WINDOW
            self._wait = min(max(2 * self._wait, 10 * WINDOW), LONGEST_WAIT) if again else 0.0
            self._lowered_at = now
            self._change(threads, fewer, "别的程序占着处理器")
        else:
            more = min(self._most, threads + max(1, int(vacant + 1 - VACANT)))
            self._raised_at = now
            self._change(threads, more, "处理器空下来了")
        self._mark, self._streak = None, 0

    def _change(self, old: int, new: int, why: str) -> None:
        self._set_threads(new)
        self._tell(
            f"{why}：线程数 {old} → {new}（求和次序随之改变，结果只差舍入；用 OMP_NUM_THREADS 可定住）。"
        )


_share: FairShare | None = None


def fair_share() -> FairShare:
    """本进程的那一份：线程数是整个进程的，所以只有一份。"""
    global _share
    if _share is None:
        _share = FairShare()
    return _share
