"""把 PPO、GRPO、SPO 的效果基准画在一张图上，并两两比较：``python benchmarks/plot_rl.py``，图写到 docs/images/rl.png。

数据是 ``bench_stages.py --stage ppo / grpo / spo`` 写下的结果；左边是留出题上贪心作答的得分，右边是采样的平均奖励，
横轴都是采样的条数；细线是各个种子，粗线是平均。比较的是各种子平均之差与它的标准误（两边的种子各自独立）。
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from minimind.arguments import arg, parse_args
from minimind.errors import guard
from minimind.figures import labeler, new_figure, save_figure

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# 色弱也分得清的三种（Okabe–Ito）
COLORS = {"ppo": "#D55E00", "grpo": "#0072B2", "spo": "#009E73"}
SMOOTH = 5  # 采样的奖励逐步跳动，取滑动平均


@dataclass
class PlotArguments:
    """PPO、GRPO、SPO 的曲线画在一张图上，并比较高下。"""

    name: str = arg("", "结果文件名的后缀，即 bench_stages.py 的 --name")
    figure: str = arg("docs/images/rl.png", "图存到哪里；空串不画")


def read_results(name: str) -> dict[str, dict]:
    """阶段 → 结果；没有跑过的不在其中，几种设备都跑过时取最近的。"""
    results = {}
    for stage in COLORS:
        paths = sorted(RESULTS.glob(f"stage-{stage}-*.json"), key=lambda path: path.stat().st_mtime)
        for path in paths:
            result = json.loads(path.read_text("utf-8"))
            if result["arguments"]["name"] == name:
                results[stage] = result
    if not results:
        sys.exit(f"{RESULTS} 里没有这样的结果，先运行 bench_stages.py --stage {'、'.join(COLORS)}")
    return results


def curves(result: dict, name: str) -> list[list[list[float]]]:
    """各个种子的曲线；留出题的曲线从底座的成绩画起。"""
    lines = [seed["curves"][name] for seed in result["seeds"]]
    if name == "val_reward":
        return [[[0, result["before"]["solved"]], *line] for line in lines]
    return [smooth(line) for line in lines]


def smooth(line: list[list[float]]) -> list[list[float]]:
    values = [value for _, value in line]
    return [[x, statistics.fmean(values[max(0, i + 1 - SMOOTH) : i + 1])] for i, (x, _) in enumerate(line)]


def difference(ours: list[float], theirs: list[float]) -> tuple[float, float]:
    """平均之差与它的标准误（Welch：两边的方差不必相同）；每边至少两个数。"""
    error = sum(statistics.variance(values) / len(values) for values in (ours, theirs)) ** 0.5
    return statistics.fmean(ours) - statistics.fmean(theirs), error


def compare(results: dict[str, dict], ours: str, theirs: str) -> None:
    """打印 ``ours`` 比 ``theirs`` 高多少个百分点。"""
    for metric, title in (("solved", "贪心答对"), ("reward", "采样得分")):
        values = [
            [100 * seed["metrics"][metric] for seed in results[stage]["seeds"]] for stage in (ours, theirs)
        ]
        gap, error = difference(*values)
        means = "，".join(
            f"{stage.upper()} {statistics.fmean(one):.1f}（{min(one):.1f}，{max(one):.1f}；{len(one)} 个种子）"
            for stage, one in zip((ours, theirs), values)
        )
        print(f"{title}：{means}，差 {gap:+.2f} ± {error:.2f} 个百分点（标准误）")


def draw(results: dict[str, dict], path: Path) -> Path:
    """左边留出题上贪心作答的得分，右边采样的平均奖励。"""
    label = labeler()
    figure, axes, style = new_figure(2, 9.0, 3.6)
    for stage, result in results.items():
        for axis, name in zip(axes, ("val_reward", "reward")):
            lines = curves(result, name)
            for line in lines:
                axis.plot(*zip(*line), color=COLORS[stage], linewidth=0.7, alpha=0.4)
            mean = [[points[0][0], statistics.fmean(y for _, y in points)] for points in zip(*lines)]
            axis.plot(*zip(*mean), color=COLORS[stage], linewidth=2, label=stage.upper())
    titles = (("留出题：贪心作答的得分", "held-out score, greedy"), ("采样的平均奖励", "sampled reward"))
    for axis, title in zip(axes, titles):
        axis.set(title=label(*title), xlabel=label("采样的回答数", "responses sampled"))
    axes[0].legend(frameon=False, loc="lower right")
    return save_figure(figure, style, path)


@guard
def main(argv: list[str] | None = None) -> None:
    args = parse_args(PlotArguments, argv)
    results = read_results(args.name)
    if args.figure:
        print(draw(results, ROOT / args.figure))
    for ours in ("spo", "ppo"):
        if all(len(results.get(stage, {}).get("seeds", ())) > 1 for stage in (ours, "grpo")):
            compare(results, ours, "grpo")


if __name__ == "__main__":
    raise SystemExit(main())
