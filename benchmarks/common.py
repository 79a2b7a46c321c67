"""基准共用的小工具：设备与环境的记录、结果文件、表格、计时。"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from minimind.errors import UserError
from minimind.runtime.device import peak_memory_bytes
from minimind.runtime.files import write_text

RESULTS = Path(__file__).resolve().parent / "results"
SHARED = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"


def hardware_name(device: torch.device) -> str:
    """给人看的硬件名；CPU 取 /proc/cpuinfo 的型号与支持的指令里最能说明速度的那个。"""
    if device.type in ("cuda", "npu"):
        return getattr(torch, device.type).get_device_name(device)
    name, flags = platform.processor() or platform.machine(), ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
        model = re.search(r"model name\s*:\s*(.+)", text)
        name = model.group(1).strip() if model else name
        flags = next((f for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f" {f}" in text), "")
    return f"{name} {flags}".strip()


def environment(device: torch.device) -> dict[str, Any]:
    """结果 JSON 里说明“在什么上测的”的那一段。"""
    import transformers

    return {
        "device": device.type,
        "hardware": hardware_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def slug(text: str) -> str:
    """文件名里用的短名：``AMD EPYC avx512_bf16`` → ``amd-epyc-avx512-bf16``。"""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def result_path(name: str, device: torch.device, results: Path = RESULTS) -> Path:
    """``results/NAME-<设备>.json``；CPU 带线程数，因为线程数不同的结果不能相比。"""
    tag = slug(hardware_name(device))
    if device.type == "cpu":
        tag = f"cpu-{tag}-{torch.get_num_threads()}t"
    return results / f"{name}-{tag}.json"


def write_result(name: str, device: torch.device, data: dict[str, Any], results: Path = RESULTS) -> Path:
    """写结果 JSON（先写临时文件再改名），返回路径。"""
    path = result_path(name, device, results)
    path.parent.mkdir(parents=True, exist_ok=True)
    payload = {"environment": environment(device), **data}
    if isinstance(payload.get("arguments"), dict):  # 路径只留文件名：各人的目录不一样，也不该写进仓库
        payload["arguments"] = {
            k: Path(v).name if isinstance(v, str) and os.sep in v else v
            for k, v in payload["arguments"].items()
        }
    write_text(path, to_json(payload) + "\n")
    return path


# 里面全是数的方括号：曲线上的一个点，或一列种子
NUMBERS = re.compile(r"\[[-+\d.,eE\s]+\]")


def to_json(payload: dict[str, Any]) -> str:
    """分行缩进，而一列数写在一行里：曲线有几千个点，一个数一行没法读，也没法比较改动。"""
    text = json.dumps(payload, ensure_ascii=False, indent=1)
    return NUMBERS.sub(lambda found: "[" + " ".join(found[0][1:-1].split()) + "]", text)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = "") -> None:
    """把结果打印成表：第一列左对齐，其余右对齐。"""
    table = Table(title=title, caption=caption or None, title_justify="left", caption_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*[str(cell) for cell in row])
    # 接到文件时没有终端宽度，给足宽度免得折行
    Console(width=None if os.isatty(1) else 140).print(table)


def need_file(path: str | Path) -> Path:
    """基准要用的数据文件；不在就说清怎么办。"""
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"找不到基准数据 {path}", expected="一个 jsonl 文件", fix="用参数指定数据文件的位置，见 --help"
        )
    return path


def clock_for(device: torch.device) -> Callable[[], float]:
    """计时用的时钟：单线程 CPU 上是处理器时间，别的进程抢占不算在内；其余是墙钟。

    处理器时间不等于墙钟：缓存与内存带宽被别的进程占用时它也会变长，所以只用来比较，结果里写明用的是哪个。
    """
    single = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if single else time.perf_counter


def seconds_of(
    call: Callable[[], Any],
    synchronize: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """``call`` 一次的用时。"""
    synchronize()
    start = clock()
    call()
    synchronize()
    return clock() - start


def alternate(
    calls: dict[str, Callable[[], Any]],
    repeats: int,
    synchronize: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """几种做法轮流各测 ``repeats`` 次，先各预热一次：机器忙闲的起伏由各家平摊。"""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        seconds_of(call, synchronize, clock)
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(seconds_of(call, synchronize, clock))
    return times


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def reset_peak_memory(device: torch.device) -> None:
    """把内存最高值清零，之后只记新的；Linux 的 CPU 上靠 /proc/self/clear_refs，别处清不了就从进程开始算。"""
    if device.type in ("cuda", "npu"):
        getattr(torch, device.type).reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """自 :func:`reset_peak_memory` 以来的最高值，字节。"""
    status = Path("/proc/self/status")
    if device.type in ("cuda", "npu") or not status.exists():
        return peak_memory_bytes(device)
    return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) * 1024
