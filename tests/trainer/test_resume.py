"""续训：被 kill -9、SIGTERM、存盘途中被杀之后，权重与损失逐位等于没有中断过。"""

from __future__ import annotations

import json
import os
import random
import signal
import time

import pytest
import torch
from trainer_helpers import (
    ToyRows,
    assert_same_weights,
    in_processes,
    record_samples,
    saved_model,
    tiny_args,
    tiny_model,
    toy_recipe,
    toy_train,
)

from minimind.errors import UserError
from minimind.runtime import files
from minimind.runtime.checkpoint import load_file
from minimind.trainer.loop import train
from minimind.trainer.recipe import Data, language_model_loss

# 有 dropout、有短窗口、跨轮、记录区间跨存盘点、验证与存盘错开：哪样状态没存好都会露馅
SETTINGS = {
    "epochs": 3,
    "accumulation_steps": 3,
    "save_interval": 2,
    "eval_interval": 4,
    "log_interval": 3,
    "val_rows": 5,
    "model": {"dropout": 0.2},
}


def train_and_die(folder, *, die_at_call=None, die_in_save=None, signum=signal.SIGKILL, **settings):
    """训练；在第几次前向、或第几次存盘写到一半时，给自己发信号。"""
    calls = {"forward": 0, "save": 0}

    def loss(model, batch):
        calls["forward"] += model.training
        if calls["forward"] == die_at_call:
            os.kill(os.getpid(), signum)
        return language_model_loss(model, batch)

    original = files.os.replace

    def replace(source, target):
        if str(target).endswith("_resume.pth"):
            calls["save"] += 1
            if calls["save"] == die_in_save:  # 临时文件已写好，还没改名
                os.kill(os.getpid(), signum)
        original(source, target)

    files.os.replace = replace
    toy_train(folder, loss=loss, **settings)


