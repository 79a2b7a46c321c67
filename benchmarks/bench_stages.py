"""各阶段有没有做到它该做的：同一个底座、几个种子，训练，用留出的题目考，前后对照。

一条命令::

    python benchmarks/bench_stages.py --stage lora --seeds 3 --base DIR

``DIR`` 里要有 ``{pretrain,full_sft}_<宽度>.pth`` 与它们的旁注，以及 ``microworld/``；``minimind demo`` 留下的
``out/demo`` 就是这样的目录。表里是各指标底座的值、训练后的平均（最小，最大）、差，以及有没有达到目标；
``results/stage-<阶段>-….json`` 里有每个种子的全部数字与曲线。

加一个阶段：在 ``benchmarks/stages/`` 放一个同名文件，写 ``TITLE``、``GOALS`` 与 ``run(bench, seed) -> Outcome``，
底座的成绩用可选的 ``before(bench) -> dict`` 给出（只算一次）；``--figure`` 画 ``Outcome.curves``，可选的
``FIGURE = {"title", "x", "y", "log_y"}`` 说怎么画。见 stages/lora.py。
"""

from __future__ import annotations

import importlib
import multiprocessing
import shutil
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from common import print_table, write_result
from stage_figure import draw_curves

from minimind.arguments import arg, parse_args
from minimind.console import format_duration, say
from minimind.errors import UserError, guard
from minimind.paths import resolve_path

STAGES = Path(__file__).resolve().parent / "stages"


@dataclass
class StageArguments:
    """各阶段的效果：训练几个种子，考留出的题目，前后对照。"""

    stage: str = arg("lora", "哪个阶段：benchmarks/stages 下的文件名")
    seeds: int = arg(3, "种子个数，从 1 起")
    base: str = arg("out/demo", "底座所在的目录：权重、旁注与 microworld/")
    work_dir: str = arg("out/bench_stages", "训练产物的目录")
    steps: int = arg(0, "强化学习三段各走几步；0 表示 30")
    items_per_task: int = arg(0, "每个任务至多考几题；0 表示全部")
    threads: int = arg(0, "CPU 线程数；0 表示按环境")
    jobs: int = arg(1, "同时跑几个种子，各用一个进程")
    device: str = arg("auto", "设备")
    dtype: str = arg("auto", "训练精度")
    name: str = arg("", "结果文件名的后缀")
    figure: str | None = arg(None, "把各种子的曲线画到这个 PNG")


