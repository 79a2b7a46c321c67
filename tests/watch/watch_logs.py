"""写日志：测试共用。"""

from __future__ import annotations

import json
from pathlib import Path


def append(path: Path, *records: dict | str) -> None:
    """接着写几行；字符串原样写（不加换行）。"""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        for record in records:
            file.write(record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) + "\n")


def rows(first: int, last: int, **changes) -> list[dict]:
    """第 ``first`` 到 ``last`` 步，损失从 8 往下降，一步半秒、百个词元。"""
    return [
        {
            "step": s,
            "epoch": 1,
            "loss": 8 / s,
            "tokens": 100 * s,
            "tokens_per_s": 200.0,
            "time": s / 2,
            **changes,
        }
        for s in range(first, last + 1)
    ]


def samples(step: int, *answers: str) -> dict:
    """一次样例。"""
    return {"step": step, "samples": [{"prompt": f"问题{i}", "answer": a} for i, a in enumerate(answers)]}
