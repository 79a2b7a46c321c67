"""协议：可有可无的字段、vLLM 的扩展、接着写、不认识的字段、HEAD、Host、缓存；对着真的服务器。"""

from __future__ import annotations

import json
import re
import socket

import httpx
import pytest
from live_server import LiveServer
from scripted import Script, scripted

from minimind.serve.generation import Settings
from minimind.serve.hosts import host_name
from minimind.tokenizer import encode_chat, encode_plain

CHAT = {"messages": [{"role": "user", "content": "你好"}], "max_tokens": 4, "temperature": 0}
TEXT = {"prompt": "云川", "max_tokens": 4, "temperature": 0}
PATHS = {"/v1/chat/completions": CHAT, "/v1/completions": TEXT}
CLOCK = {
    "type": "function",
    "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}},
}


def post(live, path="/v1/chat/completions", /, **fields):
    return httpx.post(f"{live.url}{path}", json={**PATHS.get(path, {}), **fields}, timeout=60)


def message_of(reply):
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]


def events_of(reply):
    lines = [line[6:] for line in reply.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


NULLABLE = [
    "stream", "stream_options", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "logit_bias", "seed", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos",
    "min_tokens", "n", "max_tokens", "max_completion_tokens", "response_format", "structured_outputs", "guided_json",
    "guided_choice", "echo", "logprobs", "top_logprobs", "return_token_ids", "logprobs_mode", "suffix", "best_of",
    "tools", "tool_choice", "parallel_tool_calls", "enable_thinking", "open_thinking", "chat_template_kwargs",
    "add_generation_prompt", "continue_final_message", "model", "user", "prefix",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("field", NULLABLE)
def test_可有可无的字段写null就是没写(live, path, field):
    limit = {"max_completion_tokens" if field == "max_tokens" else "max_tokens": 4}
    limit = {"max_tokens": 4} if path == "/v1/completions" and field != "max_tokens" else limit
    given, plain = post(live, path, **limit, **{field: None}), post(live, path, **limit)
    assert given.status_code == 200, given.text
    if field not in ("max_tokens", "temperature"):  # 这两个的默认值与 plain 里写的不同
        assert given.json()["choices"] == plain.json()["choices"]


def test_消息与工具里的null也是没写(live):
    call = {"id": None, "type": None, "function": {"name": "clock", "arguments": None}}
    messages = [
        {"role": "user", "content": "几点", "name": None, "tool_calls": None, "prefix": None},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [call],
            "refusal": None,
            "reasoning_content": None,
        },
        {"role": "tool", "tool_call_id": None, "content": "8:00"},
    ]
    tools = [{"type": None, "function": {**CLOCK["function"], "description": None}}]
    form = {"type": None, "json_schema": None}
    assert post(live, messages=messages, tools=tools, response_format=form).status_code == 200


def test_拒绝的话与别的文字分段都是文字(live):
    def prompt_of(content, **more):
        answer = {"role": "assistant", "content": content, **more}
        messages = [{"role": "user", "content": "甲"}, answer, {"role": "user", "content": "乙"}]
        return post(live, "/tokenize", messages=messages).json()["tokens"]

    plain = prompt_of("不行")
    assert prompt_of([{"type": "refusal", "refusal": "不行"}]) == plain
    assert prompt_of([{"type": "output_text", "text": "不"}, "行"]) == plain
    assert prompt_of(None, refusal="不行") == plain


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("field", "value"), [("top_p", 0), ("top_p", 1e-300), ("min_p", 1), ("temperature", 1e-42)]
)
def test_取极端值等于只留最可能的(live, path, field, value):
    # 随机的小模型没有并列第一，所以就是贪心
    cold = post(live, path, **{"temperature": 1.0, "seed": 1, field: value}).json()["choices"]
    assert cold == post(live, path).json()["choices"]


@pytest.mark.parametrize("path", PATHS)
def test_max_tokens为负一是不限_别的负数与0是错(live, path):
    bias = {"2": -100, "0": -100}
    whole = post(live, path, max_tokens=-1, logit_bias=bias).json()
    assert whole["choices"][0]["finish_reason"] == "length" and whole["usage"]["total_tokens"] == 256
    assert post(live, path, max_tokens=-2).status_code == 400
    assert (
        post(live, max_tokens=0).status_code == 400 and post(live, max_completion_tokens=0).status_code == 400
    )
    both = post(live, max_tokens=3, max_completion_tokens=-1, logit_bias=bias).json()
    assert both["usage"]["total_tokens"] == 256


# ---------------------------------------------------------------- vLLM 的扩展


