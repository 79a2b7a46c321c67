"""记录：JSON 行可续写可截断；记录工具按名字打开，没装时说怎么装。"""

from __future__ import annotations

import json
import sys
import types

import pytest
from trainer_helpers import toy_train

from minimind.errors import UserError
from minimind.trainer.journal import RunLog, read_log
from minimind.trainer.tracking import start_tracker


def steps(path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_续训删去之后的行再接着写(tmp_path):
    path = tmp_path / "logs" / "a.jsonl"
    log = RunLog(path)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": 1.0})
    log.write({"step": 2, "val_loss": 0.5})
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')  # 被杀时写了一半
    resumed = RunLog(path, keep_until=2)
    assert resumed.evaluated_steps == {2}
    resumed.write({"step": 3, "loss": float("nan"), "名字": "值"})
    assert steps(path) == [1, 2, 2, 3]
    assert json.loads(path.read_text().splitlines()[-1]) == {"step": 3, "loss": None, "名字": "值"}
    RunLog(path)
    assert steps(path) == []


def test_样例里有特殊的换行符_日志有坏字节_续训一行不丢(tmp_path):
    path = tmp_path / "logs" / "a.jsonl"
    log = RunLog(path)
    # 字节级词表随机采样时常有的 U+2028、U+0085：json 原样写出，只有 \n 才是行尾
    samples = [{"prompt": "问", "answer": "甲\u2028乙\u0085丙\u000b丁"}]
    log.write({"step": 2, "samples": samples})
    log.write({"step": 2, "val_loss": 0.5})
    with open(path, "ab") as file:
        file.write(b'\xff\xfe{"step": 1}\n[1]\n3\n{"step": "x"}\n{"step": 2, "loss": 1.0}\n')
    kept = [{"step": 2, "samples": samples}, {"step": 2, "val_loss": 0.5}, {"step": 2, "loss": 1.0}]
    assert read_log(path) == kept
    RunLog(path, keep_until=2)
    assert read_log(path) == kept


def test_没装记录工具说怎么装(tmp_path, monkeypatch):
    for name in ("swanlab", "wandb", "tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(UserError, match=f"pip install {name}"):
            start_tracker(name, project="p", run_name="r", folder=tmp_path, config={})


class FakeRun:
    id = "run-1"


def fake_module(name: str, calls: list) -> types.ModuleType:
    module = types.ModuleType(name)
    module.init = lambda **kwargs: calls.append(("init", kwargs)) or FakeRun()
    module.log = lambda values, step: calls.append(("log", step, values))
    module.finish = lambda: calls.append(("finish",))
    return module


@pytest.mark.parametrize(
    "flags, name, mode", [({"use_wandb": 1}, "swanlab", "local"), ({"tracker": "wandb"}, "wandb", "offline")]
)
def test_没登录时写在本地_续训接同一条曲线(tmp_path, monkeypatch, flags, name, mode):
    """旧项目的 --use_wandb 用的就是 swanlab。"""
    calls: list = []
    monkeypatch.setitem(sys.modules, name, fake_module(name, calls))
    for key in ("WANDB_MODE", "WANDB_API_KEY", "SWANLAB_MODE", "SWANLAB_API_KEY"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    toy_train(tmp_path, max_steps=2, val_rows=4, **flags)
    assert calls[0][1]["mode"] == mode and calls[0][1]["id"] is None
    logged = [(call[1], set(call[2])) for call in calls if call[0] == "log"]
    assert [step for step, _ in logged] == [1, 2, 2]
    assert "loss" in logged[0][1] and "val_loss" in logged[-1][1] and calls[-1] == ("finish",)
    calls.clear()
    toy_train(tmp_path, max_steps=3, val_rows=4, from_resume=1, **flags)
    assert calls[0][1]["id"] == "run-1"


@pytest.mark.parametrize(
    "name, file, mode", [("wandb", ".netrc", "online"), ("swanlab", ".swanlab/.netrc", "cloud")]
)
def test_登录过就联网(tmp_path, monkeypatch, name, file, mode):
    calls: list = []
    monkeypatch.setitem(sys.modules, name, fake_module(name, calls))
    monkeypatch.setenv("HOME", str(tmp_path))
    for key in ("WANDB_MODE", "WANDB_API_KEY", "SWANLAB_MODE", "SWANLAB_API_KEY"):
        monkeypatch.delenv(key, raising=False)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(f"machine api.{name}.example login user password x")
    start_tracker(name, project="p", run_name="r", folder=tmp_path / "logs", config={})
    assert calls[0][1]["mode"] == mode


def test_tensorboard真写出文件(tmp_path):
    pytest.importorskip("tensorboard", reason="没有安装 tensorboard")
    toy_train(tmp_path, max_steps=2, tracker="tensorboard")
    assert list((tmp_path / "out" / "logs" / "tensorboard").rglob("events*"))


def test_磁盘满写不了日志报人话(tmp_path, monkeypatch):
    log = RunLog(tmp_path / "a.jsonl")
    monkeypatch.setattr("builtins.open", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(UserError, match="写训练记录失败"):
        log.write({"step": 1})
