"""停机，真的进程：收到 TERM 后在写的写完、新来的 503、退出码 0；再来一次或过了时限就立刻结束。"""

from __future__ import annotations

import json
import os
import signal
import threading
import time

import httpx
import pytest
from processes import ServerProcess, long_answer

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows 没有 SIGTERM")

ENOUGH = 2500  # 三路一起写，每步约三毫秒；其间只要来得及问两句
FOREVER = 30_000


def stream(server, tokens, lines, started):
    """流式地问一次，各行放进 ``lines``；断了也不报。"""
    body = long_answer(tokens, stream=True, stream_options={"include_usage": True})
    try:
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=120) as reply:
            for line in reply.iter_lines():
                lines.append(line)
                if len(lines) > 4:
                    started.set()
    except httpx.TransportError:
        lines.append("断了")


def begin(server, tokens, count=1):
    """``count`` 个流式请求都写起来了才返回。"""
    answers, threads = [[] for _ in range(count)], []
    for lines in answers:
        started = threading.Event()
        threads.append(threading.Thread(target=stream, args=(server, tokens, lines, started)))
        threads[-1].start()
        assert started.wait(60)
    return answers, threads


def test_在写的写完_新来的503_退出码0(weights, tmp_path):
    arguments = ("--save_dir", weights, "--max_length", 8192)
    with ServerProcess(*arguments, folder=tmp_path) as server:
        answers, threads = begin(server, ENOUGH, count=3)
        server.process.send_signal(signal.SIGTERM)
        while (health := httpx.get(f"{server.url}/health")).status_code == 200:
            time.sleep(0.01)
        assert health.json() == {"status": "stopping"}
        refused = httpx.post(f"{server.url}/v1/chat/completions", json=long_answer(1), timeout=60)
        assert refused.status_code == 503 and refused.headers["Retry-After"]
        assert refused.json()["error"]["code"] == "shutting_down"
        for thread in threads:
            thread.join(120)
        assert server.process.wait(60) == 0, server.output()
    for lines in answers:
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert events[-1]["usage"]["completion_tokens"] == ENOUGH and "data: [DONE]" in lines


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP])
def test_空闲时收到就退出(weights, tmp_path, signum):
    with ServerProcess("--save_dir", weights, folder=tmp_path) as server:
        server.process.send_signal(signum)
        assert server.process.wait(60) == 0, server.output()


@pytest.mark.parametrize("how", ["twice", "limit"])
def test_再来一次或过了时限就立刻结束_退出码1(weights, tmp_path, how):
    limit = 600 if how == "twice" else 1
    arguments = ("--save_dir", weights, "--max_length", FOREVER + 1000, "--shutdown_seconds", limit)
    with ServerProcess(*arguments, folder=tmp_path) as server:
        (lines,), threads = begin(server, FOREVER)
        server.process.send_signal(signal.SIGTERM)
        if how == "twice":
            while httpx.get(f"{server.url}/health").status_code == 200:
                time.sleep(0.01)
            assert server.process.poll() is None, "只来一次时要等在写的"
            server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 1, server.output()
        threads[0].join(60)
    errors = [json.loads(line[6:]) for line in lines if line.startswith('data: {"error"')]
    assert [error["error"]["code"] for error in errors] == ["shutting_down"]
    assert "Traceback" not in server.output()