@pytest.mark.parametrize("path", PATHS)
def test_ignore_eos写满_min_tokens写够(live, path):
    eos = {str(live.table.default.tokenizer.eos_token_id): 100}
    assert post(live, path, max_tokens=9, logit_bias=eos).json()["usage"]["completion_tokens"] == 1
    full = post(live, path, max_tokens=9, logit_bias=eos, ignore_eos=True).json()
    assert full["usage"]["completion_tokens"] == 9 and full["choices"][0]["finish_reason"] == "length"
    least = post(live, path, max_tokens=9, logit_bias=eos, min_tokens=5).json()
    assert least["usage"]["completion_tokens"] == 6 and least["choices"][0]["finish_reason"] == "stop"
    assert post(live, path, max_tokens=4, min_tokens=5).status_code == 400


@pytest.mark.parametrize("path", PATHS)
def test_stop_token_ids写下就停_自己不给_要给也行(live, path):
    (word,) = encode_plain(live.table.default.tokenizer, "好")

    def ask(**fields):
        reply = post(live, path, max_tokens=9, logit_bias={str(word): 100}, **fields).json()
        choice = reply["choices"][0]
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        return text, choice["finish_reason"], reply["usage"]["completion_tokens"]

    assert ask(stop_token_ids=[word]) == ("", "stop", 1)
    assert ask(stop_token_ids=[word], include_stop_str_in_output=True) == ("好", "stop", 1)
    assert ask(stop_token_ids=[word], min_tokens=2)[1:] == ("stop", 3)
    assert ask(stop=["好好"]) == ("", "stop", 2)
    assert ask(stop=["好好"], include_stop_str_in_output=True) == ("好好", "stop", 2)
    assert post(live, path, stop_token_ids=[999999]).status_code == 400


@pytest.mark.parametrize("path", PATHS)
def test_几选一(live, path):
    pytest.importorskip("xgrammar")
    choice = post(live, path, max_tokens=20, guided_choice=["晴天", "下雨"]).json()["choices"][0]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    assert text in ("晴天", "下雨") and choice["finish_reason"] == "stop"


def test_open_thinking就是enable_thinking(live):
    def tokens(**fields):
        return post(live, **fields).json()["usage"]["prompt_tokens"]

    for value in (True, False):
        same = {tokens(enable_thinking=value), tokens(open_thinking=value)}
        same |= {tokens(chat_template_kwargs={name: value}) for name in ("enable_thinking", "open_thinking")}
        assert len(same) == 1 and same != {tokens()}
    assert tokens(chat_template_kwargs={"open_thinking": None}, enable_thinking=False) == tokens(
        open_thinking=False
    )
    assert post(live, chat_template_kwargs={"enable_thinking": "false"}).status_code == 400


# ---------------------------------------------------------------- 接着写


def test_最后一条是助手的_没说接着写是400(live):
    messages = [*CHAT["messages"], {"role": "assistant", "content": "你"}]
    error = post(live, messages=messages).json()["error"]
    assert error["param"] == "messages" and "continue_final_message" in error["message"]
    assert post(live, continue_final_message=True).status_code == 400, "最后一条不是助手的"
    both = {"continue_final_message": True, "add_generation_prompt": True}
    assert post(live, messages=messages, **both).status_code == 400
    forced = {"continue_final_message": True, "tools": [CLOCK], "tool_choice": "required"}
    assert post(live, messages=messages, **forced).status_code == 400


@pytest.mark.parametrize(
    "how", [{"continue_final_message": True, "add_generation_prompt": False}, {"prefix": True}]
)
def test_接着写_提示停在那句话上_不开第二个回合(live, how):
    prefix = "prefix" in how
    last = {"role": "assistant", "content": "35-4=", **(how if prefix else {})}
    fields = {"messages": [*CHAT["messages"], last], **({} if prefix else how)}
    tokenizer = live.table.default.tokenizer
    expected = [
        *encode_chat(tokenizer, CHAT["messages"], add_generation_prompt=True).ids,
        *encode_plain(tokenizer, "35-4="),
    ]
    assert post(live, "/tokenize", **fields).json()["tokens"] == expected
    written = post(live, "/v1/completions", prompt=expected, max_tokens=6, temperature=0).json()
    assert message_of(post(live, **fields, max_tokens=6))["content"] == written["choices"][0]["text"]


# ---------------------------------------------------------------- 不起作用的字段


