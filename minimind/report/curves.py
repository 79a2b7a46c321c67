"""曲线图：用 matplotlib 的对象接口画 PNG，不碰全局状态，不需要显示器。"""

from __future__ import annotations

from pathlib import Path

from minimind.figures import BLUE, COLORS, ORANGE, labeler, new_figure, save_figure
from minimind.report.logs import series
from minimind.trainer.exhibits import number

# 一个阶段画哪几格：日志里有第一个键的那一行；每格 (键, 中文, English)，没有的键不画
PANELS = (
    (
        ("reward", "奖励（采样）", "reward (sampled)"),
        ("val_reward", "留出题得分（贪心）", "held-out score (greedy)"),
        ("response_length", "回答长度（词元）", "response length (tokens)"),
        ("entropy", "熵（nat / 词元）", "entropy (nat / token)"),
    ),
    (
        ("margin", "好坏之差（β·h）", "reward margin"),
        ("accuracy", "分得清好坏的比例", "preference accuracy"),
        ("loss", "训练损失", "train loss"),
    ),
    (
        ("loss", "训练损失（nat / 词元）", "train loss (nat / token)"),
        ("val_bpb", "验证：每字节比特", "validation bits per byte"),
        ("val_loss", "验证损失", "validation loss"),
    ),
)


def choose_panels(logs: dict[str, list[dict]]) -> list[tuple[str, str, str]]:
    """按日志里有哪些字段选要画的几格；有每字节比特就不画验证损失。"""
    keys = {
        key
        for records in logs.values()
        for record in records
        for key, value in record.items()
        if number(value) is not None
    }
    panels = next((row for row in PANELS if row[0][0] in keys), ())
    found = [panel for panel in panels if panel[0] in keys]
    return [panel for panel in found if panel[0] != "val_loss" or "val_bpb" not in keys]


def plot_stage(records: list[dict] | dict[str, list[dict]], title: str, path: str | Path) -> Path | None:
    """一个阶段的曲线：语言模型画损失与验证，偏好画优势与准确率，强化学习画奖励、留出得分、长度与熵。

    Args:
        records: :func:`minimind.report.logs.read_log` 的结果；几份日志比较时是 ``{名字: 记录}``。
        title: 图题；它与名字里有中文的话，调用的人先看有没有中文字体（:func:`minimind.figures.labeler`）。
        path: PNG 路径。

    Returns:
        写好的路径；日志里没有任何可画的时返回 ``None``，不留空图。
    """
    logs = records if isinstance(records, dict) else {title: records}
    panels = choose_panels(logs)
    if not panels:
        return None
    label = labeler()
    figure, axes, style = new_figure(len(panels), 5.0 if len(panels) == 1 else 4.5 * len(panels), 3.4)
    for axis, (key, chinese, english) in zip(axes, panels):
        for color, (name, log) in zip(COLORS, logs.items()):
            steps, values = series(log, key)
            marker = {"marker": "o", "markersize": 3} if key.startswith("val_") else {}
            axis.plot(steps, values, color=color, linewidth=1.5, label=name, **marker)
        axis.set(title=f"{title} · {label(chinese, english)}", xlabel=label("优化步", "step"))
        if len(logs) > 1:
            axis.legend(frameon=False)
    return save_figure(figure, style, Path(path))


def plot_rewards(
    runs: dict[str, tuple[list[dict], int]], path: str | Path, start: float | None = None
) -> Path:
    """几种强化学习的奖励画在一张图里，横轴是采样了多少条：预算相同才比得出谁学得快。

    Args:
        runs: ``{名字: (日志, 每步采样多少条)}``，名字用 ASCII。
        start: 训练前留出题的得分，几种共同的起点。
    """
    label = labeler()
    figure, axes, style = new_figure(2, 9.0, 3.4)
    panels = (
        ("reward", "采样的平均奖励", "mean reward of samples"),
        ("val_reward", "留出题得分（贪心）", "held-out score (greedy)"),
    )
    for axis, (key, chinese, english) in zip(axes, panels):
        for color, (name, (records, rollouts)) in zip(COLORS, runs.items()):
            steps, values = series(records, key)
            marker = {}
            if key == "val_reward":
                marker = {"marker": "o", "markersize": 3}
                if start is not None:
                    steps, values = [0, *steps], [start, *values]
            axis.plot(
                [step * rollouts for step in steps], values, color=color, linewidth=1.6, label=name, **marker
            )
        axis.set(title=label(chinese, english), xlabel=label("采样的条数", "responses sampled"), ylim=(0, 1))
        axis.legend(frameon=False)
    return save_figure(figure, style, Path(path))


def plot_tasks(
    before: dict[str, float], after: dict[str, float], path: str | Path, titles: dict[str, str] | None = None
) -> Path:
    """每个任务微调前后的正确率，横向条形，由高到低。

    Args:
        before, after: ``{任务名: 0 到 1 的正确率}``。
        titles: ``{任务名: 中文名}``，有中文字体时用。
    """
    label = labeler()
    names = sorted(after, key=lambda name: after[name])
    figure, (axis,), style = new_figure(1, 7.0, 0.8 + 0.34 * len(names))
    rows = range(len(names))
    axis.barh(
        [row - 0.2 for row in rows], [(before.get(name) or 0.0) * 100 for name in names], 0.38, color=ORANGE
    )
    axis.barh([row + 0.2 for row in rows], [after[name] * 100 for name in names], 0.38, color=BLUE)
    axis.set_yticks(list(rows), [label((titles or {}).get(name, name), name) for name in names])
    axis.set(xlim=(0, 100), title=label("留出题目的正确率（%）", "exact accuracy on held-out items (%)"))
    axis.legend(
        [label("微调前", "before SFT"), label("微调后", "after SFT")], loc="lower right", frameon=False
    )
    return save_figure(figure, style, Path(path))


def plot_scores(rows: list[tuple[str, str, float | None, float]], path: str | Path) -> Path:
    """记分牌的图：每行一条，前后两点连成线。

    Args:
        rows: ``(中文名, English, 之前, 之后)``，0 到 1；没有之前的只画一点。
    """
    label = labeler()
    figure, (axis,), style = new_figure(1, 8.0, 1.0 + 0.36 * len(rows))
    for y, (*_, before, after) in enumerate(reversed(rows)):
        if before is not None:
            axis.plot([before * 100, after * 100], [y, y], color="#999999", linewidth=1.5, zorder=1)
            axis.scatter([before * 100], [y], color=ORANGE, s=36, zorder=2, label=label("之前", "before"))
        axis.scatter([after * 100], [y], color=BLUE, s=36, zorder=3, label=label("之后", "after"))
    axis.set_yticks(range(len(rows)), [label(*names) for *names, _, _ in reversed(rows)])
    axis.set(
        xlim=(-2, 102), title=label("各阶段前后（%，留出题）", "before and after each stage (%, held out)")
    )
    handles = dict(zip(axis.get_legend_handles_labels()[1], axis.get_legend_handles_labels()[0]))
    axis.legend(handles.values(), handles.keys(), loc="lower left", frameon=False)
    return save_figure(figure, style, Path(path))
