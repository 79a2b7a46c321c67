"""推测解码经过服务器：流式与不流式、停止串、候选、有约束的，答案都与不猜的相同；猜中了多少数得出来。"""

from __future__ import annotations

import json

import httpx
import pytest
from live_server import LiveServer, served, tiny_loaded

from minimind.inference.draft_model import DraftModel
from minimind.inference.shared import SharedModel
from minimind.inference.speculative import PromptLookup
from minimind.serve.models import ModelTable

ASKED = [{"role": "user", "content": "一二三四五，一二三四五，接着数。"}]
BODIES = {
    "贪心": {"temperature": 0},
    "抽样": {"temperature": 1.0, "seed": 3, "top_k": 20, "n": 2},
    "候选": {"temperature": 0, "logprobs": True, "top_logprobs": 3},
    "惩罚": {"temperature": 0.8, "seed": 1, "repetition_penalty": 1.1},
    "偏置": {"temperature": 0, "presence_penalty": 0.5},
    "截断": {"temperature": 0, "max_tokens": 7},
}


def table(draft):
    return ModelTable([served("minimind", tiny_loaded(), draft=draft)])


@pytest.fixture(scope="module")
def plain():
    with LiveServer(table=table(None)) as server:
        yield server


@pytest.fixture(scope="module", params=["prompt", "small"])
def guessing(request):
    small = SharedModel(tiny_loaded(1).model)
    draft = PromptLookup if request.param == "prompt" else lambda: DraftModel(small)
    with LiveServer(table=table(draft)) as server:
        yield server


def ask(server, **options):
    body = {"messages": ASKED, "max_tokens": 60, **options}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()


def rounded(value):
    """对数概率只比到舍入。"""
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list) else value


def streamed(server, **options):
    body = {"messages": ASKED, "max_tokens": 60, "stream": True, **options}
    text = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    return "".join(event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"])


def guessed(server):
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("minimind_guessed_tokens_total"))


@pytest.mark.parametrize("kind", BODIES)
def test_答案与用量都相同(plain, guessing, kind):
    want, got = ask(plain, **BODIES[kind]), ask(guessing, **BODIES[kind])
    assert rounded(got["choices"]) == rounded(want["choices"])
    tokens = "prompt_tokens", "completion_tokens"
    assert [got["usage"][key] for key in tokens] == [want["usage"][key] for key in tokens]


def test_流式与停止串(plain, guessing):
    whole = ask(plain, temperature=0)["choices"][0]["message"]["content"]
    assert streamed(guessing, temperature=0) == whole
    stop = whole[len(whole) // 2 :][:2]
    cut = ask(guessing, temperature=0, stop=[stop])["choices"][0]
    assert cut["message"]["content"] == whole[: whole.index(stop)] and cut["finish_reason"] == "stop"
    assert streamed(guessing, temperature=0, stop=[stop]) == cut["message"]["content"]


def test_猜中了多少在指标里(plain, guessing):
    before = guessed(guessing)
    written = ask(guessing, temperature=0)["usage"]["completion_tokens"]
    assert 0 < guessed(guessing) - before < written
    assert guessed(plain) == 0
