"""训练循环的算术：归一化、累积、末尾的短窗口、坏步、日志。"""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from torch.nn import functional as F
from trainer_helpers import (
    ToyRows,
    assert_same_weights,
    saved_model,
    stack,
    tiny_args,
    tiny_model,
    toy_recipe,
    toy_train,
)

from minimind.errors import UserError
from minimind.runtime.checkpoint import load_file
from minimind.trainer import journal
from minimind.trainer.loader import epoch_order
from minimind.trainer.loop import train
from minimind.trainer.optim import build_optimizer, set_learning_rate
from minimind.trainer.progress import lr_at
from minimind.trainer.recipe import Data, language_model_loss


def read_lines(result) -> list[dict]:
    return [json.loads(line) for line in result.log.read_text().splitlines()]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.compat
def test_与手写的整批训练一致_末尾短窗口也走一步(tmp_path, optimizer):
    """4 × 累积 2 等于手写的一次 8 行；22 行分成 8+8+6，末尾那个窗口按它自己的目标数归一。"""
    # AdamW 头几步的更新约为 lr·sign(梯度)，近零的梯度差一点舍入就差一个 lr，所以用它常用的小学习率
    settings = {"optimizer": optimizer, "learning_rate": 5e-3 if optimizer == "muon" else 5e-4}
    toy_train(tmp_path, batch_size=2, accumulation_steps=4, epochs=2, **settings)

    args, model, rows = tiny_args(tmp_path, **settings), tiny_model(), ToyRows(22)
    by_hand = build_optimizer(model, args, newton_schulz_dtype="float32")
    done = 0
    for epoch in range(2):
        order = epoch_order(22, args.seed, epoch)
        for start in range(0, 22, 8):
            batch = stack([rows[int(i)] for i in order[start : start + 8]])
            logits = model(batch["input_ids"]).logits[:, :-1].flatten(0, 1)
            loss = F.cross_entropy(logits, batch["labels"][:, 1:].flatten())  # 对全部目标取平均
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
            size = len(batch["labels"])
            set_learning_rate(by_hand, lr_at(done + size / 2, 44, peak=args.learning_rate))
            by_hand.step()
            by_hand.zero_grad()
            done += size
    for key, value in saved_model(tmp_path).items():
        torch.testing.assert_close(value, model.state_dict()[key], atol=1e-5, rtol=0)


def test_累积4乘2等于一次8(tmp_path):
    toy_train(tmp_path / "a", batch_size=2, accumulation_steps=4, epochs=3)
    toy_train(tmp_path / "b", batch_size=8, accumulation_steps=1, epochs=3)
    a, b = saved_model(tmp_path / "a"), saved_model(tmp_path / "b")
    assert max((a[k] - b[k]).abs().max() for k in a) < 1e-5


def test_每步的损失是全局目标上的平均(tmp_path):
    result = toy_train(tmp_path, batch_size=2, accumulation_steps=4, learning_rate=0.0, weight_decay=0.0)
    model, rows, order = tiny_model(), ToyRows(22), epoch_order(22, 42, 0)
    logged = [line["loss"] for line in read_lines(result)]
    for step, start in enumerate(range(0, 22, 8)):
        batch = stack([rows[int(i)] for i in order[start : start + 8]])
        logits = model(batch["input_ids"]).logits[:, :-1].flatten(0, 1)
        expected = F.cross_entropy(logits, batch["labels"][:, 1:].flatten()).item()
        assert logged[step] == pytest.approx(expected, rel=1e-5)
    assert len(logged) == 3


def test_记录区间的损失按目标数加权(tmp_path):
    fine = read_lines(toy_train(tmp_path / "a", log_interval=1, learning_rate=0.0, weight_decay=0.0))
    rough = read_lines(toy_train(tmp_path / "b", log_interval=4, learning_rate=0.0, weight_decay=0.0))
    order, targets = epoch_order(22, 42, 0), ToyRows(22).targets.clamp(max=11)
    weight = [float(targets[order[2 * i : 2 * i + 2]].sum()) for i in range(11)]
    assert [line["step"] for line in rough] == [4, 8, 11]
    for line, steps in zip(rough, [range(4), range(4, 8), range(8, 11)]):
        mean = sum(fine[i]["loss"] * weight[i] for i in steps) / sum(weight[i] for i in steps)
        assert line["loss"] == pytest.approx(mean, rel=1e-9)


