"""训练途中的样例：九个配方都有，打印也写进日志；有没有它，权重逐位相同；强化学习看最好、居中、最差。"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from recipe_cases import CASES, log_lines, run_recipe, saved, weights_file
from trainer_helpers import in_processes

from minimind.report.logs import read_log
from minimind.report.training import summarize
from minimind.trainer.samples import read_prompts

RECIPES = list(CASES)


def run(case, world, home, **changes) -> list[dict]:
    assert case.main()(case.argv(world, **changes)) == 0
    return log_lines(home, case, "_moe" if changes.get("use_moe") else "")


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or a != a


@pytest.mark.parametrize("recipe", RECIPES)
def test_十个配方都有样例_权重随机数日志与没有时逐位相同(recipe, world, home, tmp_path, monkeypatch, capsys):
    case, second = CASES[recipe], shutil.copytree(home, tmp_path / "second")  # SFT 会改写自己的起点
    plain_log = run(case, world, home)
    state = saved(home, case)
    weights = torch.load(weights_file(home, case), weights_only=True)
    capsys.readouterr()

    monkeypatch.chdir(second)
    log = run(case, world, second, sample_prompts=2)
    assert "样例｜" in capsys.readouterr().err
    assert [line for line in log if "samples" not in line] == plain_log
    shown = [line for line in log if "samples" in line]
    assert [line["step"] for line in shown] == [4, 5]
    for line in shown:
        assert len(line["samples"]) == 2 and all(
            one.keys() == {"prompt", "answer"} for one in line["samples"]
        )
    assert {one["prompt"] for one in shown[0]["samples"]} == {one["prompt"] for one in shown[1]["samples"]}
    assert same(weights, torch.load(weights_file(second, case), weights_only=True))
    again = saved(second, case)
    for part in ("model", "optimizer", "rng", "vitals", "recipe_state"):
        assert same(state[part], again[part]), part
    reward = "rollouts" in shown[0]
    assert reward == (recipe in ("ppo", "grpo", "spo", "agent"))


@pytest.mark.parametrize("recipe", ["ppo", "grpo", "spo"])
def test_强化学习_最好居中最差_各条奖励合得上总分(recipe, world, home, capsys):
    case = CASES[recipe]
    spec = f"{world / 'reward.py'}:score:0.5,length(1-3):0.25"
    changes = {"reward": spec} | ({"reward_low": -1, "reward_high": 1} if recipe == "spo" else {})
    shown = [line for line in run(case, world, home, sample_prompts=1, **changes) if "samples" in line]
    printed = capsys.readouterr().err
    for line in shown:
        best, median, worst = line["rollouts"]
        assert [one["kind"] for one in line["rollouts"]] == ["best", "median", "worst"]
        assert best["reward"] >= median["reward"] >= worst["reward"]
        for one in line["rollouts"]:
            weights = [0.25 if name.startswith("length") else 0.5 for name in one["parts"]]
            assert len(weights) == 2
            total = sum(w * value for w, value in zip(weights, one["parts"].values()))
            assert one["reward"] == pytest.approx(total, abs=1e-3)
        assert set(line["tasks"]) and all(0 <= value <= 1 for value in line["tasks"].values())
    for word in ("采样·最好｜", "采样·居中｜", "采样·最差｜"):
        assert word in printed


def test_混合专家_带着各专家的份额(world, home):
    shown = [
        line for line in run(CASES["full_sft"], world, home, use_moe=1, sample_prompts=1) if "samples" in line
    ]
    load = shown[-1]["expert_load"]
    assert len(load) == 2 and all(sum(layer) == pytest.approx(1, abs=1e-3) for layer in load)


def test_自己的提示_强化学习也答它(world, home):
    (home / "问.txt").write_text("\ufeff你是谁？\n\n  1+1=  \n", "utf-8")
    for recipe in ("pretrain", "grpo"):
        shown = [
            line for line in run(CASES[recipe], world, home, sample_prompts="问.txt") if "samples" in line
        ]
        assert [one["prompt"] for one in shown[0]["samples"]] == ["你是谁？", "1+1="]


@pytest.mark.parametrize(
    ("value", "content", "words"),
    [
        ("没有.txt", None, "不存在"),
        ("-1", None, "不存在"),
        ("99", None, "--sample_prompts：值是 99"),
        ("空.txt", "\n \n", "有 0 个提示"),
        ("多.txt", "问\n" * 65, "有 65 个提示"),
        ("长.txt", "很" * 40_000, "放不进模型的上下文"),
    ],
)
def test_写错了训练之前就说清(world, home, capsys, value, content, words):
    if content is not None:
        (home / value).write_text(content, "utf-8")
    assert CASES["pretrain"].main()(CASES["pretrain"].argv(world, sample_prompts=value)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert words in error and "修复办法" in error
    assert not list((home / "out").glob("pretrain_64.pth"))


def test_一行一个_只在换行处分(tmp_path):
    """别处拷来的文字里有 U+2028、U+0085：仍是一个提示；行尾的回车与 BOM 不算。"""
    path = tmp_path / "问.txt"
    path.write_bytes("\ufeff甲\u2028乙\r\n\r\n丙\x85丁\x0b戊\n".encode())
    assert read_prompts(str(path), plain=True) == ["甲\u2028乙", "丙\x85丁\x0b戊"]


@pytest.mark.parametrize(("ratio", "told"), [("0", True), ("0.2", False)])
def test_没有验证集时_自己的提示不会作答_说一声(world, home, capsys, ratio, told):
    (home / "问.txt").write_text("从前有\n", "utf-8")
    flags = {"sample_prompts": "问.txt", "val_path": None, "val_ratio": ratio, "eval_interval": 2}
    argv = CASES["pretrain"].argv(world, **flags)
    assert CASES["pretrain"].main()(argv) == 0
    said = capsys.readouterr().err
    assert ("样例随验证来" in said) == told and ("样例｜从前有" in said) == (not told)


def test_不是utf8的文件说清(world, home, capsys):
    (home / "gbk.txt").write_bytes("你好".encode("gbk"))
    assert CASES["pretrain"].main()(CASES["pretrain"].argv(world, sample_prompts="gbk.txt")) == 2
    assert "不是 UTF-8" in capsys.readouterr().err


def test_停在样例与验证之间_续训补上验证_样例不重复(world, home):
    case = CASES["full_sft"]
    whole = run(case, world, home, sample_prompts=2)
    path = home / "out" / "logs" / "full_sft_64.jsonl"
    lines = path.read_text("utf-8").splitlines(keepends=True)
    assert "val_loss" in json.loads(lines[-1]) and "samples" in json.loads(lines[-2])
    path.write_text("".join(lines[:-1]), "utf-8")
    assert run(case, world, home, sample_prompts=2, from_resume=1) == whole


def test_两个进程_只有主进程作答_步调一致(world, home):
    case = CASES["grpo"]
    argv = case.argv(world, sample_prompts=2)
    assert in_processes(2, run_recipe, case=case, folder=home, argv=argv) == [0, 0]
    shown = [line for line in log_lines(home, case) if "samples" in line]
    assert [line["step"] for line in shown] == [4, 5] and all(len(line["rollouts"]) == 3 for line in shown)


def test_读日志与报告的照旧(world, home):
    run(CASES["full_sft"], world, home, sample_prompts=2)
    records = read_log(home / "out" / "logs" / "full_sft_64.jsonl")
    assert summarize(records).startswith("5 步")