def test_不起作用的字段_写进头_日志里说一次(caplog):
    with LiveServer() as server:
        fields = {"store": True, "metadata": {"a": 1}, "奇怪": 1, "user": None, "logprobs": False}
        message = {**CHAT["messages"][0], "name": "张三"}
        tool = {**CLOCK, "function": {**CLOCK["function"], "strict": True}}
        more = {"stream_options": {"x": 1}, "chat_template_kwargs": {"y": 1}, "service_tier": "auto"}
        for stream in (False, True):
            reply = post(server, messages=[message], tools=[tool], stream=stream, **fields, **more)
            names = set(reply.headers["X-MiniMind-Ignored-Fields"].split(", "))
            assert names == {
                *("store", "metadata", "%E5%A5%87%E6%80%AA", "service_tier", "messages.name"),
                *("tools.function.strict", "stream_options.x", "chat_template_kwargs.y"),
            }
        assert "X-MiniMind-Ignored-Fields" not in post(server).headers
        assert (
            post(server, "/v1/completions", best_of_n=2).headers["X-MiniMind-Ignored-Fields"] == "best_of_n"
        )
    lines = [record.getMessage() for record in caplog.records if "不起作用" in record.getMessage()]
    assert sum("service_tier" in line for line in lines) == 1 and any("奇怪" in line for line in lines)


# ---------------------------------------------------------------- 续写


def test_永远放不下的一批是400_不叫人再来(live):
    most = live.runner.max_slots + live.runner.max_queue
    reply = post(live, "/v1/completions", prompt=["x"] * (most + 1), max_tokens=1)
    assert reply.status_code == 400 and "Retry-After" not in reply.headers
    assert post(live, "/v1/completions", prompt=["x"] * 7, n=2, max_tokens=1).status_code == 400
    assert post(live, "/v1/completions", prompt=["x"] * most, max_tokens=1).status_code == 200


@pytest.mark.parametrize("echo", [True, False])
def test_流式只打分_与不流式的一样(live, echo):
    fields = {"prompt": ["云川是河", "你好"], "max_tokens": 0, "echo": echo, "logprobs": 1}
    whole = post(live, "/v1/completions", **fields).json()
    events = events_of(
        post(live, "/v1/completions", **fields, stream=True, stream_options={"include_usage": True})
    )
    assert [choice for event in events for choice in event["choices"]] == whole["choices"]
    assert events[-1]["usage"] == whole["usage"] and whole["usage"]["completion_tokens"] == 0


def test_流式回显_位置接着提示往后(live):
    fields = {"prompt": "云川是龘河", "max_tokens": 6, "echo": True, "logprobs": 2, "ignore_eos": True}
    (whole,) = post(live, "/v1/completions", **fields).json()["choices"]
    events = [e["choices"][0] for e in events_of(post(live, "/v1/completions", **fields, stream=True))]
    for key in ("text_offset", "tokens", "token_logprobs"):
        assert [v for e in events for v in e["logprobs"][key]] == whole["logprobs"][key]
    assert "".join(event["text"] for event in events) == whole["text"]
    offsets = whole["logprobs"]["text_offset"]
    assert offsets == sorted(offsets) and offsets[0] == 0
    assert len(offsets) == len(encode_plain(live.table.default.tokenizer, "云川是龘河")) + 6


# ---------------------------------------------------------------- 工具与 OpenAI 的客户端


def test_嵌套的pydantic模型_必须调用_流式与不流式都收(chat_server):
    live = chat_server  # 工具的说明就要几百个词元
    openai, pydantic = pytest.importorskip("openai"), pytest.importorskip("pydantic")
    pytest.importorskip("xgrammar")

    class Address(pydantic.BaseModel):
        city: str
        zip_code: int | None = None

    class Person(pydantic.BaseModel):
        name: str
        address: Address
        friends: list[Address] = []

    schema = Person.model_json_schema()
    assert "$defs" in schema and "$ref" in json.dumps(schema)
    tools = [{"type": "function", "function": {"name": "Person", "parameters": schema}}]
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="any", max_retries=0)
    options = {"model": "minimind", "messages": CHAT["messages"], "tools": tools, "max_tokens": 120}
    choice = {"type": "function", "function": {"name": "Person"}}
    answer = client.chat.completions.create(**options, tool_choice=choice).choices[0]
    assert answer.message.tool_calls[0].function.arguments.startswith('{"name": "')
    assert answer.finish_reason == "length", "随机权重写不完，截断就说截断"

    text = '<tool_call>\n{"name": "Person", "arguments": {"name": "甲", "address": {"city": "北京"}}}\n</tool_call>'
    with scripted(live, Script(text)):
        chunks = list(client.chat.completions.create(**options, stream=True))
    pieces = [c.choices[0].delta.tool_calls[0] for c in chunks if c.choices[0].delta.tool_calls]
    assert (pieces[0].index, pieces[0].function.name, pieces[0].type) == (0, "Person", "function")
    arguments = "".join(piece.function.arguments or "" for piece in pieces)
    assert Person.model_validate_json(arguments).address.city == "北京"
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_流式与不流式_截断的调用都是length(live):
    text = '<tool_call>\n{"name": "clock", "arguments": {"city": "北京朝阳区望京街道"}}\n</tool_call>'
    for stream in (False, True):
        with scripted(live, Script(text)):
            reply = post(live, tools=[CLOCK], max_tokens=16, stream=stream)
        if stream:
            assert events_of(reply)[-1]["choices"][0]["finish_reason"] == "length"
        else:
            assert reply.json()["choices"][0]["finish_reason"] == "length"
            assert message_of(reply)["tool_calls"][0]["function"]["name"] == "clock"


