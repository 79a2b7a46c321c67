"""token 长度的分布图：``minimind data check --histogram 图.png``。"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from minimind.figures import BLUE, ORANGE, labeler, new_figure
from minimind.runtime.files import atomic_write

BINS = 60


def draw_lengths(lengths: np.ndarray, max_seq_len: int, name: str, path: Path) -> None:
    """左边是篇数，右边是 token 数按长度的分布，竖线是 ``max_seq_len``；最长的百分之一合在最右一格。

    Args:
        lengths: 每篇的 token 数，``int [N]``。
        max_seq_len: 截断或切块的长度。
        name: 数据的名字，写在标题里（没有中文字体时，名字里的汉字画不出来）。
        path: 写到哪个 ``.png``。

    Raises:
        UserError: 写不下。
    """
    import matplotlib

    label = labeler()
    figure, axes, style = new_figure(2, 10, 3.6)
    top = max(float(np.percentile(lengths, 99)), 2.0)
    shown = np.minimum(lengths, top)
    edges = np.linspace(0, top, BINS + 1)
    titles = (
        label(f"{name}：篇数", "documents"),
        label("token 数", "tokens"),
    )
    for axis, weights, title in zip(axes, (None, lengths), titles, strict=True):
        axis.hist(shown, bins=edges, weights=weights, color=BLUE)
        axis.set_title(title)
        axis.set_xlabel(label("一篇的 token 数", "tokens per document"))
        over = (
            np.mean(lengths > max_seq_len)
            if weights is None
            else lengths[lengths > max_seq_len].sum() / lengths.sum()
        )
        if max_seq_len <= top:
            text = label(f"{max_seq_len}：{over:.1%} 更长", f"{max_seq_len}: {over:.1%} longer")
            axis.axvline(max_seq_len, color=ORANGE, label=text)
            axis.legend()
    with matplotlib.rc_context(style):
        atomic_write(path, lambda file: figure.savefig(file, format="png"))
