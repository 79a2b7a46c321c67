"""曲线图：用 matplotlib 的对象接口画 PNG，不碰全局状态，不需要显示器。"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

from minimind.report.logs import series

# 常见系统自带的中文字体；都没有时图上一律用英文，免得满图方框
CJK_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "Source Han Sans SC",
    "Source Han Sans CN",
    "Microsoft YaHei",
    "PingFang SC",
    "Hiragino Sans GB",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "SimHei",
    "Heiti SC",
    "STHeiti",
    "Arial Unicode MS",
)
# 色弱也分得清的一对（Okabe–Ito）
BLUE, ORANGE = "#0072B2", "#E69F00"


@cache
def chinese_font() -> str | None:
    """本机可用的第一个中文字体名；没有则 ``None``。"""
    from matplotlib import font_manager

    installed = {entry.name for entry in font_manager.fontManager.ttflist}
    return next((name for name in CJK_FONTS if name in installed), None)


def labeler() -> Callable[[str, str], str]:
    """``label(中文, English)``：有中文字体用中文，没有用英文。"""
    has_font = chinese_font() is not None
    return lambda chinese, english: chinese if has_font else english


def _new_figure(columns: int, width: float, height: float):
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    font = chinese_font()
    style = {"font.family": [font, "DejaVu Sans"] if font else ["DejaVu Sans"], "axes.unicode_minus": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes, style


def _save(figure, style: dict, path: Path) -> Path:
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(style):
        figure.savefig(path)
    return path


def plot_stage(records: list[dict], title: str, path: str | Path) -> Path | None:
    """一个阶段的曲线：左边训练损失，右边验证的每字节比特（没有就画验证损失）。

    Args:
        records: :func:`minimind.report.logs.read_log` 的结果。
        title: 图题，只用 ASCII 以便没有中文字体的机器。
        path: PNG 路径。

    Returns:
        写好的路径；日志里没有任何损失时返回 ``None``，不留空图。
    """
    steps, losses = series(records, "loss")
    if not steps:
        return None
    val_key, val_name = "val_bpb", ("验证：每字节比特", "validation bits per byte")
    val_steps, values = series(records, val_key)
    if not values:
        val_name = ("验证损失", "validation loss")
        val_steps, values = series(records, "val_loss")
    label = labeler()
    figure, axes, style = _new_figure(2 if values else 1, 9.0 if values else 5.0, 3.4)
    axes[0].plot(steps, losses, color=BLUE, linewidth=1.4)
    axes[0].set(
        title=f"{title} · " + label("训练损失（nat / token）", "train loss (nat / token)"),
        xlabel=label("优化步", "step"),
    )
    if values:
        axes[1].plot(val_steps, values, color=ORANGE, linewidth=1.6, marker="o", markersize=3)
        axes[1].set(title=f"{title} · " + label(*val_name), xlabel=label("优化步", "step"))
    return _save(figure, style, Path(path))


def plot_tasks(before: dict[str, float], after: dict[str, float], path: str | Path) -> Path:
    """每个任务微调前后的正确率，横向条形，由高到低。

    Args:
        before, after: ``{任务名: 0 到 1 的正确率}``。
    """
    label = labeler()
    names = sorted(after, key=lambda name: after[name])
    figure, (axis,), style = _new_figure(1, 7.0, 0.8 + 0.34 * len(names))
    rows = range(len(names))
    axis.barh(
        [row - 0.2 for row in rows], [before.get(name, 0.0) * 100 for name in names], 0.38, color=ORANGE
    )
    axis.barh([row + 0.2 for row in rows], [after[name] * 100 for name in names], 0.38, color=BLUE)
    axis.set_yticks(list(rows), names)
    axis.set(xlim=(0, 100), title=label("留出题目的正确率（%）", "exact accuracy on held-out items (%)"))
    axis.legend(
        [label("微调前", "before SFT"), label("微调后", "after SFT")], loc="lower right", frameon=False
    )
    return _save(figure, style, Path(path))
