"""每字节比特数：与逐词手算一致，与分成几行、每批几行无关。"""

import json
import math

import pytest
import torch
from eval_helpers import make_pair

from minimind.evaluate.bpb import bits_per_byte, text_loss
from minimind.model import MiniMindConfig, MiniMindForCausalLM
from minimind.tokenizer import encode_pretrain, load_tokenizer

TEXTS = ["春天来了，河水涨了三尺。", "The otter sleeps.", "一二三四五六七八九十" * 4]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = MiniMindConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2)
    return MiniMindForCausalLM(config).eval()


def test_与逐词手算一致(model, tmp_path, monkeypatch):
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in TEXTS), "utf-8")
    tokenizer = load_tokenizer()
    nats = 0.0
    with torch.no_grad():
        for text in TEXTS:
            ids = torch.tensor([encode_pretrain(tokenizer, text)])
            logp = torch.log_softmax(model(input_ids=ids).logits[0, :-1].double(), -1)
            nats -= logp.gather(1, ids[0, 1:, None]).sum().item()
    expected = nats / math.log(2) / sum(len(text.encode()) for text in TEXTS)
    for options in ({"max_length": 256}, {"max_length": 64, "batch_size": 1}):
        assert bits_per_byte(model, tokenizer, path, **options) == pytest.approx(expected, rel=1e-5)


def test_别家结构与同权重的_minimind_一致(tmp_path, monkeypatch):
    """Llama 不认 cu_seqlens；几篇打在一行里，注意力同样不出文档。"""
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in TEXTS), "utf-8")
    ours, theirs = (
        text_loss(model, load_tokenizer(), path, max_length=128, batch_size=2) for model in make_pair()
    )
    assert theirs["bpb"] == pytest.approx(ours["bpb"], rel=1e-4)
    assert {k: theirs[k] for k in ("tokens", "bytes")} == {k: ours[k] for k in ("tokens", "bytes")}
