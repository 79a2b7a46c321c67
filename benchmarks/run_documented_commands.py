"""文档里的训练命令：原样在一份干净的拷贝里运行，看它事先说要多久、能不能走到头。

    python benchmarks/run_documented_commands.py                    # 报出预计用时就停（SIGTERM），下一条接着用它的权重
    python benchmarks/run_documented_commands.py --to_the_end       # 每条都走到头
    python benchmarks/run_documented_commands.py --max_steps 3      # 只看通不通：走几步，正常结束
    python benchmarks/run_documented_commands.py --weights ../out --only dpo,grpo   # 起点权重从别处拷
    python benchmarks/run_documented_commands.py --page docs/minimind3.md           # 一页文档的全部命令，在 minimind-3 的替身上

拷贝用 ``git archive``，只有提交过的文件：没有 dataset/ 下的数据，各命令都用内置的微世界语料。
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import print_table, write_result
from documented_page import run_page

ROOT = Path(__file__).resolve().parents[1]
# 名字 → (命令, 产出的权重)；顺序即依赖，后面的从前面的权重开始
COMMANDS = {
    "pretrain": ("trainer/train_pretrain.py --epochs 1 --batch_size 32", "pretrain_*.pth"),
    "full_sft": ("trainer/train_full_sft.py --epochs 2 --batch_size 16", "full_sft_*.pth"),
    "lora": ("trainer/train_lora.py --epochs 50 --batch_size 32", "lora/lora_identity_*.pth"),
    "dpo": ("trainer/train_dpo.py --epochs 1 --batch_size 4", "dpo_*.pth"),
    "ppo": ("trainer/train_ppo.py --epochs 1 --batch_size 2", "ppo_actor_*.pth"),
    "grpo": ("trainer/train_grpo.py --epochs 1 --batch_size 2", "grpo_*.pth"),
    "spo": ("trainer/train_spo.py --epochs 1 --batch_size 2", "spo_*.pth"),
    "distillation": ("trainer/train_distillation.py --epochs 6 --batch_size 32", "full_dist_*.pth"),
    "reason": ("trainer/train_reason.py --epochs 1 --batch_size 8", "reason_*.pth"),
    "torchrun": (
        "-m torch.distributed.run --nproc_per_node 4 trainer/train_pretrain.py --epochs 1 --batch_size 32",
        "pretrain_*.pth",
    ),
}
ANNOUNCED = re.compile(r"本次全程约 (.+?)（")
UNITS = {"小时": 3600, "分": 60, "秒": 1}


def seconds_of(words: str) -> int:
    """``1 小时 05 分`` → 3900。"""
    return sum(int(n) * UNITS[unit] for n, unit in re.findall(r"(\d+) (小时|分|秒)", words))


def fresh_copy(folder: Path, weights: str | None) -> Path:
    """提交过的文件；``weights`` 里的 .pth 与旁注放进 out/。"""
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True)
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    if weights:
        (folder / "out").mkdir()
        for path in Path(weights).glob("*_*.*"):
            shutil.copy(path, folder / "out")
    return folder


def run_one(name: str, home: Path, args: argparse.Namespace) -> dict:
    """运行一条，返回退出码、报出的用时、实际用时与结局。"""
    command, weights = COMMANDS[name]
    words, cwd = command.split(), home
    if args.inside:  # cd trainer && python train_x.py
        words = [word.removeprefix("trainer/") for word in words]
        cwd = home / "trainer"
    extra = args.extra.split() + (["--max_steps", str(args.max_steps)] if args.max_steps else [])
    before = {path: path.stat().st_mtime for path in (home / "out").glob(weights)}
    start, announced = time.monotonic(), None
    process = subprocess.Popen(
        [sys.executable, *words, *extra],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    timer = threading.Timer(args.limit, os.killpg, (process.pid, signal.SIGTERM))
    timer.daemon = True  # 中途 Ctrl-C 时不必等它
    timer.start()
    tail: list[str] = []
    try:
        for line in process.stdout:
            tail = [*tail[-30:], line.rstrip()]
            if args.verbose:
                print(f"[{name}] {line}", end="", flush=True)
            if announced is None and (found := ANNOUNCED.search(line)):
                announced = seconds_of(found[1])
                told_after = time.monotonic() - start
                if not (args.to_the_end or args.max_steps):
                    os.killpg(process.pid, signal.SIGTERM)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    _, status, usage = os.wait4(process.pid, 0)
    code = process.returncode = os.waitstatus_to_exitcode(status)
    timer.cancel()
    wall, cpu = time.monotonic() - start, usage.ru_utime + usage.ru_stime
    written = [p for p in (home / "out").glob(weights) if p.stat().st_mtime > before.get(p, 0)]
    result = {
        "command": command,
        "exit_code": code,
        "announced_s": announced,
        "announced_after_s": None if announced is None else round(told_after, 1),
        "wall_s": round(wall, 1),
        "cpu_s": round(cpu, 1),
        "threads": torch.get_num_threads(),
        "weights_written": bool(written),
        "finished": any("训练完成" in line for line in tail),
    }
    stopped_by_us = announced is not None and code in (143, -signal.SIGTERM, 1) and not args.to_the_end
    if not written or not (code == 0 or stopped_by_us):
        print("\n".join([f"[{name}] 退出码 {code}，最后几行：", *tail[-12:]]))
    return result


def run_minimind3(page: Path) -> None:
    """一页文档里的命令，在公共 minimind-3 的替身（``tests/public_minimind3.py``）上依次运行；有一条不成就以 1 退出。"""
    sys.path.insert(0, str(ROOT / "tests"))
    from public_minimind3 import Hub, lay_out

    with tempfile.TemporaryDirectory() as folder:
        home = fresh_copy(Path(folder), None)
        with Hub(lay_out(home, layers=8)) as hub:
            results = run_page(ROOT / page, home, hub.url)
    failed = [result["command"] for result in results if result["exit_code"]]
    print(f"{page}：{len(results)} 条，{len(failed)} 条没有成")
    sys.exit(int(bool(failed)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(COMMANDS), help="只运行这几条，逗号分隔")
    parser.add_argument("--inside", action="store_true", help="从 trainer/ 里运行")
    parser.add_argument("--to_the_end", action="store_true", help="走到头，而不是报出用时就停")
    parser.add_argument("--max_steps", type=int, default=0, help="加上 --max_steps，只看通不通")
    parser.add_argument("--extra", default="", help="加在每条后面的参数，例如 '--preset tiny'")
    parser.add_argument("--weights", help="起点权重所在的目录；不给则依次训练出来")
    parser.add_argument("--limit", type=float, default=3600, help="一条最多运行多少秒")
    parser.add_argument("--verbose", action="store_true", help="把各命令的输出也打印出来")
    parser.add_argument("--no_save", action="store_true", help="不写结果文件")
    parser.add_argument("--page", type=Path, help="不跑上面那些，跑这一页文档里的，例如 docs/minimind3.md")
    args = parser.parse_args()
    if args.page:
        run_minimind3(args.page)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        home = fresh_copy(Path(folder), args.weights)
        for name in args.only.split(","):
            results[name] = run_one(name, home, args)
            print(json.dumps({name: results[name]}, ensure_ascii=False), flush=True)
    rows = [
        (
            f"python {r['command']}",
            r["exit_code"],
            "没有说" if r["announced_s"] is None else f"{r['announced_s'] / 60:.1f} 分",
            "" if r["announced_after_s"] is None else f"{r['announced_after_s']:.0f} 秒",
            f"{r['wall_s']:.0f} 秒",
            f"{r['cpu_s'] / r['wall_s']:.0%}",
            "是" if r["weights_written"] else "否",
        )
        for r in results.values()
    ]
    columns = ("命令", "退出码", "事先说要", "开始后多久说", "本次运行", "处理器占用", "写出权重")
    caption = "处理器占用低于线程数的，是机器被别的进程占着：独占时约为“事先说要”乘以占用 ÷ 线程数"
    print_table("文档里的训练命令", columns, rows, caption)
    if not args.no_save:
        mode = "to_the_end" if args.to_the_end else "announced" if not args.max_steps else "few_steps"
        print(write_result(f"documented_commands_{mode}", torch.device("cpu"), {"results": results}))


if __name__ == "__main__":
    main()
