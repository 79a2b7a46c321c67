"""体征：没有在学的几种样子，各说一句，说一次；只看不改，权重与没有体征时相同。"""

from __future__ import annotations

import json
import math

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

from minimind.model import MiniMindForCausalLM
from minimind.trainer import vital_signs
from minimind.trainer.loop import train
from minimind.trainer.recipe import Data, count_targets, language_model_loss
from minimind.trainer.vital_signs import (
    empty_updates,
    learned_nothing,
    no_gradient,
    no_learning_rate,
    nothing_moved,
    part_of,
    zero_parts,
)


def lines(result):
    return [json.loads(line) for line in result.log.read_text().splitlines()]


def notes(result):
    return [(line["step"], note) for line in lines(result) for note in line.get("notes", [])]


class Learnable(ToyRows):
    """每行都是同一串数字的循环移位，学得会。"""

    def __init__(self, size: int = 60):
        super().__init__(size)
        start = torch.arange(size)[:, None] % 7
        self.ids = 3 + (start + torch.arange(self.ids.shape[1])) % 20
        self.targets[:] = self.ids.shape[1] - 1


def run(folder, model=None, loss=language_model_loss, rows=None, **changes):
    settings = {"log_interval": 5, "batch_size": 2, "learning_rate": 5e-3, "warmup_ratio": 0.1, **changes}
    data = Data(rows or Learnable())
    return train(tiny_args(folder, **settings), toy_recipe(loss), model or tiny_model(), None, data)


# ---------------------------------------------------------------- 纯函数


@pytest.mark.parametrize(
    "name, part",
    [
        ("model.embed_tokens.weight", "embed_tokens"),
        ("lm_head.weight", "lm_head"),
        ("model.norm.weight", "norm"),
        ("model.layers.3.mlp.up_proj.weight", "layers.3.mlp"),
        ("model.layers.13.self_attn.q_norm.weight", "layers.13.self_attn"),
        ("model.layers.3.input_layernorm.weight", "layers.3.input_layernorm"),
        ("model.layers.3.mlp.experts.2.up_proj.weight", "layers.3.mlp.experts.2"),
        ("model.layers.3.mlp.shared_experts.0.up_proj.weight", "layers.3.mlp.shared_experts.0"),
        ("model.layers.3.mlp.gate.weight", "layers.3.mlp.gate"),
        ("model.layers.3.mlp.gate_proj.weight", "layers.3.mlp"),
        ("model.layers.0.self_attn.q_proj.lora.A.weight", "layers.0.self_attn"),
        ("actor.model.layers.0.self_attn.q_proj.weight", "layers.0.self_attn"),
        ("critic.model.layers.0.self_attn.q_proj.weight", "critic.layers.0.self_attn"),
        ("critic.value_weight", "critic.value_weight"),
    ],
)
def test_参数属于哪一部分(name, part):
    assert part_of(name) == part


def test_整个部分是零说部分_单个矩阵是零说矩阵():
    streaks = {
        "model.layers.0.mlp.up_proj.weight": 9, "model.layers.0.mlp.down_proj.weight": 7,
        "model.layers.1.mlp.up_proj.weight": 9, "model.layers.1.mlp.down_proj.weight": 0,
        "model.layers.1.mlp.experts.0.up_proj.weight": 9,
    }  # fmt: skip
    assert zero_parts(streaks, 5) == ["layers.0.mlp", "model.layers.1.mlp.up_proj.weight"]
    assert zero_parts(streaks, 8) == [
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
    ]
    assert zero_parts({"model.norm.weight": 2}, 1) == []  # 头一两步不算
    assert zero_parts({"model.norm.weight": 3}, 1) == ["norm"]
    assert zero_parts({"model.layers.1.mlp.experts.0.up_proj.weight": 10}, 5) == ["layers.1.mlp.experts.0"]


