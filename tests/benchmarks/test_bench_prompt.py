"""读提示的基准：两项都走得通，抄来的位置数得对；不断言任何时间。"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

pytest.importorskip("psutil")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_小模型走通全程(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    bench = importlib.import_module("bench_prompt")
    args = bench.PromptBenchArguments(
        size="tiny", prompts="40", chunks="0,16", writers=2, histories="30", answer=8, repeats=1, device="cpu"
    )
    result = bench.measure(args)
    bench.report(result)
    assert [row["chunk"] for row in result["chunked"]] == [0, 16]
    assert all(row["first_token_ms"] >= row["longest_gap_ms"] > 0 for row in result["chunked"])
    assert [row["reused"] for row in result["second_turn"]] == [0, 32]
    assert "别人最长间隔" in capsys.readouterr().out
