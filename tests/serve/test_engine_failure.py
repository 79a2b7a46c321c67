"""引擎坏了：哪一处出错都立刻答复在途的请求并换新引擎；换不成、卡住了，``/health`` 就说坏了，服务退出。"""

from __future__ import annotations

import gc
import threading
import weakref
from contextlib import contextmanager

import httpx
import pytest
import uvicorn
from live_server import LiveServer, served, tiny_loaded
from waiting import free_port, is_up, until

from minimind.inference.engine import Engine
from minimind.inference.sampling import SamplingParams
from minimind.serve import runner as runner_module
from minimind.serve import tickets as tickets_module
from minimind.serve.app import create_app
from minimind.serve.generation import Settings
from minimind.serve.hooks import BiasHook
from minimind.serve.lifecycle import GracefulServer
from minimind.serve.models import ModelTable
from minimind.serve.runner import EngineRunner

# 禁掉两个结束符：写满两百个才停；时限放得很长，立刻得到的答复不可能是超时
LONG = {
    "messages": [{"role": "user", "content": "说"}],
    "max_tokens": 200,
    "logit_bias": {"2": -100, "0": -100},
}


@pytest.fixture
def server():
    with LiveServer(Settings(request_seconds=100_000)) as server:
        yield server


def ask(server, **changes):
    return httpx.post(f"{server.url}/v1/chat/completions", json={**LONG, **changes}, timeout=120)


def health(server):
    return httpx.get(f"{server.url}/health", timeout=60)


@contextmanager
def in_flight(server):
    """一个在写的请求，停在第一步之后；``with`` 里放行之后，答复在给出的列表里。"""
    replies, gate, entered = [], threading.Event(), threading.Event()
    engine = server.runner.engine
    step = engine.step

    def slow():
        done = step()
        entered.set()
        assert gate.wait(60)
        return done

    engine.step = slow
    thread = threading.Thread(target=lambda: replies.append(ask(server)))
    thread.start()
    assert entered.wait(60)
    yield replies
    gate.set()
    thread.join(60)
    assert replies, "在途的请求没有得到答复"


def broken(*_, **__):
    raise RuntimeError("种下的错")


def leave(*_, **__):
    raise SystemExit(3)


def works_again(server):
    until(lambda: health(server).status_code == 200, lambda: "没有恢复")
    assert ask(server, max_tokens=3).json()["usage"]["completion_tokens"] == 3
    server.wait_idle()


@pytest.mark.parametrize("plant", [broken, leave])
def test_取消时出错_在途的立刻得到错误_之后照常(server, plant):
    first = server.runner.engine
    with in_flight(server) as replies:
        first.cancel = plant
        server.runner.cancel(next(iter(server.runner._tickets.values())))
    assert replies[0].status_code in (500, 503)
    works_again(server)
    assert server.runner.engine is not first


@pytest.mark.parametrize("plant", [broken, leave])
def test_一步里出错_之后照常(server, plant):
    server.runner.engine.step = plant
    assert ask(server).status_code in (500, 503)
    works_again(server)


@pytest.mark.parametrize("method", ["adjust", "accept"])
def test_干预里出错_之后照常(server, monkeypatch, method):
    with monkeypatch.context() as patch:
        patch.setattr(BiasHook, method, broken)
        assert ask(server).status_code == 500
    works_again(server)


@pytest.mark.parametrize("times", [1, 1000])
def test_送词元时出错_在途的立刻得到错误_之后照常(server, monkeypatch, times):
    real, left = runner_module.post, [times]

    def post(events):
        if events and left[0]:
            left[0] -= 1
            raise RuntimeError("送不出去")
        real(events)

    with monkeypatch.context() as patch:
        patch.setattr(runner_module, "post", post)
        patch.setattr(tickets_module, "post", post)
        assert ask(server).status_code == 500
    works_again(server)


def test_答应了的事出错_等的人得到错误_线程还在(server):
    import asyncio

    for plant, expected in ((broken, RuntimeError), (leave, runner_module.EngineDown)):
        for give in (server.runner.call, server.runner.when_idle):
            with pytest.raises(expected):
                asyncio.run(give(plant))
    works_again(server)


def test_换不成新引擎_health说坏了_在途与新来的立刻得到503(server):
    with in_flight(server) as replies:
        server.runner._new_engine = broken
        server.runner.engine.cancel = broken
        server.runner.cancel(next(iter(server.runner._tickets.values())))
    assert replies[0].status_code in (500, 503)
    until(lambda: health(server).status_code == 503, lambda: "坏了还说好")
    assert "种下的错" in health(server).json()["reason"]
    assert ask(server).json()["error"]["code"] == "engine_down"
    assert server.runner.in_flight == 0


def test_卡住的一步_health说坏了_在途的立刻得到503_走完之后换新(server):
    """钟是假的：拨到时限之后，不等真的两分钟。"""
    now, first = [0.0], server.runner.engine
    server.runner._clock = lambda: now[0]
    gate, entered = threading.Event(), threading.Event()
    first.step = lambda: (entered.set(), gate.wait(100), [])[2]
    replies = []
    thread = threading.Thread(target=lambda: replies.append(ask(server)))
    thread.start()
    assert entered.wait(60)
    now[0] = server.runner.step_seconds - 1
    assert health(server).status_code == 200, "还没到时限"
    now[0] = server.runner.step_seconds + 1
    assert health(server).status_code == 503 and "秒还没走完" in health(server).json()["reason"]
    thread.join(60)
    assert not gate.is_set() and replies[0].status_code == 503
    assert ask(server).status_code == 503, "新来的不必等"
    gate.set()
    works_again(server)
    assert server.runner.engine is not first


def test_重建之前先放掉旧引擎():
    """错误的栈帧里有旧引擎的局部变量，前缀库的树是环：都放开了才建新的。"""
    loaded = tiny_loaded()
    runner = EngineRunner(loaded.model, {2}, max_slots=2, max_queue=2, max_length=64)
    old, alive = weakref.ref(runner.engine), []
    build = runner._new_engine

    def rebuild():
        alive.append(old() is not None)
        return build()

    runner._new_engine = rebuild
    runner.engine.decoder.prefill = broken
    request = {"params": SamplingParams(temperature=0), "max_new_tokens": 3}
    runner._command(lambda: runner.engine.add_request([3, 4, 5], **request))
    until(lambda: alive, lambda: "没有重建")
    runner.close()
    gc.collect()
    assert alive == [False] and old() is None


def test_引擎坏了_服务退出():
    table = ModelTable([served("minimind", tiny_loaded())])
    app, port = create_app(lambda: table), free_port()
    config = uvicorn.Config(app, port=port, log_level="warning")
    server = GracefulServer(config, app, limit=100_000)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: is_up(f"http://127.0.0.1:{port}"), lambda: "没有起来")
    runner = table.default.runner
    gate, entered, now = threading.Event(), threading.Event(), [0.0]
    runner._clock = lambda: now[0]
    runner._command(lambda: (entered.set(), gate.wait(100)))
    assert entered.wait(60)
    now[0] = runner.step_seconds + 1
    thread.join(100)
    stopped = not thread.is_alive()
    gate.set()
    assert stopped and server.forced, "卡住的线程拦不住退出，退出码是 1"


def test_空闲的引擎不算卡住():
    runner = EngineRunner(tiny_loaded().model, {2}, max_slots=2, max_queue=2, max_length=64)
    runner._clock = lambda: 1e9
    assert isinstance(runner.engine, Engine) and runner.trouble is None
    runner.close()
