"""读训练日志（每行一个 JSON 对象）。"""

from __future__ import annotations

from pathlib import Path

from minimind.trainer.exhibits import number


def read_log(path: str | Path) -> list[dict]:
    """读 ``out/logs/{weight}.jsonl``，见 :func:`minimind.trainer.journal.read_log`。"""
    from minimind.trainer import journal  # 连带 torch，只画别的图不必等

    return journal.read_log(Path(path))


def series(records: list[dict], key: str, x: str = "step") -> tuple[list[float], list[float]]:
    """取出一条曲线 ``(xs, ys)``；没有这个字段、不是有限的数的记录跳过。"""
    pairs = ((number(record.get(x)), number(record.get(key))) for record in records)
    points = [(a, b) for a, b in pairs if a is not None and b is not None]
    return [a for a, _ in points], [b for _, b in points]