def log_lines(folder) -> list[dict]:
    """日志里不随时间变的部分。"""
    lines = (folder / "out" / "logs" / "toy_64.jsonl").read_text().splitlines()
    timing = ("time", "tokens_per_s", "mfu")
    return [{k: v for k, v in json.loads(line).items() if k not in timing} for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert in_processes(1, toy_train, folder=folder, **SETTINGS) == [0]
    return folder


def assert_as_if_uninterrupted(folder, whole):
    assert_same_weights(saved_model(folder), saved_model(whole))
    weights = [torch.load(f / "out" / "toy_64.pth", weights_only=True) for f in (folder, whole)]
    assert_same_weights(*weights)
    assert log_lines(folder) == log_lines(whole)
    assert not [p.name for p in folder.rglob("*.tmp")]


def kill_then_resume(folder, whole, kills: list[dict]):
    """依次被杀，再续到底。"""
    for kill in kills:
        codes = in_processes(1, train_and_die, folder=folder, from_resume=1, **SETTINGS, **kill)
        assert codes == [-signal.SIGKILL]
    assert in_processes(1, toy_train, folder=folder, from_resume=1, **SETTINGS) == [0]
    assert_as_if_uninterrupted(folder, whole)


@pytest.mark.compat
def test_被杀三次后逐位相同(tmp_path, uninterrupted):
    """第一步之前被杀（还没有存档）、中途被杀、存盘写到一半被杀。"""
    kills = [{"die_at_call": 2}, {"die_at_call": 20}, {"die_in_save": 2}]
    kill_then_resume(tmp_path, uninterrupted, kills)


@pytest.mark.slow
def test_随机时刻被杀十次后逐位相同(tmp_path, uninterrupted):
    dice = random.Random(0)
    for round_ in range(10):
        folder = tmp_path / str(round_)
        kill_then_resume(folder, uninterrupted, [{"die_at_call": dice.randint(1, 33)}])
    # 真从外面杀，时刻不由训练循环挑
    folder, killed = tmp_path / "outside", 0
    while killed < 10:
        process = in_processes(1, toy_train, wait=False, folder=folder, from_resume=1, **SETTINGS)[0]
        process.join(dice.uniform(0.0, 0.8))
        if not process.is_alive():
            break
        process.kill()
        process.join()
        killed += 1
    assert in_processes(1, toy_train, folder=folder, from_resume=1, **SETTINGS) == [0]
    assert_as_if_uninterrupted(folder, uninterrupted)


@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_收到信号存盘离开再续逐位相同(tmp_path, uninterrupted, signum, code):
    codes = in_processes(1, train_and_die, folder=tmp_path, die_at_call=8, signum=signum, **SETTINGS)
    assert codes == [code]
    data = load_file(tmp_path / "checkpoints" / "toy_64_resume.pth")
    assert data["step"] == 3  # 第 8 次前向在第 3 步里；走完这一步就存盘，不等存盘间隔
    assert in_processes(1, toy_train, folder=tmp_path, from_resume=1, **SETTINGS) == [0]
    assert_as_if_uninterrupted(tmp_path, uninterrupted)


def test_验证途中收到信号_续训补上那次验证(tmp_path, uninterrupted):
    def loss(model, batch):
        if not model.training:
            os.kill(os.getpid(), signal.SIGTERM)
        return language_model_loss(model, batch)

    assert in_processes(1, toy_train, folder=tmp_path, loss=loss, **SETTINGS) == [143]
    assert in_processes(1, toy_train, folder=tmp_path, from_resume=1, **SETTINGS) == [0]
    assert_as_if_uninterrupted(tmp_path, uninterrupted)


def test_恰在轮末与全程末尾续训(tmp_path):
    settings = {"rows": 8, "accumulation_steps": 2, "epochs": 3}
    toy_train(tmp_path / "whole", **settings)
    part = tmp_path / "part"
    codes = in_processes(1, train_and_die, folder=part, die_at_call=4, signum=signal.SIGTERM, **settings)
    assert codes == [143] and load_file(part / "checkpoints" / "toy_64_resume.pth")["epoch"] == 1
    toy_train(part, from_resume=1, **settings)
    assert_same_weights(saved_model(part), saved_model(tmp_path / "whole"))
    again = toy_train(part, from_resume=1, **settings)  # 已训练完，再续一次什么也不变
    assert again.step == 6
    assert_same_weights(saved_model(part), saved_model(tmp_path / "whole"))
    longer = toy_train(part, from_resume=1, **{**settings, "epochs": 4})
    assert longer.step == 8


def test_没有存档时从头开始(tmp_path, capsys):
    toy_train(tmp_path, from_resume=1, max_steps=1)
    assert "从头开始" in capsys.readouterr().err


def test_续训存档的内容(tmp_path):
    toy_train(tmp_path, model={"dropout": 0.1}, max_steps=3)
    data = load_file(tmp_path / "checkpoints" / "toy_64_resume.pth")  # weights_only=True
    for key in ("model", "optimizer", "scaler", "epoch", "step", "world_size", "wandb_id", "rng", "config"):
        assert key in data
    assert data["format_version"] == 1 and data["step"] == 3 and data["world_size"] == 1
    assert all(v.dtype == torch.float32 for v in data["model"].values())
    assert set(data["model"]) == set(tiny_model().state_dict())
    # fp16 装不下的小更新也在：存档与内存里的权重逐位相同
    assert any(not torch.equal(v, v.half().float()) for v in data["model"].values())


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model": {"num_attention_heads": 8}}, r"num_attention_heads 存档里是 4、现在是 8"),
        ({"model": {"arch": "v3"}}, "arch"),
        ({"rows": 20}, r"训练行数 存档里是 22、现在是 20"),
        ({"optimizer": "adamw"}, r"--optimizer 存档里是 'muon'、现在是 'adamw'"),
        ({"seed": 1}, r"--seed 存档里是 42、现在是 1"),
        ({"weight_decay": 0.3}, "--weight_decay"),
    ],
)
def test_设置变了续训报错并指出哪里变了(tmp_path, changes, words):
    toy_train(tmp_path, max_steps=1)
    with pytest.raises(UserError, match=words):
        toy_train(tmp_path, from_resume=1, **changes)


def test_自动选的精度写进存档_续训沿用(tmp_path, monkeypatch):
    from minimind.trainer import setup

    def choose(dtype):
        monkeypatch.setattr(setup, "choose_dtype", lambda *_: dtype)

    choose(torch.bfloat16)
    toy_train(tmp_path, dtype="auto", max_steps=2)
    choose(torch.float32)  # 这回机器正忙，测出来的结果相反
    toy_train(tmp_path, dtype="auto", from_resume=1, max_steps=4)
    assert load_file(tmp_path / "checkpoints" / "toy_64_resume.pth")["numerics"]["dtype"] == "bfloat16"


