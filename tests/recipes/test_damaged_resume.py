"""配方自己放进续训存档的（参考模型的起点、价值网络、记分牌）少了一块、换了样子：拒绝，说是哪一样，存档不动。

每一例都从真的续训存档改起；训练循环共有的见 tests/trainer/test_intact.py。
"""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from recipe_cases import CASES
from trainer_helpers import assert_same_weights

from minimind.runtime.checkpoint import load_file

pytestmark = pytest.mark.usefixtures("cache")
NORM = "model.norm.weight"
CHANGES = {"ppo": {}, "spo": {"beta": 0.1}, "grpo": {"beta": 0.1}, "lora": {}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """配方 → 训练过两步的目录，用到才训练。"""
    return {}, tmp_path_factory


def main(recipe, world, **changes):
    case = CASES[recipe]
    return case.main()(case.argv(world, **CHANGES[recipe], **changes)) or 0


@pytest.fixture
def trained(folders, base, world, monkeypatch):
    done, make = folders

    def get(recipe):
        if recipe not in done:
            done[recipe] = shutil.copytree(base, make.mktemp("trained") / recipe)
            monkeypatch.chdir(done[recipe])
            assert main(recipe, world, max_steps=2) == 0
        return done[recipe]

    return get


def start_of(data):
    return data["recipe_state"]["start"]


def tracker(data):
    return data["recipe_state"]["tracker"]


def old(change):
    """从前的存档没有清单，也要看得出来。"""

    def both(data):
        data.pop("contents")
        change(data)

    return both


def forget_answers(data):
    """记分牌还在，每个提示的上一条回答空了。"""
    for name in ("prompts", "lengths", "ids", "logps"):
        tracker(data)[name] = tracker(data)[name][:0]


def empty_critic(data):
    """价值网络（``lr_scales`` 里它自成一组）的动量空了，策略的还在。"""
    muon = data["optimizer"]["muon"]
    for index in muon["param_groups"][1]["params"]:
        muon["state"].pop(index)


DAMAGED = {
    "ppo": [
        (lambda d: d["model"].pop("critic.value_weight"), "缺少 1 个键（如 critic.value_weight）"),
        (lambda d: [d["model"].pop(n) for n in [*d["model"]] if n.startswith("critic.")], "缺少 .*（如 critic."),
        (empty_critic, "optimizer 与存盘时的对不上：少了 14 样（如 optimizer/muon/state/14/momentum_buffer）"),
        (lambda d: start_of(d).clear(), "recipe_state/start：缺少 "),
        (lambda d: start_of(d).pop(NORM), "recipe_state/start：缺少 1 个键（如 model.norm.weight）"),
        (lambda d: start_of(d).update({NORM: torch.ones(3)}), r"start：model.norm.weight 的形状是 \(3,\)"),
        (lambda d: start_of(d)[NORM].fill_(float("nan")), "start：model.norm.weight .*NaN"),
        (lambda d: d["recipe_state"].update(start=None), "recipe_state/start：里面不是普通的权重字典"),
        (lambda d: d["recipe_state"].pop("start"), "recipe_state 的 start|recipe_state/start"),
        (lambda d: d.update(recipe_state=[]), "recipe_state 是 list"),
        (old(lambda d: start_of(d).clear()), "recipe_state/start：缺少 "),
    ],
    "grpo": [(lambda d: d["recipe_state"].clear(), "recipe_state")],
    "spo": [
        (lambda d: d["recipe_state"].pop("tracker"), "recipe_state"),
        (lambda d: tracker(d).clear(), "recipe_state"),
        (lambda d: tracker(d).update(alpha=tracker(d)["alpha"][:3]), "recipe_state/tracker/alpha"),
        (forget_answers, "recipe_state/tracker/prompts"),
        (old(lambda d: tracker(d).update(alpha=tracker(d)["alpha"][:3])), "存档里有 3 个提示"),
        (old(lambda d: tracker(d).update(beta=tracker(d)["beta"][:3])), "recipe_state 的 tracker"),
        (old(lambda d: tracker(d)["beta"].fill_(float("nan"))), "tracker 与现在的对不上.*alpha、beta 里有 NaN"),
        (old(forget_answers), r"tracker 与现在的对不上.*第 \d+ 个提示观察过，却没有它的上一条回答"),
        (old(lambda d: tracker(d).update(logps=tracker(d)["logps"][:-1])), "recipe_state 的 tracker"),
    ],
    "lora": [(lambda d: d["optimizer"]["state"].clear(), "optimizer 与存盘时的对不上：少了")],
}  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "number"), [(name, i) for name in DAMAGED for i in range(len(DAMAGED[name]))]
)
def test_配方的状态少了空了换了样子_拒绝(recipe, number, trained, world, tmp_path, monkeypatch, capsys):
    change, words = DAMAGED[recipe][number]
    folder = shutil.copytree(trained(recipe), tmp_path / "run")
    path = folder / "checkpoints" / f"{CASES[recipe].weight}_64_resume.pth"
    data = load_file(path)
    change(data)
    torch.save(data, path)
    before = path.read_bytes()
    monkeypatch.chdir(folder)
    capsys.readouterr()
    assert main(recipe, world, max_steps=3, from_resume=1) == 2
    error = capsys.readouterr().err
    assert re.search(words, error) and path.name in error and "重新训练" in error, error
    assert "Traceback" not in error and path.read_bytes() == before


@pytest.mark.parametrize("recipe", ["ppo", "spo"])
def test_从前的没有清单的存档照样续_逐位相同(recipe, trained, world, tmp_path, monkeypatch):
    found = []
    for name, change in (("new", lambda data: None), ("old", old(lambda data: None))):
        folder = shutil.copytree(trained(recipe), tmp_path / name)
        path = folder / "checkpoints" / f"{CASES[recipe].weight}_64_resume.pth"
        data = load_file(path)
        change(data)
        torch.save(data, path)
        monkeypatch.chdir(folder)
        assert main(recipe, world, max_steps=3, from_resume=1) == 0
        found.append(load_file(path))
    assert found[0]["step"] == 3
    assert_same_weights(found[0]["model"], found[1]["model"])