def test_各种毛病的判断():
    stuck = {"step": 40, "loss": math.log(6400), "lr": 1e-3}
    assert "ln 6400 = 8.7641" in learned_nothing(stuck, True, 6400, True)
    assert learned_nothing(stuck, True, 6400, False) is None  # 还在预热
    assert learned_nothing(stuck, False, 6400, True) is None  # 损失不是交叉熵
    assert learned_nothing({**stuck, "loss": 0.7, "ce": 8.8}, False, 6400, True)
    assert learned_nothing({**stuck, "loss": 8.9, "ce": 7.0}, True, 6400, True) is None
    assert learned_nothing({**stuck, "loss": 8.5}, True, 6400, True) is None
    assert learned_nothing({**stuck, "loss": math.nan}, True, 6400, True) is None
    assert "embed_tokens、lm_head" in no_gradient(["embed_tokens", "lm_head"], 10)
    assert no_gradient([], 10) is None
    assert nothing_moved(0.0, 1e-9) and nothing_moved(0.0, 0.0) is None and nothing_moved(0.5, 1e-9) is None
    assert no_learning_rate({"lr": 0.0}, [0.0]) and no_learning_rate({"lr": 1e-3}, [0.0, 0.0])
    assert no_learning_rate({"lr": 1e-3}, [0.0, 1e-3]) is None
    assert "10 次更新里有 4 次" in empty_updates({"zero_grad_steps": 4}, 10)
    assert empty_updates({}, 10) is None


# ---------------------------------------------------------------- 训练循环里


@pytest.mark.parametrize(
    "model", [{}, {"arch": "v3"}, {"zero_init_residual": True}, {"use_moe": True}], ids=str
)
@pytest.mark.parametrize("log_interval", [1, 5])
def test_好好的训练什么也不说(tmp_path, capsys, model, log_interval):
    result = run(tmp_path, tiny_model(**model), log_interval=log_interval)
    assert lines(result)[-1]["loss"] < 3.5 and notes(result) == []
    assert "留意" not in capsys.readouterr().err


def test_损失停在lnV说一次(tmp_path, capsys):
    """词嵌入全是 0，每个词的概率都是 1/V，什么也学不到：30 步，六行日志，只说一次。"""
    model = tiny_model()
    torch.nn.init.zeros_(model.model.embed_tokens.weight)
    said = [
        note for _, note in notes(run(tmp_path, model)) if "仍是 4.5747，不低于瞎猜的 ln 97 = 4.5747" in note
    ]
    assert len(said) == 1 and capsys.readouterr().err.count("留意：预热过后") == 1


def test_别的损失不与lnV比_除非记了交叉熵(tmp_path):
    """损失只是大于 ln V 不算毛病：它不一定是交叉熵。"""

    def larger(model, batch):
        return language_model_loss(model, batch)[0] * 3, {}

    def with_ce(model, batch):
        total, _ = language_model_loss(model, batch)
        return total * 3, {"ce": total.detach() * 0 + 4.6 * count_targets(batch)}

    assert not any("ln 97" in note for _, note in notes(run(tmp_path / "a", loss=larger)))
    assert any("ln 97" in note for _, note in notes(run(tmp_path / "b", loss=with_ce)))


class Cut(MiniMindForCausalLM):
    """第 1 层的前馈被 detach 隔断。"""

    def __init__(self, config):
        super().__init__(config)
        mlp = self.model.layers[1].mlp
        original = mlp.forward
        mlp.forward = lambda x: original(x).detach()


def test_没有梯度的部分点名_冻结的不算(tmp_path, capsys):
    torch.manual_seed(0)
    model = Cut(tiny_model().config)
    model.model.layers[0].self_attn.requires_grad_(False)
    found = notes(run(tmp_path, model))
    assert [step for step, _ in found] == [5], "说过就不再说"
    assert found[0][1].startswith("layers.1.post_attention_layernorm、layers.1.mlp 的梯度")
    assert "layers.0" not in found[0][1]
    assert capsys.readouterr().err.count("留意") == 1


