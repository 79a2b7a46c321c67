"""一次训练的日志在内存里的样子：每个指标一列数；画多少点由这里决定，十万行也只给几百点。

日志的一行里可以有什么，都不作假定：数是曲线，``notes`` 是体征的话，:data:`EXHIBITS` 里的几样留下位置、要看时再读原文，
别的跳过；不是 JSON 的、没有 ``step`` 的、NaN 与空值，都不妨碍别的行。
"""

from __future__ import annotations

import json
import math
from array import array
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from minimind.trainer.exhibits import EXHIBITS, number
from minimind.watch.tail import Tail

AXES = ("step", "time", "tokens")
MAX_KEYS = 200  # 指标的名字至多认这么多：日志里若混进了随手写的键，内存不会无止境地涨
MAX_NOTES = 200
MAX_MARKS = 20_000


def parse_line(line: bytes) -> dict[str, Any] | None:
    """一行 JSON 对象，``step`` 是有限的数；别的都给 None。"""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # 不是 JSON、不是 UTF-8、嵌套得太深
        return None
    return record if isinstance(record, dict) and number(record.get("step")) is not None else None


class History:
    """一个日志文件读到现在的全部；:meth:`refresh` 读新长出来的。"""

    def __init__(self, path: Path):
        self.tail = Tail(path)
        self._clear()
        self.complete = False

    def _clear(self) -> None:
        self.axes = {name: array("d") for name in AXES}
        # 指标 → (它在哪几行, 值)；验证的指标只在一小部分行里
        self.columns: dict[str, tuple[array, array]] = {}
        self.notes: deque[tuple[float, str]] = deque(maxlen=MAX_NOTES)
        # 种类 → [(步, 位置, 长度)]
        self.marks: dict[str, list[tuple[float, int, int]]] = {}

    @property
    def version(self) -> str:
        """内容变了它就变。"""
        return f"{self.tail.inode}-{self.tail.generation}-{self.tail.offset}"

    @property
    def points(self) -> int:
        """内存里的点数。"""
        return sum(len(values) for _, values in self.columns.values())

    def refresh(self, budget: int) -> None:
        """读至多约 ``budget`` 字节新的行；文件换过就从头来。"""
        piece = self.tail.read(budget)
        if piece.restarted:
            self._clear()
        for offset, line in piece.lines:
            record = parse_line(line)
            if record is not None:
                self._add(record, offset, len(line))
        self.complete = piece.complete

    def _add(self, record: dict[str, Any], offset: int, length: int) -> None:
        row = len(self.axes["step"])
        for name, values in self.axes.items():  # 验证的行没有词元数：沿用上一行的
            value = number(record.get(name))
            values.append(value if value is not None else values[-1] if values else 0.0)
        for key, value in record.items():
            if key in EXHIBITS:
                marks = self.marks.setdefault(key, [])
                if len(marks) >= MAX_MARKS:
                    del marks[1::2]  # 隔一份丢一份，最早与最新的都还看得到
                marks.append((self.axes["step"][-1], offset, length))
            elif key == "notes" and isinstance(value, list):
                self.notes.extend((self.axes["step"][-1], text) for text in value if isinstance(text, str))
            elif key not in ("step", "epoch") and (value := number(value)) is not None:
                column = self.columns.get(key)
                if column is None:
                    if len(self.columns) >= MAX_KEYS:
                        continue
                    column = self.columns[key] = (array("Q"), array("d"))
                column[0].append(row)
                column[1].append(value)

    def curve(
        self, key: str, axis: str, points: int, low: float | None = None, high: float | None = None
    ) -> dict[str, Any]:
        """一条曲线，见 :func:`downsample`；另有 ``count`` 一共多少点、``last`` 最后的值。"""
        rows, values = self.columns[key]
        x = np.array(self.axes[axis])[np.array(rows)]  # 拷贝：array 还要接着长
        y = np.array(values)
        return {"count": len(y), "last": rounded(y[-1:])[0], **downsample(x, y, points, low, high)}

    def record(self, kind: str, step: float) -> tuple[float, Any] | None:
        """``step`` 处（没有就在它之前最近的，再没有就最早的）的一份 ``kind``；没有给 None。"""
        marks = self.marks.get(kind)
        if not marks:
            return None
        # 没有截就接着写的日志，步数会往回走：取步数最近的，同一步的取后写的
        earlier = [mark for mark in marks if mark[0] <= step]
        at, offset, length = max(earlier) if earlier else min(marks, key=lambda mark: mark[0])
        try:
            found = parse_line(self.tail.line(offset, length))
        except OSError:
            return None
        return (at, found[kind]) if found and kind in found else None


def downsample(
    x: np.ndarray, y: np.ndarray, points: int, low: float | None = None, high: float | None = None
) -> dict[str, list[float]]:
    """一条曲线变成至多 ``points`` 个点。

    点够少就原样；否则横轴等分成 ``points`` 段，每段给平均、最低、最高：平均画成线，最低最高画成带，
    一步的尖峰不会因为抽稀而不见。

    Args:
        x, y: ``[n]``；``x`` 可以不是递增的，先排好。
        low, high: 只要横轴在这之间的。

    Returns:
        ``x``、``y``；抽稀过的另有 ``lo``、``hi``。
    """
    if (x[1:] < x[:-1]).any():
        order = np.argsort(x, kind="stable")
        x, y = x[order], y[order]
    start = 0 if low is None else np.searchsorted(x, low, "left")
    stop = len(x) if high is None else np.searchsorted(x, high, "right")
    x, y = x[start:stop], y[start:stop]
    if len(x) <= points:
        return {"x": rounded(x), "y": rounded(y)}
    edges = np.linspace(x[0], x[-1], points + 1)[:-1]
    starts = np.unique(np.searchsorted(x, edges, "left"))
    counts = np.diff(np.append(starts, len(x)))
    with np.errstate(over="ignore"):
        means = [np.add.reduceat(values, starts) / counts for values in (x, y)]
    return {
        "x": rounded(means[0]),
        "y": rounded(means[1]),
        "lo": rounded(np.minimum.reduceat(y, starts)),
        "hi": rounded(np.maximum.reduceat(y, starts)),
    }


def rounded(values: np.ndarray) -> list[float | None]:
    """留七位有效数字，应答小一半；画图看不出差别。"""
    return [float(f"{value:.7g}") if math.isfinite(value) else None for value in values.tolist()]
