"""读训练日志（每行一个 JSON 对象）。"""

from __future__ import annotations

import json
from pathlib import Path


def read_log(path: str | Path) -> list[dict]:
    """读 ``out/logs/{weight}.jsonl``；文件不存在给空列表，被中断写到一半的最后一行略过。"""
    path = Path(path)
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and "step" in record:
            records.append(record)
    return records


def series(records: list[dict], key: str, x: str = "step") -> tuple[list[float], list[float]]:
    """取出一条曲线 ``(xs, ys)``；没有这个字段或值为空的记录跳过。"""
    points = [(record[x], record[key]) for record in records if record.get(key) is not None and x in record]
    return [float(a) for a, _ in points], [float(b) for _, b in points]
