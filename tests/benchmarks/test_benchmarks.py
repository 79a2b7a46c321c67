"""基准的烟雾测试：极小的尺寸走通全程，结果 JSON 里该有的量都有；不断言任何时间。"""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmark_path(monkeypatch, tmp_path):
    """基准按脚本运行，彼此以 ``common`` 相称；结果写到临时目录，不碰仓库里的。"""
    monkeypatch.syspath_prepend(str(FOLDER))
    common = importlib.import_module("common")
    monkeypatch.setattr(common.write_result, "__defaults__", (tmp_path / "results",))


@pytest.fixture
def corpus(tmp_path):
    """一小份预训练与微调数据。"""
    texts = [f"第{i}天，云川的渡口来了{i * 7 % 13}条船，船上装着盐和茶。" * (1 + i % 5) for i in range(120)]
    pretrain = tmp_path / "pretrain.jsonl"
    pretrain.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts), "utf-8")
    sft = tmp_path / "sft.jsonl"
    turns = [[{"role": "user", "content": t[:9]}, {"role": "assistant", "content": t[9:60]}] for t in texts]
    lines = (json.dumps({"conversations": turn}, ensure_ascii=False) + "\n" for turn in turns)
    sft.write_text("".join(lines), "utf-8")
    return {"pretrain": str(pretrain), "sft": str(sft)}


def result_in(tmp_path) -> dict:
    (path,) = (tmp_path / "results").glob("*.json")
    return json.loads(path.read_text("utf-8"))


def test_结果里一列数写在一行_读回来一样():
    payload = {"curve": [[1, 0.5], [2, -1e-05]], "empty": [], "words": ["一", "[1, 2]"], "deep": {"n": [1]}}
    text = importlib.import_module("common").to_json(payload)
    assert json.loads(text) == payload
    assert "[2, -1e-05]" in text and "[1]" in text


def point(step: int, bpb: float) -> dict:
    return {"step": step, "seconds": 2.0 * step, "val_bpb": bpb}


def test_到达目标的时间按曲线插值():
    quality = importlib.import_module("quality_table")
    curve = [point(10, 3.0), point(20, 2.0), point(30, 1.0)]
    assert quality.time_to(curve, 1.5, "step") == pytest.approx(25)
    assert quality.time_to(curve, 1.5) == pytest.approx(50)
    assert quality.time_to(curve, 0.5) is None
    assert quality.time_to(curve, 9.0) == 20.0  # 第一个点之前不外推


def test_质量汇总按种子配对再取中位数():
    quality = importlib.import_module("quality_table")

    def run(end: float) -> dict:
        curve = [point(10, 4.0), point(20, end)]
        return {"recipe": "甲", "curve": curve, "seconds": 40.0, "tokens": 400}

    runs = {"public": [run(3.0), run(3.2)], "adamw_1e-3": [run(2.5), run(2.5)], "adamw_2e-3": [run(2.8)] * 2}
    summary = quality.summarize({**runs, "ours": [run(2.0), run(2.4)]})
    assert summary["best_adamw"] == "adamw_1e-3"
    ours = summary["recipes"]["ours"]
    assert ours["steps_share_to_public_each"] == pytest.approx([0.75, 0.75])
    assert ours["time_share_to_best_adamw"] == pytest.approx((0.875 + 0.96875) / 2)
    assert summary["recipes"]["public"]["time_share_to_best_adamw"] is None


