"""真的分词器、打包数据与模型走一遍：损失下降，每字节比特数对得上手算，续训逐位相同。"""

from __future__ import annotations

import json
import math
import os
import signal

import pytest
import torch
from trainer_helpers import assert_same_weights, in_processes, load_file, saved_model, tiny_args

from minimind.dataset import PretrainDataset, SFTDataset, collate_packed
from minimind.errors import UserError
from minimind.tokenizer import load_tokenizer
from minimind.trainer.loop import train
from minimind.trainer.recipe import Data, Recipe, language_model_loss
from minimind.trainer.trainer_utils import init_model, model_config

TEXTS = [
    "云川镇的东边有一座石桥，桥下的河水一年四季都很清。",
    "小明有 12 个苹果，给了小红 5 个，还剩 7 个。",
    "The library opens at nine and closes at six on weekdays.",
    "春天来了，山坡上的杜鹃花开了，孩子们在草地上放风筝。",
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    pretrain, sft = folder / "pretrain.jsonl", folder / "sft.jsonl"
    pretrain.write_text(
        "".join(
            json.dumps({"text": f"第{i}篇。{TEXTS[i % 4]}"}, ensure_ascii=False) + "\n" for i in range(160)
        )
    )
    turns = [
        [{"role": "user", "content": f"{i}加{i}等于几？"}, {"role": "assistant", "content": f"等于{2 * i}。"}]
        for i in range(120)
    ]
    sft.write_text("".join(json.dumps({"conversations": t}, ensure_ascii=False) + "\n" for t in turns))
    return folder


def real_train(files, folder, *, kind="pretrain", die_at_call=None, rows_seen=None, **changes):
    """在 ``files`` 里的真数据上训练一个两层的模型。"""
    args = tiny_args(folder, **{"max_seq_len": 64, "batch_size": 4, "accumulation_steps": 2, **changes})
    torch.manual_seed(0)
    model, tokenizer = init_model(model_config(args), "none", device="cpu")
    cls = {"pretrain": PretrainDataset, "sft": SFTDataset}[kind]
    common = {"max_length": 64, "cache_dir": files / "cache", "val_ratio": 0.1, "num_workers": 1}
    train_ds = cls(files / f"{kind}.jsonl", tokenizer, split="train", **common)
    val_ds = cls(files / f"{kind}.jsonl", tokenizer, split="val", **common)
    calls = {"n": 0}

    def loss(model, batch):
        calls["n"] += model.training
        if calls["n"] == die_at_call:
            os.kill(os.getpid(), signal.SIGKILL)
        return language_model_loss(model, batch)

    recipe = Recipe("pretrain", loss, collate_packed)
    return train(args, recipe, model, tokenizer, Data(train_ds, val_ds)), model, val_ds


@pytest.mark.parametrize("kind", ["pretrain", "sft"])
def test_损失下降且每字节比特数等于手算(files, tmp_path, kind):
    result, model, val_ds = real_train(files, tmp_path, kind=kind, epochs=4)
    lines = [json.loads(line) for line in result.log.read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert abs(losses[0] - math.log(6400)) < 0.3 and losses[-1] < losses[0] - 2

    # 手算：逐行取 logits，逐个目标累加负对数概率；字节数由目标词元解码得出
    tokenizer, nll, n_bytes, count = load_tokenizer(), 0.0, 0, 0
    model.eval()
    for i in range(len(val_ds)):
        batch = val_ds.collate([val_ds[i]])
        with torch.no_grad():
            logits = model(
                input_ids=batch["input_ids"], position_ids=batch["position_ids"],
                cu_seqlens=batch["cu_seqlens"], max_seqlen=batch["max_seqlen"],
            ).logits[0]  # fmt: skip
        labels = batch["labels"][0]
        for t in range(1, len(labels)):
            if labels[t] != -100:
                nll -= logits[t - 1].log_softmax(-1)[labels[t]].item()
                count += 1
                token = tokenizer.convert_ids_to_tokens(int(labels[t]))
                n_bytes += (
                    0 if int(labels[t]) in tokenizer.all_special_ids else len(token)
                )  # 字节级：一字符一字节
    assert result.metrics["val_loss"] == pytest.approx(nll / count, rel=1e-4)
    assert result.metrics["val_bpb"] == pytest.approx(nll / math.log(2) / n_bytes, rel=1e-4)


def test_真数据上被杀三次后逐位相同(files, tmp_path):
    settings = {"epochs": 3, "save_interval": 2, "eval_interval": 5}
    whole, part = tmp_path / "whole", tmp_path / "part"
    real_train(files, whole, **settings)
    for call in (5, 9, 13):
        codes = in_processes(
            1, real_train, files=files, folder=part, from_resume=1, die_at_call=call, **settings
        )
        assert codes == [-signal.SIGKILL]
    result, _, _ = real_train(files, part, from_resume=1, **settings)
    assert_same_weights(saved_model(part, "toy_64"), saved_model(whole, "toy_64"))
    states = [load_file(f / "checkpoints" / "toy_64_resume.pth") for f in (whole, part)]
    assert states[0]["metrics"] == states[1]["metrics"] and states[0]["train_loss"] == states[1]["train_loss"]
    logs = []
    for folder in (whole, part):
        lines = (folder / "out" / "logs" / "toy_64.jsonl").read_text().splitlines()
        logs.append([(r["step"], r.get("loss"), r.get("val_bpb")) for r in map(json.loads, lines)])
    assert logs[0] == logs[1] and result.step == states[0]["step"]


@pytest.mark.parametrize("kind", ["pretrain", "sft"])
def test_真数据上累积与整批一致(files, tmp_path, kind):
    real_train(files, tmp_path / "a", kind=kind, epochs=2, batch_size=2, accumulation_steps=4)
    real_train(files, tmp_path / "b", kind=kind, epochs=2, batch_size=8, accumulation_steps=1)
    a, b = saved_model(tmp_path / "a"), saved_model(tmp_path / "b")
    assert max((a[k] - b[k]).abs().max() for k in a) < 1e-5


def test_换了数据续训报错(files, tmp_path):
    real_train(files, tmp_path, max_steps=1)
    with pytest.raises(UserError, match=r"数据指纹|训练行数"):
        real_train(files, tmp_path, kind="sft", from_resume=1)
