"""推理的基准：三项都测到，各家写的一样多，文字核对得出不同；不断言任何时间。"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from minimind.errors import UserError

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("bench_inference")


def arguments(bench, **changes):
    options = dict(preset="tiny", ours="float32,int8", gguf="", prompt_length=5, max_new_tokens=6, batch=2)
    return bench.InferenceBenchArguments(
        **{**options, "long_prompt": 9, "repeats": 1, "device": "cpu", **changes}
    )


def test_小模型走通全程(bench, capsys):
    args = arguments(bench)
    result = bench.measure(args)
    bench.report(args, result)
    for kind in ("single", "batch", "prompt"):
        rates = result["rates"][kind]
        assert {"ours float32", "transformers"} <= set(rates)
        ours, peer = (rates[name]["tokens_per_second"] for name in ("ours float32", "transformers"))
        assert rates["ours float32"]["over_transformers"] == pytest.approx(ours / peer)
    agreement = result["agreement"]["ours float32"]
    assert agreement["rows"] == 3 and 0 <= agreement["largest_tie"] <= bench.TIE
    assert "一批 2 条" in capsys.readouterr().out


def test_llama_cpp_也测(bench):
    pytest.importorskip("llama_cpp", reason="没有装 llama-cpp-python")
    pytest.importorskip("gguf", reason="没有装 gguf")
    result = bench.measure(arguments(bench, ours="float32", gguf="f32"))
    assert "llama.cpp f32" in result["rates"]["single"] and "llama.cpp f32" not in result["rates"]["batch"]
    assert result["agreement"]["llama.cpp f32"]["rows"] == 1


def test_没装的对照跳过并说明(bench, monkeypatch, capsys):
    monkeypatch.setattr(bench, "missing_packages", lambda: ["llama_cpp"])
    result = bench.measure(arguments(bench, ours="float32", gguf="f32"))
    assert set(result["rates"]["single"]) == {"ours float32", "transformers"}
    assert "没有装 llama_cpp" in capsys.readouterr().err


def test_文字不同就是错误(bench):
    class Reference(torch.nn.Module):
        """位置 i 的下一个总是 i + 1，第二名差得远。"""

        dtype, device = torch.float32, torch.device("cpu")
        config = type("C", (), {"vocab_size": 50})

        def forward(self, input_ids):
            return type("Out", (), {"logits": torch.nn.functional.one_hot(input_ids + 1, 60).float() * 9})

    args = arguments(bench, batch=1, max_new_tokens=2)
    peers = {"ours float32": bench.Peer(write=None), "ours int8": bench.Peer(write=None, exact=False)}
    last = [row[-1] for length in (1, 1) for row in bench.prompts_of(length, args.prompt_length, 50)]
    right = [[token + 1, token + 2] for token in last]
    wrong = [right[0], [right[1][0], 0]]
    texts = {"transformers": right, "ours float32": right, "ours int8": wrong}
    result = bench.compare_texts(args, peers, texts, Reference())
    assert result["ours float32"]["same"] == 2
    assert result["ours int8"] == {"same": 1, "rows": 2, "same_prefix": 0.75}
    with pytest.raises(RuntimeError, match="贪心文字与 transformers 不同"):
        bench.compare_texts(args, peers, {**texts, "ours float32": wrong}, Reference())


def test_随机权重不比每字节比特数(bench):
    with pytest.raises(UserError, match="没有意义"):
        bench.measure(arguments(bench, text="没有.jsonl"))