def test_没有收尾的思考写完了就是正文(live):
    with scripted(live, Script("35-4=31。")):
        message = message_of(post(live, enable_thinking=True, max_tokens=30))
    assert message["content"] == "35-4=31。" and "reasoning_content" not in message
    with scripted(live, Script("35-4=31。")):
        events = events_of(post(live, enable_thinking=True, max_tokens=30, stream=True))
    assert "".join(e["choices"][0]["delta"].get("content") or "" for e in events) == "35-4=31。"


# ---------------------------------------------------------------- HTTP


def test_HEAD与GET同头_没有正文(live):
    for path in ("/", "/health", "/v1/models", "/v1/models/minimind", "/static/app.js", "/openapi.json"):
        head, got = httpx.head(f"{live.url}{path}"), httpx.get(f"{live.url}{path}")
        assert head.status_code == got.status_code == 200 and head.content == b"", path
        assert head.headers["content-type"] == got.headers["content-type"]
    assert httpx.head(f"{live.url}/v1/chat/completions").status_code == 405
    assert httpx.head(f"{live.url}/nothing").status_code == 404


def test_没有要联网的说明页(live):
    for path in ("/docs", "/redoc", "/"):
        assert not re.search(r"https?://(?!127\.0\.0\.1|localhost)", httpx.get(f"{live.url}{path}").text), (
            path
        )


def test_脚本与样式每次都要问变了没有(live):
    for path in ("/static/app.js", "/static/style.css"):
        first = httpx.get(f"{live.url}{path}")
        assert first.headers["cache-control"] == "no-cache" and first.headers["etag"]
        again = httpx.get(f"{live.url}{path}", headers={"If-None-Match": first.headers["etag"]})
        assert again.status_code == 304 and again.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize(
    ("host", "name"),
    [("LocalHost:80", "localhost"), ("a.b.", "a.b"), ("[::1]:8", "::1"), ("::1", "::1"), ("[::1]", "::1")],
)
def test_Host里的主机名(host, name):
    assert host_name(host) == name


def status_with(server, host, path="/v1/models", **headers):
    return httpx.get(f"{server.url}{path}", headers={"Host": host, **headers}).status_code


LOCAL = ["localhost", "LOCALHOST:1234", "127.0.0.1:9", "[::1]:8998", "localhost."]
OTHER = ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:80", "10.1.2.3", "[2001:db8::1]"]


def test_Host只认本机的_防DNS重绑定(live):
    assert [status_with(live, host) for host in LOCAL] == [200] * len(LOCAL)
    assert [status_with(live, host) for host in OTHER] == [403] * len(OTHER)
    assert status_with(live, "evil.example", "/") == status_with(live, "evil.example", "/health") == 403
    evil = httpx.post(f"{live.url}/v1/chat/completions", json=CHAT, headers={"Host": "evil.example"})
    assert evil.status_code == 403 and "--allowed_hosts evil.example" in evil.json()["error"]["message"]


def test_Host_另外允许的_监听全部时的IP_有密钥时不查():
    with LiveServer(Settings(allowed_hosts=("llm.example",))) as server:
        assert status_with(server, "LLM.example:8998") == 200 and status_with(server, "evil.example") == 403
    with LiveServer(Settings(host="0.0.0.0")) as server:
        assert status_with(server, "10.1.2.3:8998") == status_with(server, socket.gethostname()) == 200
        assert status_with(server, "evil.example") == 403
    with LiveServer(Settings(host="192.168.1.5")) as server:
        assert status_with(server, "192.168.1.5:8998") == 200 and status_with(server, "192.168.1.6") == 403
    with LiveServer(Settings(api_key="k")) as server:
        assert status_with(server, "llm.example", Authorization="Bearer k") == 200
        assert status_with(server, "llm.example") == 401
    with LiveServer(Settings(allowed_hosts=("*",))) as server:
        assert status_with(server, "evil.example") == 200