def test_子进程读数据不改变结果(tmp_path):
    toy_train(tmp_path / "a", num_workers=0, epochs=2, model={"dropout": 0.1})
    toy_train(tmp_path / "b", num_workers=2, epochs=2, model={"dropout": 0.1})
    assert_same_weights(saved_model(tmp_path / "a"), saved_model(tmp_path / "b"))


def test_种子决定结果(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        toy_train(tmp_path / name, seed=seed)
    assert_same_weights(saved_model(tmp_path / "a"), saved_model(tmp_path / "b"))
    with pytest.raises(AssertionError):
        assert_same_weights(saved_model(tmp_path / "a"), saved_model(tmp_path / "c"))


def test_没有目标的窗口不动权重也没有NaN(tmp_path, capsys):
    rows = ToyRows(4)
    rows.targets[:] = 0
    before = tiny_model().state_dict()
    result = train(tiny_args(tmp_path), toy_recipe(), tiny_model(), None, Data(rows))
    assert_same_weights(saved_model(tmp_path), before)
    assert [line["loss"] for line in read_lines(result)] == [None, None]
    assert "不是有限数" not in capsys.readouterr().err


def test_混合专家的辅助损失按目标数加权并记录(tmp_path):
    result = toy_train(tmp_path, model={"use_moe": True})
    lines = read_lines(result)
    assert result.weights.name == "toy_64_moe.pth"
    for line in lines:
        assert line["loss"] == pytest.approx(line["ce"] + line["aux_loss"], rel=1e-6)
        assert line["aux_loss"] > 0


def bad_loss(bad_calls: set[int], mode: str):
    """第 k 次调用时给出坏损失的损失函数。"""
    calls = {"n": -1}

    def compute(model, batch):
        loss, metrics = language_model_loss(model, batch)
        calls["n"] += model.training
        if calls["n"] in bad_calls:
            loss = loss * math.nan if mode == "loss" else loss + BadGradient.apply(loss)
        return loss, metrics

    return compute


class BadGradient(torch.autograd.Function):
    """值为 0、梯度为无穷。"""

    @staticmethod
    def forward(ctx, x):
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx, grad):
        return torch.full_like(grad, math.inf)


@pytest.mark.parametrize("mode", ["loss", "grad"])
def test_坏步跳过并点名样本(tmp_path, capsys, mode):
    result = toy_train(tmp_path, loss=bad_loss({4, 6}, mode), epochs=1)
    order = epoch_order(22, 42, 0)
    err = capsys.readouterr().err
    for call in (4, 6):
        names = "、".join(str(int(i)) for i in sorted(order[2 * call : 2 * call + 2]))
        assert f"第 {call + 1} 步" in err and names in err
    assert result.step == 11
    assert all(torch.isfinite(v).all() for v in saved_model(tmp_path).values())
    skipped = [line["step"] for line in read_lines(result) if line.get("skipped_steps")]
    assert skipped == [5, 7]


def test_连续三步坏就停_上一个存档完好(tmp_path):
    with pytest.raises(UserError, match=r"第 7 步.*连续 3 步.*learning_rate.*--from_resume 1"):
        toy_train(tmp_path, loss=bad_loss({4, 5, 6}, "loss"), save_interval=4)
    data = load_file(tmp_path / "checkpoints" / "toy_64_resume.pth")
    assert data["step"] == 4 and all(torch.isfinite(v).all() for v in data["model"].values())


def test_坏步之后的权重等于没有那一步(tmp_path):
    """坏步连动量都不动：跳过第 3 步，与只走前两步的权重相同。"""
    toy_train(
        tmp_path / "a", loss=bad_loss({2}, "grad"), max_steps=3, schedule="wsd", warmup_ratio=0, decay_ratio=0
    )
    toy_train(tmp_path / "b", max_steps=2, schedule="wsd", warmup_ratio=0, decay_ratio=0)
    assert_same_weights(saved_model(tmp_path / "a"), saved_model(tmp_path / "b"))


def test_float16的溢出由缩放器处理不算坏步(tmp_path, capsys):
    calls = {"n": 0}

    def overflow_first(model, batch):
        loss, metrics = language_model_loss(model, batch)
        calls["n"] += 1
        return loss * (1e5 if calls["n"] <= 4 else 1.0), metrics  # 前四步的梯度乘缩放系数后溢出

    result = toy_train(tmp_path, dtype="float16", loss=overflow_first)
    assert "不是有限数" not in capsys.readouterr().err
    data = load_file(tmp_path / "checkpoints" / "toy_64_resume.pth")
    assert data["scaler"]["scale"] < 65536
    assert result.step == 11 and all(torch.isfinite(v).all() for v in data["model"].values())
    initial = tiny_model().state_dict()
    assert any(not torch.equal(v, initial[k]) for k, v in data["model"].items())


