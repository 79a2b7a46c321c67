"""循环的几个钩子：一步更新几次、记指标、健康提示、只存一部分权重、按前缀定学习率。"""

from __future__ import annotations

import json

import pytest
import torch
from trainer_helpers import (
    ToyRows,
    assert_same_weights,
    saved_model,
    tiny_args,
    tiny_model,
    toy_recipe,
    toy_train,
)

from minimind.runtime.checkpoint import load_file
from minimind.trainer.loop import train
from minimind.trainer.recipe import Data, count_targets, language_model_loss


def run_with(folder, *, args=None, **hooks):
    settings = tiny_args(folder, **(args or {}))
    return train(settings, toy_recipe(**hooks), tiny_model(), None, Data(ToyRows(8)))


def lines(result):
    return [json.loads(line) for line in result.log.read_text().splitlines()]


def test_原样交出窗口等于没有钩子(tmp_path):
    run_with(tmp_path / "a", prepare=lambda run, window: [window])
    toy_train(tmp_path / "b", rows=8)
    assert_same_weights(saved_model(tmp_path / "a"), saved_model(tmp_path / "b"))


def test_一步更新两次_学习率与步数按步算(tmp_path):
    """每步把窗口交出两遍，等于把同一批样本各训练两次；第二遍开始时第一遍已经更新完。"""
    seen = []

    def twice(run, window):
        for _ in range(2):
            seen.append(float(next(run.model.parameters()).detach().abs().sum()))
            yield window

    result = run_with(tmp_path, prepare=twice)
    assert result.step == 4 and [line["step"] for line in lines(result)] == [1, 2, 3, 4]
    assert len(set(seen)) == 8, "每次更新之间权重都变了"


def test_一窗也不交出的步不动权重也不报错(tmp_path):
    result = run_with(tmp_path, prepare=lambda run, window: [])
    assert result.step == 4
    assert_same_weights(saved_model(tmp_path), dict(tiny_model().state_dict()))


def test_指标取区间平均_健康提示逐句打印(tmp_path, capfd):
    rewards = iter([1.0, 2.0, 3.0, 6.0])

    def prepare(run, window):
        run.record(reward=(next(rewards), 2))
        yield window

    def health(record):
        return ["奖励没有起伏。"] if record["reward"] < 1.0 else []

    result = run_with(tmp_path, args={"log_interval": 2}, prepare=prepare, health=health)
    assert [line["reward"] for line in lines(result)] == [0.75, 2.25]
    output = capfd.readouterr()
    assert (output.out + output.err).count("留意：奖励没有起伏。") == 1


def test_分母只由count给(tmp_path):
    """数成两倍，损失与梯度都减半；指标没有自带分母的也除以它，自带的不管。"""

    def loss(model, batch):
        total, _ = language_model_loss(model, batch)
        return total, {"ce": total.detach(), "own": (total.detach(), 1)}

    options = {"max_steps": 1, "batch_size": 8}
    once = lines(run_with(tmp_path / "a", args=options, loss=loss))[0]
    twice = lines(run_with(tmp_path / "b", args=options, loss=loss, count=lambda b: 2 * count_targets(b)))[0]
    for name, ratio in (("loss", 2), ("grad_norm", 2), ("ce", 2), ("own", 1)):
        assert once[name] == pytest.approx(ratio * twice[name], rel=1e-5), name


def test_只存指定的张量_续训存档仍是全部(tmp_path):
    target = tmp_path / "out" / "lora" / "部分_64.pth"
    result = run_with(tmp_path, weights=target, weights_of=lambda model: {"norm": model.model.norm.weight})
    assert result.weights == target
    assert list(load_file(target)) == ["norm"] and load_file(target)["norm"].dtype == torch.float16
    assert "lm_head.weight" in saved_model(tmp_path)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_前缀的倍数为零则那些参数不动(tmp_path, optimizer):
    before = tiny_model().state_dict()
    run_with(tmp_path, args={"optimizer": optimizer}, lr_scales={"model.layers.0.": 0.0})
    after = saved_model(tmp_path)
    still = [key for key in after if torch.equal(after[key], before[key])]
    assert still and all(key.startswith("model.layers.0.") for key in still)
    assert sum(key.startswith("model.layers.0.") for key in after) == len(still)
