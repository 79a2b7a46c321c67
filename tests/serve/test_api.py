"""OpenAI 的 Python 客户端对着真服务器：聊天、续写、流式、约束、对数概率。"""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from live_server import CONTEXT

from minimind.inference.generate import generate_batch
from minimind.tokenizer import encode_chat, encode_plain

openai = pytest.importorskip("openai")

HELLO = [{"role": "user", "content": "你好"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["北京", "上海"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def client(live):
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="any", max_retries=0)


def ask(client, messages=HELLO, **options):
    options = {"model": "minimind", "max_tokens": 8, "temperature": 0, **options}
    return client.chat.completions.create(messages=messages, **options)


@pytest.mark.compat
def test_贪心的答案与直接生成相同(client, live):
    loaded = live.table.default.loaded
    prompt = encode_chat(loaded.tokenizer, HELLO, add_generation_prompt=True).ids
    eos = live.table.default.eos_ids
    ((_, expected),) = generate_batch(loaded.model, [prompt], max_new_tokens=8, eos_ids=eos)
    answer = ask(client)
    assert answer.choices[0].message.content == loaded.tokenizer.decode(expected.ids)
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == len(expected.ids) + expected.finished
    assert answer.choices[0].finish_reason == ("stop" if expected.finished else "length")


def test_流式拼起来等于一次给出_角色在前_用量在后(client):
    whole = ask(client, temperature=1.0, seed=5)
    chunks = list(ask(client, temperature=1.0, seed=5, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert all(c.usage is None for c in chunks[:-1])


def test_同一种子同样的答案_不管同时还有谁(client, live):
    alone = ask(client, temperature=1.2, seed=11, max_tokens=24).choices[0].message.content

    async def crowd():
        other = openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="x", max_retries=0)
        jobs = [
            other.chat.completions.create(
                model="minimind",
                messages=[{"role": "user", "content": "说" * (i + 1)}],
                max_tokens=24,
                temperature=1.2,
                seed=seed,
            )
            for i, seed in enumerate((1, 2, 3, 4, 5))
        ]
        mine = other.chat.completions.create(
            model="minimind", messages=HELLO, max_tokens=24, temperature=1.2, seed=11
        )
        return (await asyncio.gather(*jobs, mine))[-1]

    assert asyncio.run(crowd()).choices[0].message.content == alone


def test_多个样本各不相同_各有序号(client):
    answer = ask(client, n=3, temperature=1.5, seed=3, max_tokens=12)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) == 3
    chunks = list(ask(client, n=3, temperature=1.5, seed=3, max_tokens=12, stream=True))
    for choice in answer.choices:
        parts = [c.choices[0].delta.content or "" for c in chunks if c.choices[0].index == choice.index]
        assert "".join(parts) == choice.message.content


def test_停止串截住答案_槽位随即空出(client, live):
    text = ask(client, temperature=1.0, seed=2, max_tokens=40).choices[0].message.content
    middle = len(text) // 2
    stop = text[middle : middle + 2]
    cut = ask(client, temperature=1.0, seed=2, max_tokens=40, stop=[stop])
    assert cut.choices[0].message.content == text[: text.find(stop)]
    assert cut.choices[0].finish_reason == "stop"
    live.wait_idle()


def test_对数概率与候选(client):
    content = ask(client, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    for token in content:
        assert token.logprob == token.top_logprobs[0].logprob, "贪心写的就是最可能的"
        assert len(token.top_logprobs) == 3 and bytes(token.bytes).decode(errors="replace") == token.token
    streamed = ask(client, logprobs=True, top_logprobs=3, stream=True)
    again = [t for c in streamed if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert [t.token for t in again] == [t.token for t in content]


def test_词元偏置能禁掉也能逼出(client, live):
    word = encode_plain(live.table.default.tokenizer, "好")[0]
    forced = ask(client, max_tokens=3, logit_bias={str(word): 100})
    assert forced.choices[0].message.content == "好好好"
    first = ask(client, max_tokens=1, logprobs=True, top_logprobs=1).choices[0].logprobs.content[0].token
    banned = encode_plain(live.table.default.tokenizer, first)[0]
    assert ask(client, max_tokens=1, logit_bias={str(banned): -100}).choices[0].message.content != first


def test_次数惩罚压住重复(client):
    assert len(set(ask(client, max_tokens=16).choices[0].message.content)) < 8
    varied = ask(client, max_tokens=16, frequency_penalty=2.0, presence_penalty=2.0)
    assert len(set(varied.choices[0].message.content)) > len(
        set(ask(client, max_tokens=16).choices[0].message.content)
    )


@pytest.mark.compat
def test_按模式写出合法的JSON(client):
    pytest.importorskip("xgrammar")
    schema = {
        "type": "object",
        "properties": {"名字": {"enum": ["甲", "乙"]}, "数": {"type": "integer"}, "真": {"type": "boolean"}},
        "required": ["名字", "数", "真"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    for seed in range(3):
        answer = ask(client, temperature=1.0, seed=seed, max_tokens=120, response_format=form)
        if answer.choices[0].finish_reason == "stop":  # 随机权重可能把整数写个没完
            value = json.loads(answer.choices[0].message.content)
            assert set(value) == {"名字", "数", "真"} and isinstance(value["真"], bool)
    assert ask(client, response_format={"type": "json_object"}).choices[0].message.content.startswith("{")


def test_必须调用工具_名字与参数都合乎要求(client):
    pytest.importorskip("xgrammar")
    answer = ask(
        client, tools=[WEATHER], tool_choice="required", temperature=1.0, seed=1, max_tokens=60
    ).choices[0]
    (call,) = answer.message.tool_calls
    assert answer.finish_reason == "tool_calls" and call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("北京", "上海")
    chunks = ask(
        client, tools=[WEATHER], tool_choice="required", temperature=1.0, seed=1, max_tokens=60, stream=True
    )
    pieces = [c.choices[0].delta.tool_calls[0] for c in chunks if c.choices[0].delta.tool_calls]
    assert pieces[0].function.name == "weather" and pieces[0].id
    assert "".join(piece.function.arguments or "" for piece in pieces) == call.function.arguments


def test_按名字选中LoRA(client):
    assert [model.id for model in client.models.list()] == ["minimind", "lora_x"]
    assert client.models.retrieve("lora_x").parent == "minimind"
    assert ask(client, model="lora_x", max_tokens=16) != ask(client, max_tokens=16)


@pytest.mark.compat
def test_续写_回显与逐词元的对数概率(client, live):
    model = live.table.default
    answer = client.completions.create(
        model="minimind", prompt="云川是一条河", max_tokens=4, temperature=0, echo=True, logprobs=2
    ).choices[0]
    assert answer.text.startswith("云川是一条河")
    ids = [model.tokenizer.bos_token_id, *encode_plain(model.tokenizer, "云川是一条河")]
    import torch

    logp = model.loaded.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = [float(logp[t - 1, ids[t]]) for t in range(1, len(ids))]
    assert answer.logprobs.token_logprobs[: len(expected)] == pytest.approx(expected, abs=1e-4)
    assert len(answer.logprobs.tokens) == len(expected) + 4
    rebuilt = "".join(answer.logprobs.tokens)
    assert rebuilt == answer.text and answer.logprobs.text_offset[1] == len(answer.logprobs.tokens[0])


def test_词元进词元出(live):
    prompt = encode_plain(live.table.default.tokenizer, "从前有座山")
    body = {"prompt": [prompt, prompt[:2]], "max_tokens": 5, "temperature": 0, "return_token_ids": True}
    choices = httpx.post(f"{live.url}/v1/completions", json=body).json()["choices"]
    assert [choice["prompt_token_ids"] for choice in choices] == [prompt, prompt[:2]]
    for choice in choices:
        ((_, expected),) = generate_batch(
            live.table.default.loaded.model,
            [choice["prompt_token_ids"]],
            max_new_tokens=5,
            eos_ids=live.table.default.eos_ids,
        )
        assert choice["token_ids"][: len(expected.ids)] == expected.ids


def test_只打分不生成(live):
    body = {"prompt": "云川", "max_tokens": 0, "echo": True, "logprobs": 0}
    (choice,) = httpx.post(f"{live.url}/v1/completions", json=body).json()["choices"]
    assert choice["text"] == "云川" and len(choice["logprobs"]["token_logprobs"]) == 2


def test_分词与还原(live):
    got = httpx.post(f"{live.url}/tokenize", json={"prompt": "你好 <|im_end|>"}).json()
    assert got["tokens"] == encode_plain(live.table.default.tokenizer, "你好 <|im_end|>")
    back = httpx.post(f"{live.url}/detokenize", json={"tokens": got["tokens"]}).json()
    assert back["prompt"] == "你好 <|im_end|>" and got["max_model_len"] == CONTEXT


def test_思考开关进到模板里(client, live):
    off = ask(client, extra_body={"chat_template_kwargs": {"enable_thinking": False}}).usage.prompt_tokens
    plain = ask(client).usage.prompt_tokens
    assert off > plain, "关着思考时提示里有一个空的思考块"
    thinking = ask(client, temperature=1.0, seed=4, extra_body={"enable_thinking": True}).choices[0].message
    assert thinking.content == "" and thinking.reasoning_content, "没写完思考，正文是空的"
