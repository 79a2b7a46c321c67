"""别的客户端：LangChain、instructor 照常用；照着接口说明乱填的请求不会让服务器出 5xx，也不漏槽位。"""

from __future__ import annotations

import json
import random
from enum import Enum
from typing import Literal

import httpx
import pytest
from pydantic import BaseModel, Field


def test_LangChain_问答_流式_工具(live):
    langchain_openai = pytest.importorskip("langchain_openai")

    def connect(max_tokens):
        return langchain_openai.ChatOpenAI(
            base_url=f"{live.url}/v1",
            api_key="any",
            model="minimind",
            max_tokens=max_tokens,
            temperature=0,
            max_retries=0,
        )

    model = connect(8)
    whole = model.invoke("你好")
    assert whole.usage_metadata["output_tokens"] <= 8
    assert "".join(chunk.content for chunk in model.stream("你好")) == whole.content

    schema = {
        "title": "weather",
        "description": "查天气",
        "type": "object",
        "properties": {"city": {"enum": ["北京", "上海"]}},
        "required": ["city"],
    }
    pytest.importorskip("xgrammar")
    forced = connect(60).bind_tools([schema], tool_choice="weather").invoke("北京天气")
    (call,) = forced.tool_calls
    assert call["name"] == "weather" and call["args"]["city"] in ("北京", "上海")


class Kind(str, Enum):
    HOME = "home"
    WORK = "work"


class Street(BaseModel):
    name: str = Field(max_length=4)
    number: int = Field(ge=0, le=99)


class Address(BaseModel):
    street: Street
    kind: Kind


class Person(BaseModel):
    """两层嵌套，字段不按字母排；长短都有界，随机的模型也写得完。"""

    title: Literal["先生", "女士"]
    age: int = Field(ge=0, le=120)
    addresses: list[Address] = Field(min_length=1, max_length=2)


ORDER = ["title", "age", "addresses"]
ASK = [{"role": "user", "content": "介绍一个人"}]


def openai_client(chat_server):
    return pytest.importorskip("openai").OpenAI(
        base_url=f"{chat_server.url}/v1", api_key="any", max_retries=0
    )


def test_openai_嵌套的模型_按声明的次序_答复与工具都解析得出(chat_server):
    pytest.importorskip("xgrammar")
    openai, client = pytest.importorskip("openai"), openai_client(chat_server)
    common = {"model": "minimind", "messages": ASK, "max_tokens": 400}
    whole = client.chat.completions.parse(**common, response_format=Person).choices[0].message
    assert isinstance(whole.parsed, Person) and list(json.loads(whole.content)) == ORDER
    with client.chat.completions.stream(**common, response_format=Person) as stream:
        for _ in stream:
            pass
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Person)
    tool = openai.pydantic_function_tool(Person)
    forced = client.chat.completions.parse(**common, tools=[tool], tool_choice="required")
    (call,) = forced.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Person)
    assert list(json.loads(call.function.arguments)) == ORDER


@pytest.mark.parametrize("mode", ["TOOLS", "TOOLS_STRICT", "JSON_SCHEMA"])
def test_instructor_嵌套的模型(chat_server, mode):
    pytest.importorskip("xgrammar")
    instructor = pytest.importorskip("instructor")
    client = instructor.from_openai(openai_client(chat_server), mode=instructor.Mode[mode])
    answer = client.chat.completions.create(
        model="minimind", messages=ASK, response_model=Person, max_tokens=400, max_retries=0
    )
    assert isinstance(answer, Person)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_LangChain_结构化的答复_嵌套的模型(chat_server, method):
    pytest.importorskip("xgrammar")
    model = pytest.importorskip("langchain_openai").ChatOpenAI(
        base_url=f"{chat_server.url}/v1", api_key="any", model="minimind", max_tokens=400, max_retries=0
    )
    assert isinstance(model.with_structured_output(Person, method=method).invoke("介绍一个人"), Person)


@pytest.fixture(scope="module")
def api_schema(live):
    schemathesis = pytest.importorskip("schemathesis")
    return schemathesis.openapi.from_url(f"{live.url}/openapi.json")


def test_接口说明里的每个操作_随便填都不出5xx(api_schema, live):
    hypothesis = pytest.importorskip("hypothesis")
    from schemathesis.specs.openapi.checks import content_type_conformance  # noqa: F401  确认装的是新版

    for result in api_schema.get_all_operations():
        operation = result.ok()

        @hypothesis.given(case=operation.as_strategy())
        @hypothesis.settings(
            max_examples=12, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
        )
        def fuzz(case):
            if isinstance(case.body, dict):  # 真的写起来不要写太久
                case.body["max_tokens"] = 2
                case.body.pop("max_completion_tokens", None)
                case.body["n"] = 1
            assert case.call(timeout=30).status_code < 500

        fuzz()
    live.wait_idle()


JUNK = [None, True, -1, 0, 1e308, "", "\ud800", "<|im_end|>", [], {}, [[]], {"a": 1}, "x" * 5000, 2**70]
FIELDS = [
    "messages", "prompt", "model", "temperature", "top_p", "top_k", "min_p", "n", "stop", "seed", "logit_bias", "tools",
    "tool_choice", "response_format", "logprobs", "top_logprobs", "stream", "stream_options", "max_completion_tokens", "echo",
    "presence_penalty", "chat_template_kwargs", "enable_thinking", "suffix", "best_of",
]  # fmt: skip


@pytest.mark.parametrize("path,count", [("/v1/chat/completions", 300), ("/v1/completions", 300)])
def test_字段里放什么都不出5xx(live, path, count):
    rng = random.Random(0)
    seen = set()
    with httpx.Client(timeout=30) as client:
        for _ in range(count):
            body = {"messages": [{"role": "user", "content": "你好"}], "prompt": "你好", "max_tokens": 1}
            for field in rng.sample(FIELDS, rng.randint(1, 3)):
                body[field] = rng.choice(JUNK)
            if rng.random() < 0.3:
                body["messages"] = [
                    {
                        "role": rng.choice(JUNK),
                        "content": rng.choice(JUNK),
                        rng.choice(FIELDS): rng.choice(JUNK),
                    }
                ]
            data = json.dumps(body).encode("utf-8", "surrogatepass")
            reply = client.post(
                f"{live.url}{path}", content=data, headers={"Content-Type": "application/json"}
            )
            assert reply.status_code < 500, (body, reply.text)
            seen.add(reply.status_code)
    assert {200, 400} <= seen
    live.wait_idle()
