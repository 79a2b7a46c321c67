"""服务的基准：子进程里真的开一个服务，两边写的词元数都数得对；不断言任何时间。"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("psutil")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("bench_server")


def test_开一个小服务走通全程(bench, tmp_path, capsys):
    args = bench.ServerBenchArguments(
        size="tiny",
        clients=3,
        max_new_tokens=8,
        prompt_chars=5,
        loaded_clients=2,
        questions=2,
        repeats=1,
        temperature=0.0,
        gguf="",
        device="cpu",
        run_dir=str(tmp_path),
    )
    result = bench.measure(args)
    bench.report(args, result)
    speed = result["throughput"]
    assert set(speed) == {"ours", "transformers"} and speed["transformers"]["tokens"] == 24
    assert 0 < speed["ours"]["tokens"] <= 24 and speed["ours"]["cpu_ms_per_token"] > 0
    first = result["first_token_ms"]
    assert first["single"]["count"] == first["loaded"]["count"] == 4
    assert 0 < first["single"]["p50"] <= first["single"]["p95"]
    assert "3 路流式" in capsys.readouterr().out


def test_起不来的服务说清为什么(bench, tmp_path):
    from server_clients import Service

    from minimind.errors import UserError

    args = bench.ServerBenchArguments(save_dir=str(tmp_path / "没有"), run_dir=str(tmp_path))
    with pytest.raises(UserError, match="没有起来"):
        Service.__enter__(bench.our_service(args, tmp_path / "没有"))
