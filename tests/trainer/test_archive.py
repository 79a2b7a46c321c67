"""留几份存档、留验证最好的一份：名字说得清，都能用、能续训，多出来的删掉。"""

from __future__ import annotations

import contextlib
import json
import math

from trainer_helpers import assert_same_weights, saved_model, toy_train

from minimind.runtime.checkpoint import load_file
from minimind.trainer import archive

SETTINGS = {"epochs": 3, "accumulation_steps": 3, "save_interval": 2, "keep_checkpoints": 2}


def names(folder, pattern: str) -> list[str]:
    return sorted(path.name for path in folder.glob(pattern))


def test_默认只有最新的一份(tmp_path):
    toy_train(tmp_path, epochs=3, save_interval=2)
    assert names(tmp_path, "checkpoints/*") == ["toy_64_resume.pth"]
    assert names(tmp_path, "out/*.pth") == ["toy_64.pth"]


def test_留最近两次_多出来的删掉_都能续训(tmp_path):
    (tmp_path / "out").mkdir()
    other = tmp_path / "out" / "toy_step1_64.pth"  # 别的训练留下的，不是这次的，不动
    other.write_bytes(b"old")
    toy_train(tmp_path, **SETTINGS)  # 12 步，第 2、4……12 步存盘
    assert names(tmp_path, "checkpoints/*") == [
        "toy_64_resume.pth", "toy_step10_64_resume.pth", "toy_step12_64_resume.pth"
    ]  # fmt: skip
    assert names(tmp_path, "out/*.pth") == [
        "toy_64.pth",
        "toy_step10_64.pth",
        "toy_step12_64.pth",
        other.name,
    ]
    assert names(tmp_path, "out/*.json") == ["toy_64.json", "toy_step10_64.json", "toy_step12_64.json"]
    assert other.read_bytes() == b"old"
    assert json.loads((tmp_path / "out" / "toy_step10_64.json").read_text())["step"] == 10
    assert load_file(tmp_path / "checkpoints" / "toy_step10_64_resume.pth")["step"] == 10

    final = saved_model(tmp_path)
    again = toy_train(tmp_path, **SETTINGS, save_weight="toy_step10", from_resume=1)
    assert again.step == 12
    assert_same_weights(saved_model(tmp_path, "toy_step10_64"), final)


def test_删到一半被杀_续训后照样只留两份(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    original, calls = archive.Archive.keep_recent, []

    def dies(self, kept):
        calls.append(kept)
        if kept[-1] == 6:  # 另存好了，还没删
            self.keep("step6", resumable=True)
            raise Killed
        return original(self, kept)

    monkeypatch.setattr(archive.Archive, "keep_recent", dies)
    with contextlib.suppress(Killed):
        toy_train(tmp_path, **SETTINGS)
    assert len(names(tmp_path, "checkpoints/toy_step*")) == 3 and calls[-1] == [2, 4, 6]
    monkeypatch.setattr(archive.Archive, "keep_recent", original)
    toy_train(tmp_path, **SETTINGS, from_resume=1)
    assert names(tmp_path, "checkpoints/toy_step*") == [
        "toy_step10_64_resume.pth",
        "toy_step12_64_resume.pth",
    ]


def test_验证最好的另存一份_续训之后仍记得(tmp_path):
    settings = {
        **SETTINGS, "val_rows": 5, "eval_interval": 2, "learning_rate": 0.05, "schedule": "cosine", "epochs": 6,
    }  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    toy_train(whole, **settings)
    lines = [json.loads(line) for line in (whole / "out/logs/toy_64.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}
    best = min(scores, key=scores.get)
    assert best != max(scores)  # 五行随机数，训练久了就过拟合
    sidecar = json.loads((whole / "out" / "toy_best_64.json").read_text())
    assert sidecar["step"] == best and math.isclose(sidecar["metrics"]["val_loss"], scores[best])
    assert load_file(whole / "checkpoints" / "toy_best_64_resume.pth")["step"] == best

    # 停在最好的一步之后再续：记得最好的是哪一步，后来的不盖掉它
    stop_at = {**settings, "max_steps": best + 2, "schedule": "wsd", "warmup_ratio": 0.0, "decay_ratio": 0.0}
    toy_train(parts, **stop_at)
    kept = json.loads((parts / "out" / "toy_best_64.json").read_text())
    toy_train(parts, **{**stop_at, "max_steps": best + 3, "learning_rate": 1.0}, from_resume=1)
    assert json.loads((parts / "out" / "toy_best_64.json").read_text()) == kept


def test_最好_损失越小_得分越大_nan不算():
    assert archive.is_best([], {"val_loss": 2.0}) == "val_loss"
    assert archive.is_best([{"val_loss": 1.5}, {"val_loss": None}], {"val_loss": 1.4}) == "val_loss"
    assert archive.is_best([{"val_loss": 1.5}], {"val_loss": 1.5}) is None
    assert archive.is_best([{"val_reward": 0.5}], {"val_reward": 0.6}) == "val_reward"
    assert archive.is_best([{"val_reward": 0.5}], {"val_reward": 0.4}) is None
    assert archive.is_best([], {"val_loss": math.nan}) is None and archive.is_best([], {}) is None