def test_一直分不到词元的专家点名(tmp_path):
    model = tiny_model(use_moe=True, n_routed_experts=4, num_experts_per_tok=1)
    original = model.model.layers[0].mlp.gate.weight
    with torch.no_grad():
        original[2] = 0.0
    gate = model.model.layers[0].mlp

    def never_third(score):
        return torch.cat([score[:, :2], score[:, 2:3] * 0, score[:, 3:]], dim=-1)

    forward = torch.Tensor.topk
    gate_forward = gate.forward

    def patched(x, valid):
        torch.Tensor.topk = lambda s, *a, **k: forward(never_third(s), *a, **k)
        try:
            return gate_forward(x, valid)
        finally:
            torch.Tensor.topk = forward

    gate.forward = patched
    found = notes(run(tmp_path, model))
    assert [step for step, _ in found] == [10] and "layers.0.mlp.experts.2" in found[0][1]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_学习率是零与太小各说一句(tmp_path, optimizer):
    settings = {"optimizer": optimizer, "weight_decay": 0.0}
    zero = notes(run(tmp_path / "a", learning_rate=0.0, **settings))
    assert any("学习率是 0" in note for _, note in zero) and not any("太小：权重" in note for _, note in zero)
    small = notes(run(tmp_path / "b", learning_rate=1e-11, **settings))
    assert any("太小：权重存成 fp16" in note for _, note in small)


def test_好了又犯才再说(tmp_path):
    sick = [True, True, False, True]

    class Sometimes:
        calls = -1

        def __call__(self, model, batch):
            loss, metrics = language_model_loss(model, batch)
            Sometimes.calls += 1
            return loss * (0.0 if sick[min(Sometimes.calls // 5, 3)] else 1.0), metrics

    found = [
        step
        for step, note in notes(run(tmp_path, loss=Sometimes(), max_steps=20))
        if "恰好是 0，已跳过" in note
    ]
    assert found == [5, 20]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_梯度恰好全是零的十步权重与优化器一位不动(tmp_path, capsys, optimizer):
    """优势全是 0 的强化学习：从前 Muon 十步把权重推出 0.50。先走五步真的，动量里有东西。"""
    calls = {"n": 0}

    def loss(model, batch):
        total, metrics = language_model_loss(model, batch)
        calls["n"] += 1
        return total * float(calls["n"] <= 5), metrics

    changes = {"optimizer": optimizer, "schedule": "wsd", "decay_ratio": 0.0, "warmup_ratio": 0.0}
    result = run(tmp_path / "a", loss=loss, max_steps=15, **changes)
    run(tmp_path / "b", max_steps=5, **changes)
    assert_same_weights(saved_model(tmp_path / "a"), saved_model(tmp_path / "b"))
    assert [line.get("zero_grad_steps", 0) for line in lines(result)] == [0, 5, 5]
    assert capsys.readouterr().err.count("恰好是 0，已跳过") == 1


def test_体征只看不改(tmp_path, monkeypatch):
    """梯度范数与 torch 自己的逐位相同；不看体征时的权重也逐位相同。"""
    toy_train(tmp_path / "a")
    monkeypatch.setattr(
        vital_signs.VitalSigns,
        "gradient_norm",
        lambda self: torch.nn.utils.get_total_norm([p.grad for p in self.params if p.grad is not None]),
    )
    monkeypatch.setattr(vital_signs.VitalSigns, "examine", lambda self, record, **rest: [])
    toy_train(tmp_path / "b")
    assert_same_weights(saved_model(tmp_path / "a"), saved_model(tmp_path / "b"))


def test_说过的话续训不再说_日志与没中断时一样(tmp_path):
    def train_to(folder, steps, **changes):
        torch.manual_seed(0)
        return run(folder, Cut(tiny_model().config), max_steps=steps, schedule="wsd", decay_ratio=0.0,
                   warmup_ratio=0.0, **changes)  # fmt: skip

    whole = train_to(tmp_path / "a", 20)
    train_to(tmp_path / "b", 8)
    resumed = train_to(tmp_path / "b", 20, from_resume=1)
    # 第一段在 8 步收尾时多写了一行
    assert notes(resumed) == notes(whole) and len(notes(whole)) == 1
    assert_same_weights(saved_model(tmp_path / "a"), saved_model(tmp_path / "b"))