@dataclass
class Outcome:
    """一个种子的结果。

    Args:
        metrics: 指标名 → 数；比例用 0 到 1。
        curves: 曲线名 → ``[[x, y], …]``。
        notes: 不求平均的说明，如学习率、样例回答。
    """

    metrics: dict[str, float]
    curves: dict[str, list[list[float]]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Goal:
    """一个指标与它的目标。

    Args:
        metric: 指标名；``before`` 里有同名的就报出前后之差。
        title: 中文名。
        at_least, at_most: 各种子的平均要达到的值；都不写就只报告。
        change: 真表示目标说的是与底座之差。
        percent: 按百分数显示（差按百分点）。
    """

    metric: str
    title: str
    at_least: float | None = None
    at_most: float | None = None
    change: bool = False
    percent: bool = True


class Bench:
    """一次基准的家当：底座、题目、训练产物放在哪里。"""

    def __init__(self, args: StageArguments):
        self.args = args
        self.base = resolve_path(args.base)
        self.world = self.base / "microworld"
        for path in (self.world / "eval.jsonl", *self._sidecars()):
            if not path.is_file():
                raise UserError(
                    "底座目录不完整",
                    where=str(path),
                    expected="权重、旁注与 microworld/",
                    fix="先运行 minimind demo，再用 --base out/demo",
                )
        self.work = resolve_path(args.work_dir) / args.stage

    def _sidecars(self) -> list[Path]:
        return sorted(self.base.glob("full_sft_*.json")) or [self.base / "full_sft_….json"]

    def sizes(self) -> dict[str, Any]:
        """底座的尺寸，即训练参数里的那几项。"""
        from minimind.runtime.checkpoint import read_sidecar

        config = read_sidecar(self._sidecars()[0].with_suffix(".pth"))["config"]
        from minimind.model import PRESETS

        for name, preset in PRESETS.items():
            if all(config[key] == value for key, value in {"use_moe": False, **preset}.items()):
                return {"preset": name, "arch": config["arch"]}
        return {key: config[key] for key in ("hidden_size", "num_hidden_layers", "arch")} | {
            "use_moe": int(config["use_moe"])
        }

    def folder(self, seed: int, variant: str = "") -> Path:
        """这个种子的产物目录，里面已放好底座的权重；``variant`` 区分同一种子的几次训练。"""
        folder = self.work / f"seed{seed}{variant and '-' + variant}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for path in [*self.base.glob("*.pth"), *self.base.glob("*.json")]:
            shutil.copy(path, folder)
        return folder

    def common(self, seed: int, folder: Path, stage: str) -> dict[str, Any]:
        """训练参数里与阶段无关的：尺寸、数据、输出、设备；不在中途存盘。"""
        return {
            **self.sizes(),
            "data_path": str(self.world / f"{stage}.jsonl"),
            "val_path": str(self.world / f"{stage}_heldout.jsonl"),
            "save_dir": str(folder),
            "checkpoint_dir": str(folder / "checkpoints"),
            "save_interval": 0,
            "device": self.args.device,
            "dtype": self.args.dtype,
            "seed": seed,
        }

    def items(self, *levels: str, skip: tuple[str, ...] = ()) -> list[dict[str, Any]]:
        """留出的对话题：``easy``、``hard``、``lora`` 中的几种，去掉 ``skip`` 里的任务。"""
        from minimind.evaluate.microworld import read_items

        seen: dict[str, int] = {}
        chosen = []
        for item in read_items(self.world / "eval.jsonl"):
            if item["kind"] == "chat" and item["level"] in levels and item["task"] not in skip:
                seen[item["task"]] = seen.get(item["task"], 0) + 1
                if not self.args.items_per_task or seen[item["task"]] <= self.args.items_per_task:
                    chosen.append(item)
        return chosen

    def open(self, folder: Path, weight: str, **options: Any):
        """打开训练好的权重，返回 :class:`minimind.inference.loading.Loaded`。"""
        from minimind.inference.loading import load_for_inference

        return load_for_inference(save_dir=str(folder), weight=weight, device=self.args.device, **options)

    def loss_curve(self, log: Path) -> list[list[float]]:
        """训练日志里的 ``[[步, 损失], …]``。"""
        from minimind.report.logs import read_log

        return [[row["step"], round(row["loss"], 4)] for row in read_log(log) if "loss" in row]


def stage_names() -> list[str]:
    return sorted(path.stem for path in STAGES.glob("*.py") if not path.stem.startswith("_"))


def load_stage(name: str) -> ModuleType:
    """``stages/{name}.py``。"""
    if name not in stage_names():
        raise UserError(f"没有阶段 {name}", where="--stage", expected="、".join(stage_names()))
    return importlib.import_module(f"stages.{name}")


def check(goal: Goal, before: float | None, mean: float) -> str:
    """目标的写法与达到与否；没有目标是空串。"""
    value = mean - before if goal.change else mean
    for bound, sign, met in (
        (goal.at_least, "≥", goal.at_least is not None and value >= goal.at_least),
        (goal.at_most, "≤", goal.at_most is not None and value <= goal.at_most),
    ):
        if bound is not None:
            return f"{'差 ' if goal.change else ''}{sign} {show(bound, goal)} {'达到' if met else '未达到'}"
    return ""


def show(value: float, goal: Goal, signed: bool = False) -> str:
    number = (
        f"{100 * value:{'+' if signed else ''}.1f}" if goal.percent else f"{value:{'+' if signed else ''}.3g}"
    )
    return number + (" %" if goal.percent and not signed else "")


def table_rows(stage: ModuleType, before: dict[str, float], outcomes: list[Outcome]) -> list[list[str]]:
    """每个目标一行：指标、底座、平均（最小，最大）、差、目标。"""
    rows = []
    for goal in stage.GOALS:
        values = [outcome.metrics[goal.metric] for outcome in outcomes]
        start, mean = before.get(goal.metric), statistics.fmean(values)
        spread = f"（{show(min(values), goal)}，{show(max(values), goal)}）"
        rows.append(
            [
                goal.title,
                "" if start is None else show(start, goal),
                show(mean, goal) + spread,
                "" if start is None else show(mean - start, goal, signed=True),
                check(goal, start, mean),
            ]
        )
    return rows


def run_seed(args: StageArguments, seed: int) -> tuple[Outcome, float]:
    """一个种子的结果与用时（秒）。"""
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    say(f"阶段 {args.stage}，种子 {seed}/{args.seeds}。")
    start = time.perf_counter()
    outcome = load_stage(args.stage).run(Bench(args), seed)
    return outcome, round(time.perf_counter() - start, 1)


def run_seeds(args: StageArguments) -> tuple[list[Outcome], list[float]]:
    """全部种子，次序固定；``--jobs`` 大于 1 时几个进程同时跑。"""
    seeds = range(1, args.seeds + 1)
    if args.jobs == 1:
        results = [run_seed(args, seed) for seed in seeds]
    else:
        with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
            results = list(pool.map(_run_seed_in_child, [args] * len(seeds), seeds))
    return [outcome for outcome, _ in results], [seconds for _, seconds in results]


def _run_seed_in_child(args: StageArguments, seed: int) -> tuple[Outcome, float]:
    # 子进程里这个模块叫 __mp_main__，阶段文件 import 的 bench_stages 是另一份；结果用后者的类，父进程才认得
    return importlib.import_module("bench_stages").run_seed(args, seed)


@guard
def main(argv: list[str] | None = None) -> None:
    """命令行入口。"""
    import torch

    from minimind.runtime.device import resolve_device

    args = parse_args(StageArguments, argv)
    stage = load_stage(args.stage)
    if args.threads:
        torch.set_num_threads(args.threads)
    bench, device = Bench(args), resolve_device(args.device)
    before = stage.before(bench) if hasattr(stage, "before") else {}
    outcomes, seconds = run_seeds(args)
    rows = table_rows(stage, before, outcomes)
    columns = ["指标", "底座", "训练后：平均（最小，最大）", "差（百分点）", "目标"]
    caption = f"{args.seeds} 个种子；每个种子训练加评测 {'、'.join(format_duration(s) for s in seconds)}"
    print_table(stage.TITLE, columns, rows, caption)
    path = write_result(
        f"stage-{args.stage}{args.name and '-' + args.name}",
        device,
        {
            "arguments": asdict(args),
            "before": before,
            "seeds": [asdict(outcome) for outcome in outcomes],
            "seconds": seconds,
            "table": [dict(zip(columns, row)) for row in rows],
        },
    )
    say(f"结果写在 {path}")
    if args.figure:
        options = {"title": args.stage, **getattr(stage, "FIGURE", {})}
        say(
            f"曲线 {draw_curves([outcome.curves for outcome in outcomes], resolve_path(args.figure), **options)}"
        )


if __name__ == "__main__":
    # 阶段文件里 import bench_stages 得到的要是这同一个模块
    sys.modules["bench_stages"] = sys.modules["__main__"]
    raise SystemExit(main())