def test_配方自己的状态随存档走(tmp_path):
    class Counter:
        def __init__(self):
            self.value = 0

        def state_dict(self):
            return {"value": self.value}

        def load_state_dict(self, state):
            self.value = state["value"]

    def run(counter, **changes):
        def loss(model, batch):
            counter.value += 1
            return language_model_loss(model, batch)

        args = tiny_args(tmp_path, **changes)
        recipe = toy_recipe(loss, extra_state={"tracker": counter})
        train(args, recipe, tiny_model(), None, Data(ToyRows()))

    run(Counter(), max_steps=4)
    resumed = Counter()
    run(resumed, max_steps=6, from_resume=1)
    assert resumed.value == 6


def train_recording(folder, seen, kill_at=None, **settings):
    """训练并记下用过的样本；``kill_at`` 步收到 SIGTERM（只发给一个进程，另一个要跟着停）。"""
    record_samples(seen)
    die = {"die_at_call": kill_at, "signum": signal.SIGTERM} if os.environ.get("RANK", "0") == "0" else {}
    train_and_die(folder, **die, **settings)


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_进程数变了每轮每个样本仍恰好一次(tmp_path, before, after):
    """25 行：两个进程时末尾只剩 1 行，有一个进程分不到样本。"""
    seen, settings = tmp_path / "seen.txt", {"rows": 25, "epochs": 2, "accumulation_steps": 2}
    codes = in_processes(
        before, train_recording, folder=tmp_path, seen=seen, kill_at=5, log=tmp_path / "a.txt", **settings
    )
    assert codes == [143] * before, (tmp_path / "a.txt").read_text()
    codes = in_processes(
        after, train_recording, folder=tmp_path, seen=seen, from_resume=1, log=tmp_path / "b.txt", **settings
    )
    assert codes == [0] * after, (tmp_path / "b.txt").read_text()
    assert f"进程数由 {before} 变为 {after}" in (tmp_path / "b.txt").read_text()
    used = sorted(tuple(map(int, line.split())) for line in seen.read_text().splitlines())
    assert used == [(epoch, i) for epoch in range(2) for i in range(25)]


def test_第二次CtrlC立即离开(tmp_path):
    def slow(model, batch):
        if model.training:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        return language_model_loss(model, batch)

    assert in_processes(1, toy_train, folder=tmp_path, loss=slow, accumulation_steps=3) == [130]
    assert not (tmp_path / "checkpoints").exists()  # 没走完这一步，没有存盘


def change_archive(path, change):
    data = load_file(path)
    change(data)
    torch.save(data, path)


def shorten(data):
    key = "model.layers.0.self_attn.q_proj.weight"
    data["model"][key] = data["model"][key][:-1]


def poison(data):
    data["model"]["model.norm.weight"] = data["model"]["model.norm.weight"] * float("nan")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda data: data.pop("model"), "没有 model"),
        (lambda data: data.pop("optimizer"), "没有 optimizer"),
        (lambda data: data.pop("world_size"), "没有 world_size"),
        (lambda data: data.update(args=None), "args 是 NoneType"),
        (lambda data: data.update(identity="x"), "identity 是 str"),
        (lambda data: data.update(rng=None), "rng 是 NoneType"),
        (lambda data: data["progress"].update(step=-5), "progress"),
        (lambda data: data["progress"].pop("step"), "progress"),
        (lambda data: data["progress"].update(别的=1), "progress"),
        (lambda data: data["model"].pop("model.norm.weight"), "缺少 1 个键.*model.norm.weight"),
        (shorten, r"q_proj.weight 的形状是 \(63, 64\).*\(64, 64\)"),
        (poison, "model.norm.weight.*NaN"),
        (lambda data: data.update(optimizer={}), "optimizer 与现在的对不上"),
    ],
)
def test_存档缺一块或被改过_说是哪一块_不是调用栈(tmp_path, change, words):
    toy_train(tmp_path, max_steps=1)
    path = tmp_path / "checkpoints" / "toy_64_resume.pth"
    change_archive(path, change)
    before = path.read_bytes()
    with pytest.raises(UserError, match=words):
        toy_train(tmp_path, from_resume=1, max_steps=2)
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["checkpoints/toy_64_resume.pth", "out/toy_64.pth", "out/toy_64.json"])
@pytest.mark.parametrize("from_resume", [0, 1])
def test_要写文件的地方是文件夹_走第一步之前就说(tmp_path, name, from_resume):
    (tmp_path / name).mkdir(parents=True)
    with pytest.raises(UserError, match="文件夹"):
        toy_train(tmp_path, from_resume=from_resume, max_steps=1)
    log = tmp_path / "out" / "logs" / "toy_64.jsonl"
    assert not log.exists() or not log.read_text()