def test_带权重的目标按权重归一(tmp_path):
    class Weighted(ToyRows):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            return {**item, "loss_weights": torch.where(item["input_ids"] > 50, 10.0, 1.0)}

    args = tiny_args(tmp_path, batch_size=11, learning_rate=0.0, weight_decay=0.0)
    result = train(args, toy_recipe(), tiny_model(), None, Data(Weighted(22)))
    model, rows, order = tiny_model(), Weighted(22), epoch_order(22, 42, 0)
    batch = stack([rows[int(i)] for i in order[:11]])
    logp = model(batch["input_ids"]).logits[:, :-1].log_softmax(-1)
    labels, weight = batch["labels"][:, 1:], batch["loss_weights"][:, 1:] * (batch["labels"][:, 1:] != -100)
    nll = -logp.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    expected = ((nll * weight).sum() / weight.sum()).item()
    assert read_lines(result)[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_验证前已存盘_验证崩了也不丢(tmp_path):
    def explode(model, step):
        raise RuntimeError("评测坏了")

    args = tiny_args(tmp_path, max_steps=3)
    with pytest.raises(RuntimeError, match="评测坏了"):
        train(args, toy_recipe(on_eval=explode), tiny_model(), None, Data(ToyRows()))
    assert (tmp_path / "out" / "toy_64.pth").is_file()
    assert saved_model(tmp_path)


def test_验证不影响训练(tmp_path):
    toy_train(tmp_path / "a", model={"dropout": 0.2}, epochs=2)

    def sample(model, step):
        torch.rand(5)
        return {"score": 1.0}

    args = tiny_args(tmp_path / "b", eval_interval=2, epochs=2)
    recipe, data = toy_recipe(on_eval=sample), Data(ToyRows(), ToyRows(5, 1))
    result = train(args, recipe, tiny_model(dropout=0.2), None, data)
    assert_same_weights(saved_model(tmp_path / "a"), saved_model(tmp_path / "b"))
    assert result.metrics["score"] == 1.0 and result.metrics["val_loss"] > 0
    sidecar = json.loads((tmp_path / "b" / "out" / "toy_64.json").read_text())
    assert sidecar["metrics"]["val_loss"] == result.metrics["val_loss"] and sidecar["step"] == 22


def test_空数据报错(tmp_path):
    with pytest.raises(UserError, match="空的"):
        train(tiny_args(tmp_path), toy_recipe(), tiny_model(), None, Data(ToyRows(0)))


def test_终端里打印的就是日志里写下的(tmp_path, capsys):
    """人看的是那一行：损失、学习率与附加的指标都要和 JSON 里的相同，一段一段都是。"""
    lines = read_lines(toy_train(tmp_path, log_interval=2, max_steps=6, save_interval=0))
    printed = re.findall(r"步 loss (\S+) lr (\S+) ", capsys.readouterr().err)
    trained = [line for line in lines if "loss" in line]
    assert len(trained) == 3
    assert printed == [(f"{line['loss']:.4f}", f"{line['lr']:.2e}") for line in trained]


def test_全程用时早早就说_只说一次(tmp_path, capsys, monkeypatch):
    """日志间隔再长也不等：走过三步就说；一步就要几十秒的，走完头一步就说。"""
    settings = {"log_interval": 100, "max_steps": 6}
    toy_train(tmp_path / "a", **settings)
    lines = capsys.readouterr().err.splitlines()
    told = [i for i, line in enumerate(lines) if "本次全程约" in line]
    logged = [i for i, line in enumerate(lines) if "步 loss" in line]
    assert len(told) == 1 and told[0] < logged[0]
    toy_train(tmp_path / "b", **{**settings, "max_steps": 2})
    assert "本次全程约" not in capsys.readouterr().err  # 两步就完的不用说
    monkeypatch.setattr(journal, "SLOW_SECONDS", 0.0)
    toy_train(tmp_path / "c", **{**settings, "max_steps": 2})
    assert capsys.readouterr().err.count("本次全程约") == 1
