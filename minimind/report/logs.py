"""读训练日志（每行一个 JSON 对象）。"""

from __future__ import annotations

from pathlib import Path


def read_log(path: str | Path) -> list[dict]:
    """读 ``out/logs/{weight}.jsonl``，见 :func:`minimind.trainer.journal.read_log`。"""
    from minimind.trainer import journal  # 连带 torch，只画别的图不必等

    return journal.read_log(Path(path))


def series(records: list[dict], key: str, x: str = "step") -> tuple[list[float], list[float]]:
    """取出一条曲线 ``(xs, ys)``；没有这个字段或值为空的记录跳过。"""
    points = [(record[x], record[key]) for record in records if record.get(key) is not None and x in record]
    return [float(a) for a, _ in points], [float(b) for _, b in points]
