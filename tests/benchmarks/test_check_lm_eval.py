"""lm-evaluation-harness 的 local-completions 对着真的服务进程；没有装它就跳过。"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("psutil")

from minimind.evaluate.choice_data import Question
from minimind.model import MiniMindConfig, MiniMindForCausalLM
from minimind.runtime.checkpoint import config_dict, save_weights, weights_path
from minimind.tokenizer import load_tokenizer, tokenizer_fingerprint

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def check(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("check_lm_eval")


def test_切词因接缝而不同的题挑得出来(check):
    tokenizer = load_tokenizer()
    assert check.same_either_way(tokenizer, Question("", "一加一？", ("二", "三"), 0))
    assert not check.same_either_way(tokenizer, Question("", "一加一？", ("“二”", "三"), 0))


def test_选择题与续写都与自己的评测相同(check, tmp_path):
    pytest.importorskip("lm_eval")
    torch.manual_seed(3)
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=2))
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(3 if value.dim() > 1 else 1)  # 随机的小权重几乎均匀，放大才有分别
        model.lm_head.weight[2] *= 3  # 有的续写以结束符收尾
    sidecar = {
        "config": config_dict(model.config),
        "tokenizer_hash": tokenizer_fingerprint(load_tokenizer()),
        "recipe": "pretrain",
    }
    save_weights(model, weights_path(model.config, "pretrain", tmp_path), sidecar)
    rows = check.check(check.LmEvalArguments(save_dir=str(tmp_path), run_dir=str(tmp_path / "run")))
    assert [row["task"] for row in rows] == ["letter", "text", "write"]
    for row in rows:
        assert row["harness"] == pytest.approx(row["ours"]), row
        assert row["gap"] < 1e-3, row
