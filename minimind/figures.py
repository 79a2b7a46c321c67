"""画图的底子：matplotlib 的对象接口，PNG，有中文字体就用；不碰全局状态，不需要显示器。"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

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
    # matplotlib 只读字体集（.ttc）里的第一种，Noto CJK 的第一种是日文的名字，汉字是全的
    "Noto Sans CJK JP",
    "Noto Sans CJK TC",
    "Noto Serif CJK SC",
    "Noto Serif CJK JP",
    "Droid Sans Fallback",
    "AR PL UMing CN",
    "AR PL UKai CN",
)
# 字体文件的名字里有这些字样的也许有中文：列表里没有认出来时逐个看
FILE_HINTS = (
    "cjk",
    "notosanssc",
    "notoserifsc",
    "sourcehan",
    "wqy",
    "simhei",
    "msyh",
    "pingfang",
    "droidsansfallback",
)
# 色弱也分得清（Okabe–Ito）
BLUE, ORANGE = "#0072B2", "#E69F00"
COLORS = (BLUE, ORANGE, "#009E73", "#CC79A7")


@cache
def chinese_font() -> str | None:
    """本机可用的第一个中文字体名；没有则 ``None``。

    matplotlib 的字体列表是存着的：后装的字体不在里面，名字也可能没见过，所以再看一遍系统里的字体文件。
    """
    from matplotlib import font_manager

    installed = {entry.name for entry in font_manager.fontManager.ttflist}
    known = next((name for name in CJK_FONTS if name in installed), None)
    return known or _font_from_files(font_manager.findSystemFonts())


def _font_from_files(paths: list[str]) -> str | None:
    """字体文件里第一个真有汉字的，登记好，返回名字；黑体先于宋体，常规先于粗体。"""
    from matplotlib import font_manager

    likely = [path for path in paths if any(hint in Path(path).name.lower() for hint in FILE_HINTS)]
    for path in sorted(
        likely, key=lambda path: ("serif" in path.lower(), "regular" not in path.lower(), path)
    ):
        try:
            font = font_manager.get_font(path)
            if font.get_char_index(ord("训")):
                font_manager.fontManager.addfont(path)
                return font.family_name
        except (OSError, RuntimeError):  # 坏的字体文件
            continue
    return None


def labeler() -> Callable[[str, str], str]:
    """``label(中文, English)``：有中文字体用中文，没有用英文。"""
    has_font = chinese_font() is not None
    return lambda chinese, english: chinese if has_font else english


def new_figure(columns: int, width: float, height: float):
    """一排 ``columns`` 格的图（宽高单位英寸），有中文字体就用上；返回图、各格与存图时要用的样式。"""
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


def save_figure(figure, style: dict, path: Path) -> Path:
    """按 :func:`new_figure` 给的样式存成 PNG，没有的文件夹就建立。"""
    import matplotlib
    from matplotlib.text import Text

    path.parent.mkdir(parents=True, exist_ok=True)
    for text in figure.findobj(Text):  # 图例与刻度上的字建立时还没有这个样式，会画成方框
        text.set_fontfamily(style["font.family"])
    for axis in figure.axes:  # 训练的名字里可以有 $，不是公式；刻度上的 10² 才是
        legend = axis.get_legend()
        for text in (axis.title, *(legend.get_texts() if legend else ())):
            text.set_parse_math(False)
    with matplotlib.rc_context(style):
        figure.savefig(path)
    return path
