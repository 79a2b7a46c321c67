"""几种外壳、几种写法的文件按权重配起来训练：续训逐位相同，换了内容或权重就拒绝，进程数不改变份额。"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from recipe_cases import CASES

from minimind.trainer import loop

NAMES = {"user": "human", "assistant": "gpt"}


def records(world: Path, name: str, count: int) -> list[dict]:
    lines = (world / f"{name}.jsonl").read_text("utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    if name == "sft":  # 一问一答的，写成 Alpaca 与 ShareGPT 都行
        found = [r for r in found if [t["role"] for t in r["conversations"]] == ["user", "assistant"]]
        found = [r for r in found if all(set(t) == {"role", "content"} for t in r["conversations"])]
    assert len(found) >= count
    return found[:count]


def mixture(world: Path, folder: Path, name: str) -> str:
    """同一份微世界语料分成三个文件：jsonl、压缩的、JSON 数组，写法各不相同。"""
    found = records(world, name, 48)
    parts = [found[:24], found[24:40], found[40:]]
    if name == "sft":
        said = [[turn["content"] for turn in r["conversations"]] for r in parts[2]]
        parts[2] = [{"instruction": q, "input": "", "output": a} for q, a in said]
        parts[1] = [
            {"conversations": [{"from": NAMES[t["role"]], "value": t["content"]} for t in r["conversations"]]}
            for r in parts[1]
        ]
    lines = ["".join(json.dumps(r, ensure_ascii=False) + "\n" for r in part).encode() for part in parts]
    (folder / "a.jsonl").write_bytes(lines[0])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines[1], mtime=0))
    (folder / "c.json").write_text(json.dumps(parts[2], ensure_ascii=False, indent=1), "utf-8")
    return "a.jsonl:0.5,b.jsonl.gz:0.3,c.json:0.2"


@pytest.mark.parametrize("recipe", ["pretrain", "full_sft"])
def test_三个文件配起来训练_续训逐位相同_换了内容或权重就拒绝(recipe, home, world, capsys, monkeypatch):
    case = CASES[recipe]
    spec = mixture(world, home, case.data)

    def train(name: str, **changes) -> int:
        flags = {"data_path": spec, "max_steps": 4, "eval_interval": 0, "save_weight": name, **changes}
        return case.main()(case.argv(world, **flags))

    def weights(name: str) -> dict:
        return torch.load(home / "out" / f"{name}_64.pth", weights_only=True)

    assert train("whole") == 0
    said = capsys.readouterr().err
    # 48 条：24、14.4、9.6 → 24、14、10
    assert "一轮 48 条：a.jsonl 24 条（50.00%，各一次）、b.jsonl.gz 14 条" in said and "c.json 10 条" in said

    original = loop.forward_backward

    def crash(run, *rest):
        if run.state.step == 2:
            raise RuntimeError("断电")
        return original(run, *rest)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="断电"):
        patch.setattr(loop, "forward_backward", crash)
        train("cut")
    capsys.readouterr()
    changed = {
        "权重": {"data_path": "a.jsonl:0.4,b.jsonl.gz:0.4,c.json:0.2"},
        "次序": {"data_path": "b.jsonl.gz:0.3,a.jsonl:0.5,c.json:0.2"},
        "没有权重": {"data_path": "a.jsonl,b.jsonl.gz,c.json"},
    }
    for what, flags in changed.items():
        assert train("cut", from_resume=1, **flags) == 2, what
        assert "数据指纹" in capsys.readouterr().err
    content = (home / "c.json").read_text("utf-8")
    (home / "c.json").write_text(content.replace("，", ",", 1) + " ", "utf-8")
    assert train("cut", from_resume=1) == 2
    assert "数据指纹" in capsys.readouterr().err
    (home / "c.json").write_text(content, "utf-8")
    (home / "a.jsonl").rename(home / "改名.jsonl")  # 只看内容，不看名字
    assert train("cut", from_resume=1, data_path=spec.replace("a.jsonl", "改名.jsonl")) == 0
    assert "已完成 2 步" in capsys.readouterr().err
    whole, resumed = weights("whole"), weights("cut")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[k], resumed[k]) for k in whole)


@pytest.mark.parametrize("recipe", ["pretrain", "grpo"])
def test_权重写错_一句话说清_不留下权重(recipe, home, world, capsys):
    case = CASES[recipe]
    data = world / f"{case.data}.jsonl"
    other = world / f"{case.data}_heldout.jsonl"
    before = sorted(home.rglob("*"))
    for spec in (
        f"{data}:0,{other}:1",
        f"{data}:0.7,{other}:0.7",
        f"{data}:nan,{other}:0.5",
        f"{data}:0.5,{other}",
    ):
        assert case.main()(case.argv(world, data_path=spec, max_steps=2)) == 2
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("错误：")]
        assert len(error) == 1 and "--data_path" in error[0] and "权重" in error[0] and "修复办法" in error[0]
    assert sorted(home.rglob("*")) == before
