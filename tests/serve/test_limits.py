"""出错与限额：每种错误的状态与形状；客户端走了槽位就空；停机时写完在写的。"""

from __future__ import annotations

import json
import socket
import threading
import time

import httpx
import pytest
from live_server import CONTEXT, LiveServer

from minimind.serve.generation import Settings

CHAT = {"messages": [{"role": "user", "content": "你好"}], "max_tokens": 4}


def post(live, body, path="/v1/chat/completions", **options):
    headers = {"Content-Type": "application/json", **options.pop("headers", {})}
    data = json.dumps(body).encode()  # httpx 自己写的 JSON 放不下代理字符
    return httpx.post(f"{live.url}{path}", content=data, timeout=30, headers=headers, **options)


@pytest.mark.parametrize(
    "change,param",
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "机器人", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.content"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"n": 999}, "n"),
        ({"top_logprobs": 3}, None),
        ({"tool_choice": "required"}, None),
        ({"logit_bias": {"好": 1}}, "logit_bias.好.[key]"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"logit_bias": {str(2**63): 1}}, "logit_bias"),
        ({"messages": [{"role": "user", "content": [{"type": "\ud800"}]}]}, "messages.content"),
        ({"tool_choice": {"type": "function", "function": {"name": "\ud800"}}}, None),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "怪"}}}}, None),
        ({"messages": [{"role": "user", "content": "长" * 3000}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"function": 3}]}]}, None),
    ],
)
def test_不对的值是400_说出字段(live, change, param):
    reply = post(live, {**CHAT, **change})
    error = reply.json()["error"]
    assert reply.status_code == 400 and error["type"] == "invalid_request_error" and error["message"]
    if param is not None:
        assert error["param"] == param


def test_提示太长写明两个长度(live):
    error = post(live, {"prompt": [5] * 300, "max_tokens": 4}, "/v1/completions").json()["error"]
    assert "300" in error["message"] and str(CONTEXT) in error["message"]
    assert error["code"] == "context_length_exceeded" and error["param"] == "prompt"


def test_词表之外的词元与不是JSON的请求体(live):
    assert post(live, {"prompt": [999999]}, "/v1/completions").status_code == 400
    reply = httpx.post(
        f"{live.url}/v1/chat/completions", content=b"{oops", headers={"Content-Type": "application/json"}
    )
    assert reply.status_code == 400 and "JSON" in reply.json()["error"]["message"]
    for content, kind in (
        (json.dumps(CHAT), "text/plain"),
        ("[]", "application/json"),
        ("", "application/json"),
    ):
        reply = httpx.post(f"{live.url}/v1/chat/completions", content=content, headers={"Content-Type": kind})
        assert reply.status_code == 400
        assert "Content-Type: application/json" in reply.json()["error"]["message"]


def test_没有的模型与地址是404(live):
    assert post(live, {**CHAT, "model": "gpt-5"}).json()["error"]["code"] == "model_not_found"
    reply = httpx.get(f"{live.url}/v2/nothing")
    assert reply.status_code == 404 and reply.json()["error"]["type"] == "not_found_error"
    assert httpx.get(f"{live.url}/v1/chat/completions").status_code == 405


def test_要密钥的服务器_没带或不对是401_探活不要():
    with LiveServer(Settings(api_key="秘密")) as server:
        assert post(server, CHAT).status_code == 401
        assert post(server, CHAT, headers={"Authorization": "Bearer no"}).status_code == 401
        right = {"Authorization": "Bearer 秘密".encode()}
        assert post(server, CHAT, headers=right).status_code == 200
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert httpx.get(f"{server.url}/metrics").status_code == 401


def test_请求体太大是413_分块传来的也数得出():
    with LiveServer(Settings(max_body=2000)) as server:
        assert post(server, {**CHAT, "user": "x" * 3000}).status_code == 413

        def chunks():
            yield b'{"messages": "'
            for _ in range(40):
                yield b"x" * 100

        reply = httpx.post(f"{server.url}/v1/chat/completions", content=chunks())
        assert reply.status_code == 413 and reply.json()["error"]["code"] == "body_too_large"


def long_body(**changes):
    """写满上下文也不停：禁掉结束符。"""
    return {**CHAT, "max_tokens": 200, "logit_bias": {"2": -100, "0": -100}, **changes}


def slow_down(server, monkeypatch, seconds: float) -> None:
    """每一步多睡一会儿：200 步的回答长短由此定，与机器快慢无关。"""
    engine = server.runner.engine
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: time.sleep(seconds) or step())


def test_排满了是429_带RetryAfter(monkeypatch):
    with LiveServer(slots=1, queue=1) as server:
        slow_down(server, monkeypatch, 0.01)
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=long_body(stream=True)) as first:
            next(first.iter_lines())
            replies = []
            threads = [
                threading.Thread(target=lambda: replies.append(post(server, long_body()))) for _ in range(4)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
        refused = [reply for reply in replies if reply.status_code == 429]
        assert len(replies) == 4 and len(refused) >= 2
        assert all(reply.headers["Retry-After"] for reply in refused)
        assert all(reply.json()["error"]["type"] == "rate_limit_error" for reply in refused)
        server.wait_idle()


def vanish(live, stream: bool) -> None:
    """发出请求，读一点（或不读）就断开。"""
    body = json.dumps(long_body(stream=stream)).encode()
    with socket.create_connection(("127.0.0.1", live.port)) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        if stream:
            connection.recv(200)
        else:
            time.sleep(0.05)


@pytest.mark.parametrize("stream", [True, False])
def test_客户端中途走了_槽位都空出来(live, stream):
    threads = [threading.Thread(target=vanish, args=(live, stream)) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    live.wait_idle()
    assert live.runner.in_flight == 0 and post(live, CHAT).status_code == 200


def test_停机时写完在写的(monkeypatch):
    with LiveServer() as server:
        slow_down(server, monkeypatch, 0.01)
        result = []

        def ask():
            result.append(post(server, long_body()))

        thread = threading.Thread(target=ask)
        thread.start()
        while not server.runner.engine.running:
            time.sleep(0.01)
        server.server.should_exit = True
        thread.join(60)
    assert result[0].status_code == 200 and result[0].json()["usage"]["completion_tokens"] == 200


def test_超时的请求得到503_槽位空出(monkeypatch):
    with LiveServer(Settings(request_seconds=0.3)) as server:
        slow_down(server, monkeypatch, 0.02)
        reply = post(server, long_body(n=4))
        assert reply.status_code == 503 and reply.json()["error"]["code"] == "timeout"
        server.wait_idle()


def test_引擎出错只连累在途的请求_细节不外泄(live, monkeypatch):
    engine = live.runner.engine

    def broken():
        raise RuntimeError("内部机密")

    monkeypatch.setattr(engine.decoder, "prefill", lambda *a: broken())
    reply = post(live, CHAT)
    assert reply.status_code == 500 and "机密" not in reply.text
    live.wait_idle()
    assert post(live, CHAT).status_code == 200, "引擎已经换新"


def test_指标数得对(live):
    before = httpx.get(f"{live.url}/metrics").text
    post(live, CHAT)
    after = httpx.get(f"{live.url}/metrics").text

    def count(text):
        name = 'minimind_requests_total{endpoint="/v1/chat/completions",status="200"}'
        return next((float(line.split()[-1]) for line in text.splitlines() if line.startswith(name)), 0.0)

    assert count(after) == count(before) + 1
    assert "minimind_time_to_first_token_seconds_bucket" in after
