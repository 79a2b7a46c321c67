"""载入失败：服务器随之退出，错误只说一遍。"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys

import pytest
from processes import ROOT, ServerProcess
from waiting import until

from minimind.errors import UserError
from minimind.serve.app import create_app, fill_table
from minimind.serve.cli import ServeArguments, model_table
from minimind.serve.runner import EngineRunner


def test_没有权重_一句错误_退出码2(tmp_path):
    script = ROOT / "scripts" / "serve_openai_api.py"
    done = subprocess.run(
        [sys.executable, str(script), "--save_dir", str(tmp_path), "--port", "0", "--device", "cpu"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2
    assert done.stderr.count("train_full_sft.py") == 1, done.stderr
    assert "错误：" in done.stderr and "Traceback" not in done.stderr
    assert "服务在" not in done.stderr + done.stdout, "没起来就别说在服务"


def test_起来了才报地址(weights, tmp_path):
    with ServerProcess("--save_dir", weights, folder=tmp_path) as server:
        until(lambda: "服务在" in server.output(), server.output)
        assert f"服务在 {server.url} ，接口在 /v1" in server.output()
        assert server.output().index("full_sft_64.pth") < server.output().index("服务在")


@pytest.mark.parametrize("error", [UserError("坏了"), MemoryError("放不下")])
def test_什么错都退出_内部的错写进日志(monkeypatch, caplog, error):
    sent = []
    monkeypatch.setattr(signal, "raise_signal", sent.append)

    def load():
        raise error

    app = create_app(load)
    app.state.stopping = False
    asyncio.run(fill_table(app, load))
    assert sent == [signal.SIGTERM] and app.state.failure is error and app.state.table is None
    assert ("放不下" in caplog.text) == isinstance(error, MemoryError)


@pytest.mark.parametrize(("options", "told"), [((), False), (("--dtype", "bfloat16"), True)])
def test_同一种子同一答案不保证的精度_启动时说一句(weights, tmp_path, options, told):
    with ServerProcess("--save_dir", weights, *options, folder=tmp_path) as server:
        until(lambda: "服务在" in server.output(), server.output)
        assert ("同一种子未必是同一答案" in server.output()) == told


def test_载入的库不再每次回收都看一遍_引擎除外(weights, monkeypatch):
    """一次完整的回收要看二十多万个对象，每个人的字都停着；引擎会重建，旧的有环，要回收得了。"""
    done = []
    monkeypatch.setattr(gc, "freeze", lambda: done.append("冻结"))
    monkeypatch.setattr(ServeArguments, "load", recorded(ServeArguments.load, done, "权重"))
    monkeypatch.setattr(EngineRunner, "__init__", recorded(EngineRunner.__init__, done, "引擎"))
    table = model_table(ServeArguments(save_dir=str(weights), device="cpu", max_slots=2, max_length=64))
    table.default.runner.close()
    assert done == ["权重", "冻结", "引擎"]


def recorded(function, done, name):
    """照常做，并记下做了什么。"""

    def wrapper(*args, **options):
        done.append(name)
        return function(*args, **options)

    return wrapper
