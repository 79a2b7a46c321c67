"""一张卡上的全部目标，一条命令::

    python benchmarks/card.py --minutes 9                       # 有卡的机器；文本在 ../shared/data
    python benchmarks/card.py --device cpu --quick 1            # 没有卡也把每一部分走一遍，尺寸极小，数字没有意义
    python benchmarks/card.py --parts decode_small,rollout      # 只做这几部分，并进已有的结果文件

各部分按要紧的次序做，每部分一个子进程，到了限时就连同它的子孙一起 ``SIGKILL``（我们的进程收到 TERM 会先存盘）。每做完
一部分就写一次结果文件，被杀掉的也留下已经测到的；缺可选的包、没有卡、时间不够，都写明为什么没做，别的照做。

这个文件只用标准库与项目里不带 torch 的几个模块：卡上的环境缺了什么，也能说出缺什么。各部分在 card_parts.py、
card_training.py、card_profile.py、card_decoding.py、card_road.py，目标与最后那张表在 card_table.py。
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from card_table import show

# 借来的卡上没有人安装过这个项目；装着的另一份也不该被量到
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from minimind.arguments import arg, parse_args
from minimind.errors import UserError, guard
from minimind.runtime.files import write_text

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


@dataclass(frozen=True)
class Part:
    """一部分。

    name: 结果里的键，也是 ``--parts`` 认的名字；module: 函数 ``name`` 所在的模块。
    limit: 至多多少秒（``--minutes 9`` 时）；least: 剩下不到这么多秒就不开始。
    """

    name: str
    title: str
    module: str
    limit: float
    least: float = 8.0


# 按要紧的次序；最后的真实文本用剩下的时间
PARTS = (
    Part("environment", "机器与版本", "card_parts", 30, 0),
    Part("matmul", "矩阵乘的峰值", "card_parts", 20),
    Part("cuda_tests", "pytest -m cuda", "card_parts", 90),
    Part("selftest", "minimind selftest", "card_parts", 75),
    Part("train_small", "训练 small", "card_training", 45),
    Part("train_base", "训练 base", "card_training", 50),
    Part("train_moe", "训练 moe，对同激活参数的稠密模型", "card_training", 60),
    Part("decode_small", "解码 small", "card_decoding", 50),
    Part("loop", "训练循环对光步子", "card_training", 55),
    Part("auto", "--use_compile auto，与收到信号多久退出", "card_training", 80),
    Part("decode_base", "解码 base", "card_decoding", 45),
    Part("decode_moe", "解码 moe", "card_decoding", 20),
    Part("prompts", "读提示 8 × 512", "card_decoding", 15),
    Part("rollout", "采样对 generate", "card_decoding", 30),
    Part("grpo_step", "GRPO 一步对 TRL", "card_parts", 40),
    Part("server", "服务，64 路流式", "card_parts", 35),
    Part("profile", "base 一步的时间去向", "card_profile", 35),
    Part("road", "真实文本：预训练接微调，对公开做法", "card_road", 3600, 20),
)
ROAD_SHARE = 0.25  # 留给真实文本的时间至少占这么多


@dataclass
class CardArguments:
    """一张卡上的全部目标：一张表，一个 JSON。"""

    minutes: float = arg(9.0, "一共至多多少分钟", above=0)
    device: str = arg("auto", "设备：auto、cpu、cuda:0")
    data_dir: str = arg(str(ROOT / ".." / "shared" / "data"), "真实文本所在的目录")
    quick: int = arg(0, "1 表示每一部分都用极小的尺寸走一遍，只为查出写错的地方", (0, 1))
    parts: str = arg("", f"只做这几部分，逗号分隔：{','.join(p.name for p in PARTS[1:])}；不给则全部")
    results: str = arg(str(HERE / "results"), "结果 JSON 写到哪个目录")
    run_dir: str = arg(str(ROOT / "out" / "card"), "权重、日志与各部分的输出放在哪里")


def chosen_parts(names: str) -> list[Part]:
    """``--parts`` 里的各部分，按表里的次序；机器与版本总要做。

    Raises:
        UserError: 有不认识的名字。
    """
    wanted = {name.strip() for name in names.split(",") if name.strip()}
    unknown = sorted(wanted - {part.name for part in PARTS})
    if unknown:
        raise UserError(
            f"没有叫 {'、'.join(unknown)} 的部分",
            where="--parts",
            expected="、".join(part.name for part in PARTS),
        )
    return [part for part in PARTS if not wanted or part.name in wanted or part.name == "environment"]


# ---------------------------------------------------------------- 子进程


def child_environment(quick: bool) -> dict[str, str]:
    """子进程用这一份代码；没有装 rich 时用 standin 里的替身（只会打印），不为一个画表的包白跑一趟。

    ``quick`` 时 CPU 上一个线程：极小的矩阵分给几个线程，等的比算的久。
    """
    paths = [str(ROOT), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    if find_spec("rich") is None:
        paths.append(str(HERE / "standin"))
    threads = {"OMP_NUM_THREADS": "1"} if quick else {}
    return threads | {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def descendants(pid: int) -> list[int]:
    """``pid`` 与它现有的全部子孙（自己另开会话的也在内），子孙在前；不是 Linux 就只有它自己。"""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
        except (OSError, IndexError, ValueError):  # 刚好退出了
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found[::-1]


def kill_hard(process: subprocess.Popen) -> None:
    """连同子孙、会话里剩下的，一起 SIGKILL。"""
    for pid in descendants(process.pid) if process.returncode is None else ():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_part(args: CardArguments, part: Part, seconds: float) -> dict[str, Any]:
    """在子进程里做一部分，至多 ``seconds`` 秒；返回测到的（被杀掉时是已经测到的），加上 ``status`` 与 ``seconds``。"""
    folder = Path(args.run_dir) / "parts"
    folder.mkdir(parents=True, exist_ok=True)
    notes, log = folder / f"{part.name}.json", folder / f"{part.name}.log"
    notes.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / "card_parts.py"), part.module, part.name, str(notes)]
    command += [json.dumps({**asdict(args), "seconds": seconds})]
    start = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=child_environment(bool(args.quick)),
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            kill_hard(process)  # 自己结束的也清一遍：会话里不该再有谁
    result: dict[str, Any] = json.loads(notes.read_text(encoding="utf-8")) if notes.exists() else {}
    result["seconds"] = round(time.monotonic() - start, 1)
    if code is None:
        result["status"] = f"到了限时（{seconds:.0f} 秒）被杀掉，只有已经测到的"
    elif code and "status" not in result:
        lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
        result["status"] = f"出错（退出码 {code}）：{' '.join(lines[-3:])[-400:]}"
    return {"status": result.pop("status", "做完"), **result}


# ---------------------------------------------------------------- 全程


def result_file(args: CardArguments, environment: dict[str, Any]) -> Path:
    """``card-<卡的名字>.json``；quick 的另存，免得盖掉真的。"""
    name = environment.get("slug", "unknown")
    return Path(args.results) / f"card-{'quick-' if args.quick else ''}{name}.json"


def measure(args: CardArguments) -> tuple[dict[str, Any], Path]:
    """按次序做各部分，每做完一部分写一次结果文件。"""
    parts, start, total = chosen_parts(args.parts), time.monotonic(), 60 * args.minutes
    scale = args.minutes / 9
    results: dict[str, Any] = {}
    path = Path(args.results)
    for number, part in enumerate(parts):
        left = total - (time.monotonic() - start)
        reserved = ROAD_SHARE * total if parts[-1].name == "road" and part is not parts[-1] else 0.0
        seconds = min(max(part.limit, part.limit * scale), left - (reserved if number else 0))
        if args.quick or part.name == "environment":
            seconds = max(part.limit, 120)  # 只为走通，不赶时间
        if seconds < part.least:
            results[part.name] = {"status": f"时间不够，没有做（还剩 {max(left, 0):.0f} 秒）"}
        else:
            print(f"[{number + 1}/{len(parts)}] {part.title} …", file=sys.stderr, flush=True)
            results[part.name] = run_part(args, part, seconds)
            print(
                f"    {results[part.name]['status']}（{results[part.name]['seconds']} 秒）", file=sys.stderr
            )
        if part.name == "environment":
            path = result_file(args, results["environment"])
            if args.parts and path.exists():  # 并进已有的
                results = json.loads(path.read_text(encoding="utf-8"))["parts"] | results
        write_result(args, path, results)
    return results, path


def write_result(args: CardArguments, path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    ordered = {part.name: results[part.name] for part in PARTS if part.name in results}
    arguments = {"minutes": args.minutes, "device": args.device, "quick": args.quick}
    payload = {"arguments": arguments, "parts": ordered}
    write_text(path, json.dumps(payload, ensure_ascii=False, indent=1) + "\n")


@guard
def main(argv: list[str] | None = None) -> int:
    """命令行入口。"""
    args = parse_args(CardArguments, argv, prog="card")
    # 默认的 SIGTERM 当场就死，来不及收掉正在做的那一部分
    signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))
    results, path = measure(args)
    show(results, PARTS)
    print(f"结果写在 {path}；各部分的输出在 {Path(args.run_dir) / 'parts'}。")
    return 0


if __name__ == "__main__":
    sys.exit(main())
