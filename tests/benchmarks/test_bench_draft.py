"""推测解码的基准：两项都走得通，步数对得上给定的答案；不断言任何时间。"""

import importlib
import json
from pathlib import Path

from minimind.tokenizer import encode_chat, load_tokenizer

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_小模型走通全程(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    bench = importlib.import_module("bench_draft")
    talk = [{"role": "user", "content": "数到五"}, {"role": "assistant", "content": "一二三四五，" * 8}]
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps({"conversations": talk}, ensure_ascii=False) + "\n", encoding="utf-8")
    args = bench.DraftBenchArguments(
        sizes="tiny",
        kinds="float32",
        rows="1",
        widths="2",
        context=20,
        writers="1",
        texts=str(path),
        repeats=1,
    )
    result = bench.measure(args)
    bench.report(result)
    (cost,), (row,) = result["verification"], result["writing"]
    assert cost["decode_ms"] > 0 and cost["2"] > 0
    assert row["tokens"] == sum(encode_chat(load_tokenizer(), talk).target), "写的是文件里的那一答"
    assert row["steps"] == row["tokens"] - 2, "头两个在读提示的那一步"
    assert row["prompt_steps"] < row["steps"] / 2
    assert str(tmp_path) not in json.dumps(result) and "talk.jsonl" in capsys.readouterr().out
