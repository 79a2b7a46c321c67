"""多轮对话经过服务器：第二轮的历史不重算，用量与指标里数得清楚，答案与不共用时相同。"""

from __future__ import annotations

import httpx
import pytest
from live_server import LiveServer

SYSTEM = {"role": "system", "content": "你是山城小镇的向导，回答简短，先说结论，再说理由，不知道就说不知道。"}


def ask(server, messages, **options):
    body = {"messages": messages, "max_tokens": 24, "temperature": 0, **options}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=30).json()


def counters(server):
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    pairs = (line.split() for line in lines if line.startswith("minimind_prompt_tokens_"))
    return {name: float(value) for name, value in pairs if name.endswith("_total")}


@pytest.fixture(scope="module")
def fresh():
    with LiveServer() as server:
        yield server


def test_第二轮只算新的(fresh):
    first = ask(fresh, [SYSTEM, {"role": "user", "content": "镇上有几座桥？"}])
    assert first["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    history = [
        SYSTEM,
        {"role": "user", "content": "镇上有几座桥？"},
        {"role": "assistant", "content": first["choices"][0]["message"]["content"]},
        {"role": "user", "content": "最老的是哪一座？"},
    ]
    second = ask(fresh, history)
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert first["usage"]["prompt_tokens"] - 16 <= cached < second["usage"]["prompt_tokens"]
    total = first["usage"]["prompt_tokens"] + second["usage"]["prompt_tokens"]
    seen = counters(fresh)
    assert seen["minimind_prompt_tokens_reused_total"] == cached
    assert seen["minimind_prompt_tokens_computed_total"] == total - cached
    assert ask(fresh, history)["choices"] == second["choices"]


def test_续写的用量也数(fresh):
    body = {"prompt": ["从前有座山，山里有座庙，庙里有个老和尚在讲故事，讲的是什么呢？"] * 2, "max_tokens": 2}
    for expected in (0, 2):
        reply = httpx.post(f"{fresh.url}/v1/completions", json=body, timeout=30).json()
        assert (reply["usage"]["prompt_tokens_details"]["cached_tokens"] > 0) == bool(expected)
