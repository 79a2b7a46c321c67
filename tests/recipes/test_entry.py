"""配方的数据：填充太多时自动换更长的行。"""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from minimind.dataset import DPODataset, SFTDataset
from minimind.recipes.entry import open_datasets
from minimind.tokenizer import load_tokenizer


def args_for(path, **changes):
    values = {"data_path": str(path), "val_path": None, "val_ratio": 0.0, "max_seq_len": 64, "batch_size": 8}
    return SimpleNamespace(**{**values, "seed": 1, "on_bad_line": "error", "arch": None, **changes})


@pytest.fixture
def conversations(tmp_path, monkeypatch):
    """``write(n)``：每段对话都略过半行（64 的一半），一行只装得下一段。"""
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "cache"))

    def write(count):
        path = tmp_path / f"{count}.jsonl"
        turns = [
            [{"role": "user", "content": f"第{i}题"}, {"role": "assistant", "content": "1" * (24 + i % 9)}]
            for i in range(count)
        ]
        path.write_text("".join(json.dumps({"conversations": turn}) + "\n" for turn in turns))
        return path

    return write


def test_半行多一点的对话_换长行_填充降下来_位置数不变(conversations, capfd):
    path = conversations(300)
    plain = SFTDataset(path, load_tokenizer(), max_length=64, seed=1)
    assert plain.stats["padding_share"] > 0.1
    args = args_for(path, val_ratio=0.1)
    data = open_datasets(SFTDataset, args, load_tokenizer())
    train_ds, val_ds = data.train, data.val
    assert args.batch_size * train_ds.row_length == 8 * 64 and train_ds.row_length > 64
    assert train_ds.stats["padding_share"] < plain.stats["padding_share"] / 2
    assert val_ds.row_length == train_ds.row_length, "验证用同一个批大小，行也要一样长"
    assert train_ds.stats["truncated"] == plain.stats["truncated"] == 0
    assert "填充降到" in "".join(capfd.readouterr())


@pytest.mark.parametrize("batch_size,row_length", [(6, 128), (7, 64)])
def test_批大小除不尽就换小一点的倍数或不换(conversations, batch_size, row_length):
    args = args_for(conversations(300), batch_size=batch_size)
    train_ds = open_datasets(SFTDataset, args, load_tokenizer()).train
    assert train_ds.row_length == row_length and args.batch_size * row_length == batch_size * 64


def test_行太少或填充本来就少时不动(conversations):
    args = args_for(conversations(12))
    assert open_datasets(SFTDataset, args, load_tokenizer()).train.row_length == 64
    args = args_for(conversations(300), max_seq_len=1024, batch_size=2)
    assert open_datasets(SFTDataset, args, load_tokenizer()).train.row_length == 1024


def test_偏好数据不打包_也走同一个入口(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "cache"))
    user = {"role": "user", "content": "你好"}
    pair = {k: [user, {"role": "assistant", "content": v}] for k, v in (("chosen", "好"), ("rejected", "哼"))}
    path = tmp_path / "dpo.jsonl"
    path.write_text(json.dumps(pair) + "\n")
    data = open_datasets(DPODataset, args_for(path), load_tokenizer())
    assert len(data.train) == 1 and data.val is None
