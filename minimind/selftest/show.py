"""自检的结果给人看、给机器看：一张表、一句结论、一份 JSON。"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import minimind
from minimind.runtime.checkpoint import atomic_write
from minimind.runtime.device import device_name, module_of
from minimind.runtime.fair_share import available_cpus
from minimind.selftest.rows import FAILED, PASSED, SKIPPED, UNTESTED, ResultRow

STYLES = {PASSED: "green", FAILED: "bold red", SKIPPED: "dim", UNTESTED: "yellow"}
FILE_WIDTH = 144  # 存进文件、贴进报告时的宽度；在终端里随终端


def environment(device: torch.device) -> dict[str, Any]:
    """查问题要知道的一切：各个版本、系统、处理器、设备与驱动。"""
    return {
        "minimind": minimind.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "系统": platform.platform(),
        "处理器": f"{cpu_name()}，可用 {available_cpus()} 核，torch {torch.get_num_threads()} 线程",
        "设备": device_name(device),
        "驱动": driver(device),
    }


def cpu_name() -> str:
    """处理器的型号；Linux 的 :func:`platform.processor` 通常是空的。"""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def driver(device: torch.device) -> str:
    """设备那一侧的版本：显卡驱动、CUDA、cuDNN、算力、显存；NPU 的 torch_npu 与 CANN。问不到的写明问不到。"""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        card = command_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        runtime = f"HIP {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        return (
            f"驱动 {card}，{runtime}，cuDNN {torch.backends.cudnn.version()}，"
            f"算力 {properties.major}.{properties.minor}，{properties.total_memory / 2**30:.1f} GB，"
            f"共 {torch.cuda.device_count()} 张"
        )
    if device.type == "npu":
        import torch_npu

        version = getattr(torch_npu, "__version__", "问不到")
        home = os.environ.get("ASCEND_TOOLKIT_HOME") or os.environ.get("ASCEND_HOME_PATH")
        return f"torch_npu {version}，CANN {cann_version(home)}，共 {module_of(device).device_count()} 张"
    if device.type == "mps":
        return f"macOS {platform.mac_ver()[0]}"
    return f"指令集 {torch.backends.cpu.get_cpu_capability()}"


def cann_version(home: str | None) -> str:
    """昇腾工具包的版本，写在安装目录的 ``version.cfg`` 或 ``ascend_toolkit_install.info`` 里。"""
    for path in Path(home).rglob("*install.info") if home else ():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith("version="):
                return line.partition("=")[2]
    return "问不到"


def command_line(*words: str) -> str:
    """运行一条查版本的命令，取第一行；没有这条命令、出错、没话说都写“问不到”。"""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "问不到"
    return (done.stdout.splitlines() or ["问不到"])[0].strip() if done.returncode == 0 else "问不到"


def progress_line(number: int, total: int, row: ResultRow) -> str:
    """做完一行说一句。"""
    reason = f"：{row.note}" if row.status in (FAILED, SKIPPED, UNTESTED) and row.note else ""
    return f"[{number:>{len(str(total))}}/{total}] {row.status} {row.group} {row.name}（{row.seconds:.1f} 秒）{reason}"


def print_table(rows: Sequence[ResultRow], where: dict[str, Any], console: Console | None = None) -> None:
    """打印环境与全部的行，数字一个也不截断。"""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console = Console(file=console.file, highlight=False, width=FILE_WIDTH)
    for name, value in where.items():
        console.print(f"{name}：{value}", markup=False)
    table = Table(title="MiniMind 自检", title_justify="left")
    for name in ("组", "项目", ""):
        table.add_column(name, no_wrap=True)
    table.add_column("测到的数与限度", overflow="fold")
    table.add_column("说明", overflow="fold", max_width=28)
    table.add_column("秒", justify="right")
    group = None
    for row in rows:
        if row.group != group and group is not None:
            table.add_section()
        style = STYLES[row.status]
        table.add_row(
            row.group if row.group != group else "",
            row.name,
            f"[{style}]{row.status}[/]",
            "，".join(map(str, row.measures)),
            escape(row.note),
            f"{row.seconds:.1f}" if row.seconds else "",
        )
        group = row.group
    console.print(table)


def verdict(rows: Sequence[ResultRow], where: str) -> str:
    """一句话的结论。"""
    count = Counter(row.status for row in rows)
    failed = [f"{row.group} {row.name}" for row in rows if row.status == FAILED]
    parts = [f"{count[PASSED]} 项通过"]
    if count[SKIPPED]:
        parts.append(f"{count[SKIPPED]} 项不适用")
    if count[UNTESTED]:
        groups = Counter(row.group for row in rows if row.status == UNTESTED)
        names = "、".join(f"{group} {number}" for group, number in groups.items())
        parts.append(f"{count[UNTESTED]} 项未测（时间到：{names}；加大 --minutes 测完）")
    if failed:
        shown = "、".join(failed[:5]) + (" 等" if len(failed) > 5 else "")
        return f"✗ {where}不合格：{len(failed)} 项不对（{shown}），" + "，".join(parts) + "。"
    if not count[PASSED]:
        return f"✗ {where}一项也没有测成：" + "，".join(parts[1:]) + "。"
    return f"✓ {where}合格：" + "，".join(parts) + "。"


def write_json(path: Path, rows: Sequence[ResultRow], where: dict[str, Any], sentence: str) -> None:
    """写出可以附在报告里的 JSON：环境、结论、每一行的数与限度。不是有限数的写成文字，JSON 里没有 NaN。

    Raises:
        UserError: 写不进去。
    """

    def plain(row: ResultRow) -> dict[str, Any]:
        record = asdict(row)
        for measure, source in zip(record["measures"], row.measures):
            value = float(source.value)
            measure["value"] = value if abs(value) < float("inf") else str(value)
            measure["ok"] = source.ok if source.judged else None
        return record

    report = {"verdict": sentence, "environment": where, "rows": [plain(row) for row in rows]}
    text = json.dumps(report, ensure_ascii=False, indent=2, allow_nan=False) + "\n"
    atomic_write(path, lambda file: file.write(text.encode()))
