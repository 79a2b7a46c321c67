"""各阶段基准的图：每条曲线一种颜色，各种子画浅线，平均画粗线。"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from minimind.figures import new_figure, save_figure

# 色弱也分得清的几种（Okabe–Ito）
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")


def draw_curves(
    seeds: Sequence[dict[str, list[list[float]]]],
    path: Path,
    *,
    title: str,
    x: str = "step",
    y: str = "loss",
    log_y: bool = False,
    panels: Sequence[str] = (),
) -> Path:
    """画 ``[{曲线名: [[x, y], …]}, …]``（每个种子一份），存成 PNG。

    标题与坐标的字由调用的给；用 ASCII，没有中文字体的机器也画得出。

    Args:
        panels: 给了就只画这几条，一条一格：单位不同的画在一起看不清。
    """
    names = list(panels) or list(dict.fromkeys(name for seed in seeds for name in seed))
    figure, axes, style = new_figure(len(panels) or 1, 3.6 * len(panels) or 6.4, 2.9 if panels else 3.4)
    for i, (name, color) in enumerate(zip(names, COLORS)):
        axis = axes[i if panels else 0]
        lines = [np.array(seed[name], dtype=float) for seed in seeds if seed.get(name)]
        for line in lines:
            axis.plot(line[:, 0], line[:, 1], color=color, alpha=0.3, linewidth=0.8)
        if lines and all(np.array_equal(line[:, 0], lines[0][:, 0]) for line in lines):
            mean = np.mean([line[:, 1] for line in lines], axis=0)
            label = f"{name} ({len(lines)} seed{'s' * (len(lines) > 1)})"
            axis.plot(lines[0][:, 0], mean, color=color, linewidth=1.8, label=label)
        axis.set(xlabel=x, ylabel="" if panels else y)
        if log_y:
            axis.set_yscale("log")
        axis.legend(frameon=False)
    if panels:
        figure.suptitle(title)
    else:
        axes[0].set(title=title)
    return save_figure(figure, style, path)
