"""把 PPO、GRPO、SPO 的效果基准画在一张图上，并两两比较：``python benchmarks/plot_rl.py``，图写到 docs/images/rl.png。

数据是 ``bench_stages.py --stage ppo / grpo / spo`` 写下的结果；左边是留出题上贪心作答的得分，右边是采样的平均奖励，
横轴都是采样的条数；细线是各个种子，粗线是平均。比较的是各种子平均之差与它的标准误（两边的种子各自独立）。
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

from minimind.report.curves import _new_figure as new_figure
from minimind.report.curves import _save as save_figure
from minimind.report.curves import labeler

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# 色弱也分得清的三种（Okabe–Ito）
COLORS = {"ppo": "#D55E00", "grpo": "#0072B2", "spo": "#009E73"}
SMOOTH = 5  # 采样的奖励逐步跳动，取滑动平均


def read_result(stage: str) -> dict:
    """最近一次这个阶段的结果。"""
    paths = sorted(RESULTS.glob(f"stage-{stage}-*.json"), key=lambda path: path.stat().st_mtime)
    if not paths:
        sys.exit(f"没有 {RESULTS}/stage-{stage}-*.json，先运行 bench_stages.py --stage {stage}")
    return json.loads(paths[-1].read_text("utf-8"))


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


def compare(ours: str, theirs: str) -> None:
    """打印 ``ours`` 比 ``theirs`` 高多少个百分点。"""
    results = [read_result(stage) for stage in (ours, theirs)]
    counts = "、".join(f"{len(result['seeds'])}" for result in results)
    for metric, title in (("solved", "贪心答对"), ("reward", "采样得分")):
        values = [[100 * seed["metrics"][metric] for seed in result["seeds"]] for result in results]
        gap, error = difference(*values)
        means = "，".join(
            f"{stage.upper()} {statistics.fmean(v):.1f}" for stage, v in zip((ours, theirs), values)
        )
        print(f"{title}：{means}，差 {gap:+.1f} ± {error:.1f} 个百分点（标准误；种子 {counts} 个）")


def main() -> None:
    label = labeler()
    figure, axes, style = new_figure(2, 9.0, 3.6)
    for stage, color in COLORS.items():
        result = read_result(stage)
        for axis, name in zip(axes, ("val_reward", "reward")):
            lines = curves(result, name)
            for line in lines:
                axis.plot(*zip(*line), color=color, linewidth=0.7, alpha=0.4)
            mean = [[points[0][0], statistics.fmean(y for _, y in points)] for points in zip(*lines)]
            axis.plot(*zip(*mean), color=color, linewidth=2, label=stage.upper())
    titles = (("留出题：贪心作答的得分", "held-out score, greedy"), ("采样的平均奖励", "sampled reward"))
    for axis, title in zip(axes, titles):
        axis.set(title=label(*title), xlabel=label("采样的回答数", "responses sampled"))
    axes[0].legend(frameon=False, loc="lower right")
    print(save_figure(figure, style, ROOT / "docs" / "images" / "rl.png"))
    for ours, theirs in (("spo", "grpo"), ("ppo", "grpo")):
        compare(ours, theirs)


if __name__ == "__main__":
    main()
