"""``minimind plan`` 说得准不准：真的照计划跑，比时间与每字节比特数；也重跑拟合用的点。

一条命令::

    python benchmarks/bench_plan.py --runs 2:zh,10:microworld,30:zh      # 三份计划，各跑一遍
    python benchmarks/bench_plan.py --fit 1                              # 重跑拟合的点（约四十分钟），打印留一的核对

``2:zh`` 是两分钟、真实的中文网页文本；``microworld`` 是什么数据也不给，用内置的语料（十分钟以上带微调）。每份计划跑完就添在
结果里，从前跑的留着，没过的也留着。时间差不到一成半、每字节比特数在区间里（机器的快慢变了、步数改过，就按实际的词元数），才算过。
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from common import SHARED, need_file, print_table, result_path, write_result

from minimind.arguments import Arguments, arg, parse_args
from minimind.console import say
from minimind.errors import UserError, guard
from minimind.plan.planning import LENGTH, positions_for
from minimind.plan.quality import TINY, leave_one_out
from minimind.report.logs import read_log

TOLERANCE = 0.15
FIT_TOKENS = {"zh": (250_000, 500_000), "microworld": (250_000, 600_000)}


@dataclass
class PlanBenchArguments(Arguments):
    """照 minimind plan 的计划真的跑，比时间与每字节比特数。"""

    runs: str = arg("2:zh,10:microworld,30:zh", "跑哪几份：分钟数:数据，逗号分隔", text="filled")
    zh_path: str = arg(str(SHARED / "pretrain_zh.jsonl"), "真实的中文文本", text="path")
    out_dir: str = arg("out/bench_plan", "各次的权重与日志", text="path")
    fit: int = arg(0, "1 表示重跑拟合的点，不跑计划", (0, 1))


def minimind(*words: str) -> None:
    """在子进程里跑一条命令，进度照常显示。"""
    code = subprocess.run([sys.executable, "-m", "minimind", *words], env=os.environ).returncode
    if code:
        raise UserError(f"退出码 {code}", where="minimind " + " ".join(words))


def data_flags(args: PlanBenchArguments, data: str) -> list[str]:
    if data not in FIT_TOKENS:
        raise UserError(f"没有数据 {data}", where="--runs", expected="、".join(FIT_TOKENS))
    return ["--data_path", str(need_file(args.zh_path).resolve())] if data == "zh" else []


def run_plan(args: PlanBenchArguments, minutes: float, data: str) -> dict:
    """一份计划：画出来，照着跑，读 plan.json。"""
    folder = Path(args.out_dir).absolute() / f"{minutes:g}-{data}"
    words = ["--minutes", f"{minutes:g}", "--save_dir", str(folder), "--go", "1"]
    minimind("plan", *words, *data_flags(args, data))
    plan = json.loads((folder / "plan.json").read_text("utf-8"))
    actual, stated, measured = plan["actual"], plan["quality"], plan["measured"]
    expected, costs = actual["expected"], plan["costs"]
    interval = {name: [round(one[k], 4) for k in ("low", "middle", "high")] for name, one in
                (("stated", stated), ("expected", expected))}  # fmt: skip
    error = actual["seconds"] / (60 * minutes) - 1
    return {
        "minutes": minutes, "data": data, "preset": plan["preset"],
        "load": round(os.getloadavg()[0], 1),
        "seconds": round(actual["seconds"], 1), "time_error": round(error, 4),
        "stages": [
            {"title": one["title"], "planned_steps": one["steps"], "steps": steps, "tokens": tokens,
             "planned_seconds": round(one["seconds"], 1), "seconds": round(seconds, 1)}
            for one, steps, tokens, seconds in zip(
                plan["stages"], actual["steps"], actual["tokens"], actual["stage_seconds"])
        ],
        "costs": {name: round(value, 4) for name, value in costs.items()},
        "measuring_seconds": round(measured["measuring_seconds"], 1),
        "bpb": round(actual["bpb"], 4), **interval,
        "passed": abs(error) <= TOLERANCE and expected["low"] <= actual["bpb"] <= expected["high"],
    }  # fmt: skip


def refit(args: PlanBenchArguments) -> None:
    """拟合的点：计划会怎么设，就怎么跑，直到学习率降完。"""
    for data, amounts in FIT_TOKENS.items():
        for tokens in amounts:
            positions = positions_for(tokens)
            steps = round(tokens / positions)
            folder = Path(args.out_dir).absolute() / f"fit-{data}-{tokens}"
            words = [
                "--preset",
                "tiny",
                "--max_seq_len",
                str(LENGTH),
                "--batch_size",
                str(positions // LENGTH),
            ]
            words += [
                "--max_steps",
                str(steps),
                "--epochs",
                "100",
                "--eval_interval",
                "0",
                "--val_max_rows",
                "64",
            ]
            words += ["--save_interval", "0", "--sample_prompts", "0", "--save_dir", str(folder)]
            minimind("pretrain", *words, "--checkpoint_dir", str(folder / "ck"), *data_flags(args, data))
            log = read_log(folder / "logs" / "pretrain_192.jsonl")
            bpb = [record["val_bpb"] for record in log if "val_bpb" in record][-1]
            say(f'Trained("{data}", TINY, {steps * positions:_}, {bpb:.4f}, "bench_plan"),')


def show_fit() -> None:
    """每个点都用其余的点预测。"""
    rows = [
        [run.data, "3.6M" if run.parameters == TINY else "1.6M", f"{run.tokens / 1e6:.2f}", f"{run.bpb:.3f}"]
        + [found.words(), "在" if found.low <= run.bpb <= found.high else "不在"]
        for run, found in leave_one_out()
    ]
    print_table("留一：每个点都由其余的点预测", ["数据", "参数", "M 词元", "实际", "预测", "区间里"], rows)


@guard
def main(argv: list[str] | None = None) -> int:
    args = parse_args(PlanBenchArguments, argv, prog="bench_plan")
    if args.fit:
        refit(args)
        show_fit()
        return 0
    device = torch.device("cpu")
    path = result_path("plan", device)
    done = json.loads(path.read_text("utf-8"))["runs"] if path.exists() else []
    for text in args.runs.split(","):
        minutes, _, data = text.strip().partition(":")
        done.append(run_plan(args, float(minutes), data))
        write_result(
            "plan", device, {"tolerance": TOLERANCE, "runs": sorted(done, key=lambda r: r["minutes"])}
        )
    rows = [
        [
            f"{r['minutes']:g} 分钟，{r['data']}",
            f"{r['seconds']:.0f} 秒（{r['time_error']:+.1%}）",
            f"{r['bpb']:.3f}",
        ]
        + [f"{r[k][0]:.3f} 到 {r[k][2]:.3f}" for k in ("stated", "expected")]
        + ["过" if r["passed"] else "没过"]
        for r in done
    ]
    print_table("照计划跑", ["计划", "实际用时", "每字节比特数", "开始时说的", "按实际词元数", ""], rows)
    return 0 if all(run["passed"] for run in done) else 1


if __name__ == "__main__":
    sys.exit(main())
