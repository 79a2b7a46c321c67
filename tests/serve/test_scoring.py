"""给提示打分与别的请求一样：排队、分块、算时限；几兆的文字分词不占事件循环。"""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from live_server import LiveServer

from minimind.serve.generation import Settings

SCORE = {"prompt": [5, 6, 7, 8, 9], "max_tokens": 0, "echo": True, "logprobs": 2}


def post(server, body, path="/v1/completions"):
    return httpx.post(f"{server.url}{path}", json=body, timeout=120)


def hold(server):
    """引擎停在一步里，等放行。"""
    gate, entered, engine = threading.Event(), threading.Event(), server.runner.engine
    step = engine.step

    def slow():
        entered.set()
        assert gate.wait(100)
        return step()

    engine.step = slow
    return gate, entered


def test_打分也排队_排满了是429():
    """两个槽位、排四个：从前六十条照收不误。"""
    with LiveServer(slots=2, queue=4) as server:
        gate, entered = hold(server)
        with ThreadPoolExecutor(20) as pool:
            replies = [pool.submit(post, server, SCORE) for _ in range(20)]
            assert entered.wait(60)
            while sum(reply.done() for reply in replies) < 14:  # 只有被拒的现在就有答复
                threading.Event().wait(0.02)
            assert {reply.result().status_code for reply in replies if reply.done()} == {429}
            assert server.runner.in_flight == 6
            gate.set()
            codes = sorted(reply.result().status_code for reply in replies)
        assert codes == [200] * 6 + [429] * 14
        server.wait_idle()


def test_打分也有时限():
    with LiveServer(Settings(request_seconds=0.5)) as server:
        gate, _ = hold(server)
        reply = post(server, SCORE)
        gate.set()
        assert reply.status_code == 503 and reply.json()["error"]["code"] == "timeout"
        server.wait_idle()


def test_打分分块读_一步不超过一块(live, monkeypatch):
    read = []
    decoder = live.runner.engine.decoder
    real = decoder.prefill

    def spy(prompts, slots, starts, **options):
        read.append(sum(map(len, prompts)))
        return real(prompts, slots, starts, **options)

    monkeypatch.setattr(decoder, "prefill", spy)
    monkeypatch.setattr(live.runner.engine._admission, "chunk", 16)
    monkeypatch.setattr(live.runner.engine._admission, "budget", 16)
    prompt = torch.randint(10, 6000, (200,), generator=torch.Generator().manual_seed(5)).tolist()
    scored = post(live, {**SCORE, "prompt": prompt}).json()["choices"][0]["logprobs"]["token_logprobs"]
    assert max(read) <= 16 and sum(read) == 200
    with torch.no_grad():
        logp = live.table.default.loaded.model(input_ids=torch.tensor([prompt])).logits[0].log_softmax(-1)
    assert scored[0] is None and len(scored) == 200
    want = [logp[i, token].item() for i, token in enumerate(prompt[1:])]
    assert scored[1:] == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("limit", [0, 5])
def test_流式与一次给出的分数相同_提示在前(live, n, limit):
    body = {**SCORE, "max_tokens": limit, "n": n, "seed": 3, "ignore_eos": True, "return_token_ids": True}
    whole = post(live, body).json()
    parts = {index: {"text": "", "tokens": [], "token_logprobs": [], "ids": []} for index in range(n)}
    with httpx.stream(
        "POST", f"{live.url}/v1/completions", json={**body, "stream": True}, timeout=60
    ) as reply:
        lines = [line[6:] for line in reply.iter_lines() if line.startswith("data: {")]
    first = set()
    for choice in (one for line in lines for one in json.loads(line)["choices"]):
        part = parts[choice["index"]]
        if choice["index"] not in first:
            first.add(choice["index"])
            assert len(choice["logprobs"]["tokens"]) == 5 and not choice["token_ids"], "第一段只有提示"
        part["text"] += choice["text"]
        part["ids"] += choice["token_ids"]
        for key in ("tokens", "token_logprobs"):
            part[key] += choice["logprobs"][key]
    for choice in whole["choices"]:
        part = parts[choice["index"]]
        assert part["text"] == choice["text"] and part["ids"] == choice["token_ids"]
        assert len(part["ids"]) == limit
        assert part["tokens"] == choice["logprobs"]["tokens"] and len(part["tokens"]) == 5 + limit
        assert part["token_logprobs"][1:] == pytest.approx(choice["logprobs"]["token_logprobs"][1:], abs=1e-4)
    assert whole["usage"]["completion_tokens"] == n * limit


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_分词与还原都不在事件循环里(live, monkeypatch, path):
    """查词元、还原、写成 JSON 都在别的线程里：事件循环的线程里一步也没有。"""
    threads, model = [], live.table.default

    def noting(real):
        return lambda *args, **options: (threads.append(threading.current_thread()), real(*args, **options))[
            1
        ]

    monkeypatch.setattr(model.vocabulary, "text_of", noting(model.vocabulary.text_of))
    monkeypatch.setattr("minimind.serve.app.check_ids", noting(lambda *_: None))
    monkeypatch.setattr("minimind.serve.app.JSONResponse.render", noting(json_render))
    body = {"prompt": "云川是一条河"} if path == "/tokenize" else {"tokens": [5, 6, 7]}
    assert post(live, body, path).status_code == 200
    assert threads and live.thread not in threads


def json_render(self, content):
    return json.dumps(content).encode()