def test_质量基准可续跑(corpus, tmp_path, monkeypatch):
    quality = importlib.import_module("bench_quality")
    argv = [
        "--steps",
        "4",
        "--hidden_size",
        "32",
        "--num_hidden_layers",
        "1",
        "--num_attention_heads",
        "2",
        "--batch_size",
        "4",
    ]
    argv += [
        "--max_seq_len",
        "32",
        "--seeds",
        "1",
        "--eval_points",
        "2",
        "--eval_rows",
        "4",
        "--dtype",
        "float32",
        "--device",
        "cpu",
    ]
    argv += ["--recipes", "public,adamw_2e-3,ours,ours_half", "--data_path", corpus["pretrain"]]
    argv += ["--val_path", corpus["pretrain"], "--cache_dir", str(tmp_path / "c")]
    argv += ["--run_dir", str(tmp_path / "r")]
    assert quality.main(argv) == 0
    first = result_in(tmp_path)
    assert {r["steps"] for r in map(json.loads, (p.read_text() for p in (tmp_path / "r").iterdir()))} == {
        4,
        2,
    }

    def never(*_args, **_kwargs):
        raise AssertionError("已有曲线的不该重训")

    monkeypatch.setattr(quality, "train_once", never)
    assert quality.main(argv) == 0
    assert result_in(tmp_path)["curves"] == first["curves"]
    assert quality.main([*argv, "--recipes", "没有这个"]) == 2


def test_对照与本项目是同一个函数():
    import torch

    bench = importlib.import_module("bench_train")
    config, cpu = bench.preset("tiny"), torch.device("cpu")
    ours, peer = bench.build_ours(config, cpu), bench.build_peer(config, cpu)
    batch = bench.full_rows(config.vocab_size, 2, 24)
    inputs = {k: v for k, v in batch.items() if k != "num_tokens"}
    assert torch.allclose(ours(**inputs).loss, peer(**inputs).loss, atol=1e-4)


def test_对照的批次截断并补齐():
    bench = importlib.import_module("bench_train")
    documents = [(list(range(1, n + 1)), [True] * n) for n in (3, 9)]
    for to_longest, max_len, width in ((False, 6, 6), (True, 12, 9)):
        batch = next(bench.padded_batches(documents, max_len, 2, to_longest, 0))
        assert batch["input_ids"].shape == (2, width)
        assert batch["num_tokens"] == 3 + min(9, max_len) == int((batch["labels"] != -100).sum())


def test_对照的填充占比按整轮算():
    bench = importlib.import_module("bench_train")
    documents = [([1] * n, [True] * n) for n in (2, 4, 6, 20)]
    batches = bench.batch_lengths(documents, 8, 2)
    assert sorted(n for batch in batches for n in batch) == [2, 4, 6, 8]
    assert bench.fill_share(batches, 8, to_longest=False) == pytest.approx(20 / 32)
    longest = sum(2 * max(batch) for batch in batches)
    assert bench.fill_share(batches, 8, to_longest=True) == pytest.approx(20 / longest)


def test_训练速度基准走通(corpus, tmp_path):
    bench = importlib.import_module("bench_train")
    argv = [
        "--preset",
        "tiny",
        "--repeats",
        "1",
        "--batches",
        "1",
        "--batch_size",
        "2",
        "--pretrain_len",
        "48",
        "--sft_len",
        "64",
    ]
    argv += ["--documents", "60", "--device", "cpu", "--memory", "0", "--cache_dir", str(tmp_path / "c")]
    assert bench.main([*argv, "--pretrain_path", corpus["pretrain"], "--sft_path", corpus["sft"]]) == 0
    result = result_in(tmp_path)
    assert result["lost_text"]["ours"] == 0 < result["lost_text"]["peer"]
    assert set(result["sft"]) == set(bench.MODES)
    assert {"hardware", "torch", "threads"} <= set(result["environment"])


def test_数据基准走通(corpus, tmp_path):
    bench = importlib.import_module("bench_data")
    argv = [
        "--megabytes",
        "0.02",
        "--batches",
        "1",
        "--repeats",
        "1",
        "--workers",
        "1",
        "--batch_size",
        "4",
        "--max_seq_len",
        "48",
    ]
    argv += ["--data_path", corpus["pretrain"], "--work_dir", str(tmp_path / "w"), "--copies", "2"]
    assert bench.main(argv) == 0
    result = result_in(tmp_path)
    assert set(result["start"]) == set(bench.MODES)
    assert result["bytes"] > 2 * Path(corpus["pretrain"]).stat().st_size
