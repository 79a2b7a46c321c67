"""一条长的对别人的影响：各项都走得通，占的内存有界；不断言任何时间。"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

pytest.importorskip("psutil")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_小模型走通全程(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    bench = importlib.import_module("bench_isolation")
    args = bench.IsolationArguments(size="tiny", writers=4, long=700, steps=2, device="cpu")
    result = bench.measure(args)
    bench.report(result)
    for name in ("generate", "score"):
        assert result[name]["ratio"] <= 1.3 and result[name]["reading_steps"] >= 3
    assert set(result["sampling"]) == {"kinds_1_ms", "kinds_32_ms"}
    assert "speed_left" in capsys.readouterr().out
