"""必须调用、约束输出：模板渲染得出的都写得出，一个词元也不少；模板写不出的写不出。"""

from __future__ import annotations

import json
import random
from enum import Enum

import pytest

pytest.importorskip("xgrammar")

import torch
from live_server import tiny_loaded
from pydantic import BaseModel, Field

from minimind.serve.chat import ChatAnswer
from minimind.serve.errors import ApiError
from minimind.serve.models import ServedModel
from minimind.serve.schemas import ChatRequest, CompletionRequest
from minimind.tokenizer import encode_chat, encode_plain
from minimind.tokenizer.loading import codec_of

USER = {"role": "user", "content": "算"}


class NoEngine:
    """只问格式，用不着引擎。"""

    max_length, max_slots, max_queue = 4096, 4, 8


@pytest.fixture(scope="module")
def model():
    return ServedModel("minimind", tiny_loaded(), NoEngine())


def tool(name, parameters=None):
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


CALCULATOR = tool(
    "calculator",
    {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
)
CLOCK = tool("clock", {"type": "object", "properties": {}})


class Colour(Enum):
    red = "红"
    slash = "a/b"


class Part(BaseModel):
    name: str
    size: int | None = None
    parts: list[Part] = Field(default_factory=list)


class Order(BaseModel):
    zip_code: str
    part: Part
    colour: Colour
    price: float
    gift: bool


ORDER = tool("下单", Order.model_json_schema())
PART = tool("part", Part.model_json_schema())  # 顶层就是 $ref
TOOLS = [CALCULATOR, CLOCK, ORDER, PART, tool('odd/"name"\\', {"type": "object"})]


def walk(hook, ids, stops=()):
    """逐个词元走；返回走到哪里不许写了（``None`` 是全都许写），与最后停没停。"""
    done = False
    for at, token in enumerate(ids):
        logits = torch.zeros(6400)
        logits[token] = 1.0  # 模型最想写的就是它
        hook.adjust(logits)
        if not torch.isfinite(logits[token]):
            return at, done
        done = hook.accept(token)
    return None, done


def written(tokenizer, message):
    """助手这一回合的词元，含结束符。"""
    start = len(encode_chat(tokenizer, [USER], add_generation_prompt=True).ids)
    ids = encode_chat(tokenizer, [USER, {"role": "assistant", "content": "", **message}]).ids[start:]
    return ids[: len(ids) - ids[::-1].index(tokenizer.eos_token_id)]


def random_part(rng, depth=0):
    text = "".join(rng.choice('abc甲乙龘"\\/{}[]\n\t\x7f <>，,:1') for _ in range(rng.randint(0, 8)))
    part = {"name": text}
    if rng.random() < 0.5:
        part["size"] = rng.choice([None, 0, 7, -12345])
    if rng.random() < 0.5:
        count = rng.randint(0, 2) if depth < 2 else 0
        part["parts"] = [random_part(rng, depth + 1) for _ in range(count)]
    return part


def random_call(rng):
    name = rng.choice([one["function"]["name"] for one in TOOLS])
    if name == "calculator":
        arguments = {"expression": random_part(rng)["name"]}
    elif name == "clock":
        arguments = {}
    elif name == "下单":
        arguments = {
            "zip_code": str(rng.randrange(10**6)),
            "part": random_part(rng),
            "colour": rng.choice(["红", "a/b"]),
            "price": rng.choice([0, 1.5, -0.0, 1e22, -3e-9, 12]),
            "gift": rng.random() < 0.5,
        }
    elif name == "part":
        arguments = random_part(rng)
    else:
        arguments = {"随便": [1, {"a": None}], "x": random_part(rng)}
    return {"name": name, "arguments": arguments}


def answer(model, **fields):
    return ChatAnswer(model, ChatRequest.model_validate({"messages": [USER], **fields}))


@pytest.mark.parametrize("seed", range(12))
def test_模板渲染的调用_逐个词元都写得出(model, seed):
    rng = random.Random(seed)
    made = answer(model, tools=TOOLS, tool_choice="required")
    for _ in range(12):
        calls = [random_call(rng) for _ in range(rng.choice([1, 1, 2, 3]))]
        ids = written(model.tokenizer, {"tool_calls": calls})
        assert ids[0] == made.opening[0]
        refused, _ = walk(made.job.request.hook(), ids[1:])
        assert refused is None, (calls, model.tokenizer.decode(ids[: refused + 2]))


def test_点名的只许那一个_别的与坏的写不出(model):
    choice = {"type": "function", "function": {"name": "calculator"}}
    made = answer(model, tools=TOOLS, tool_choice=choice)
    right = written(
        model.tokenizer, {"tool_calls": [{"name": "calculator", "arguments": {"expression": "1"}}]}
    )
    assert walk(made.job.request.hook(), right[1:])[0] is None
    for wrong in (
        {"name": "clock", "arguments": {}},
        {"name": "calculator", "arguments": {}},
        {"name": "calculator", "arguments": {"expression": 1}},
        {"name": "calculator", "arguments": {"expression": "1", "more": 2}},
    ):
        ids = written(model.tokenizer, {"tool_calls": [wrong]})
        assert walk(made.job.request.hook(), ids[1:])[0] is not None, wrong


def test_参数的字符串里写不出真的标签(model):
    made = answer(model, tools=[CALCULATOR], tool_choice="required")
    hook = made.job.request.hook()
    assert (
        walk(hook, encode_plain(model.tokenizer, '\n{"name": "calculator", "arguments": {"expression": "1'))[
            0
        ]
        is None
    )
    logits = torch.zeros(6400)
    hook.adjust(logits)
    controls = sorted(model.tokenizer.get_added_vocab().values())
    assert not torch.isfinite(logits[controls]).any() and torch.isfinite(logits).any()


def test_parallel_tool_calls为假_写完一个就停(model):
    calls = [{"name": "clock", "arguments": {}}, {"name": "clock", "arguments": {}}]
    one, two = (written(model.tokenizer, {"tool_calls": calls[:n]})[1:] for n in (1, 2))
    single = answer(model, tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    assert walk(single.job.request.hook(), one[:-1]) == (None, True), "收尾的标签写下就停"
    several = answer(model, tools=TOOLS, tool_choice="required")
    assert walk(several.job.request.hook(), two) == (None, True)


def test_要思考时_想完空一行再调用_想停笔就是想完了(model):
    made = answer(model, tools=TOOLS, tool_choice="required", enable_thinking=True)
    assert made.opening == [] and made.thinking
    message = {"reasoning_content": "先想想", "tool_calls": [{"name": "clock", "arguments": {}}]}
    ids = written(model.tokenizer, message)[2:]  # 提示里已有 <think> 与换行
    assert walk(made.job.request.hook(), ids) == (None, True)
    hook, logits = made.job.request.hook(), torch.zeros(6400)
    eos, end = model.tokenizer.eos_token_id, codec_of(model.tokenizer).controls["</think>"]
    logits[eos] = 9.0
    hook.adjust(logits)
    assert int(logits.argmax()) == end


def test_json与思考同用_约束的是思考之后(model):
    form = {"type": "json_object"}
    made = answer(model, response_format=form, chat_template_kwargs={"enable_thinking": True})
    ids = written(model.tokenizer, {"reasoning_content": '想 {"', "content": '{"a": [1, "b"]}'})[2:]
    assert walk(made.job.request.hook(), ids) == (None, True)
    bad = written(model.tokenizer, {"reasoning_content": "想", "content": "不是"})[2:]
    assert walk(made.job.request.hook(), bad)[0] is not None


def schema_of(properties):
    return {"type": "object", "properties": properties, "required": list(properties)}


def test_键按schema的次序_不按字母(model):
    schema = schema_of({"z": {"type": "integer"}, "a": {"type": "string"}, "名": {"type": "boolean"}})
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    made = answer(model, response_format=form)
    right = '{"z": 1, "a": "b", "名": true}'
    assert walk(made.job.request.hook(), encode_plain(model.tokenizer, right))[0] is None
    wrong = '{"a": "b", "z": 1, "名": true}'
    assert walk(made.job.request.hook(), encode_plain(model.tokenizer, wrong))[0] is not None


@pytest.mark.parametrize("schema", [{}, True, {"title": "随便"}])
def test_空的schema也约束_任何一个JSON值(model, schema):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    made = answer(model, response_format=form)
    for right in ('"字"', "[1, {}]", "null", '{"a": -1.5}'):
        ids = [*encode_plain(model.tokenizer, right), model.tokenizer.eos_token_id]
        assert walk(made.job.request.hook(), ids)[0] is None, right
    assert walk(made.job.request.hook(), encode_plain(model.tokenizer, "你好"))[0] == 0


def test_给了工具又要JSON_可以写JSON也可以调用(model):
    made = answer(model, tools=TOOLS, response_format={"type": "json_object"})
    eos = model.tokenizer.eos_token_id
    assert walk(made.job.request.hook(), [*encode_plain(model.tokenizer, '{"a": 1}'), eos])[0] is None
    call = written(model.tokenizer, {"tool_calls": [{"name": "clock", "arguments": {}}]})
    assert walk(made.job.request.hook(), call)[0] is None
    assert walk(made.job.request.hook(), encode_plain(model.tokenizer, "好"))[0] == 0


@pytest.mark.parametrize(
    ("fields", "right", "wrong"),
    [
        ({"guided_json": {"type": "array", "items": {"type": "integer"}}}, "[1, 2]", '["a"]'),
        ({"guided_json": '{"type": "boolean"}'}, "true", "1"),
        ({"guided_regex": "[0-9]{3}-[a-z]+"}, "123-ab", "12-a"),
        ({"guided_choice": ["是", '否"\\', "😀"]}, '否"\\', "也许"),
        ({"guided_choice": ["是", "😀"]}, "😀", "😁"),
        ({"guided_grammar": 'root ::= "甲" ("乙")*'}, "甲乙乙", "乙"),
        ({"structured_outputs": {"json": {"type": "null"}}}, "null", "1"),
        ({"structured_outputs": {"regex": "a+"}}, "aaa", "b"),
        ({"structured_outputs": {"choice": ["左", "右"]}}, "右", "上"),
        ({"structured_outputs": {"json_object": True}}, '{"a": 1}', "[1]"),
        ({"response_format": {"type": "json_object", "schema": {"type": "object", "properties": {"k": {"type": "null"}}, "required": ["k"]}}}, '{"k": null}', "{}"),
    ],
)  # fmt: skip
def test_别的约束写法(model, fields, right, wrong):
    made = answer(model, **fields)
    eos = model.tokenizer.eos_token_id
    assert walk(made.job.request.hook(), [*encode_plain(model.tokenizer, right), eos]) == (None, True)
    assert walk(made.job.request.hook(), [*encode_plain(model.tokenizer, wrong), eos])[0] is not None
    assert CompletionRequest.model_validate({"prompt": "x", **fields}).constraint


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [tool("f", {"$ref": "#/$defs/没有"})], "tool_choice": "required"}, "tools"),
        ({"tools": [tool("f", {"type": "怪"})], "tool_choice": "required"}, "tools"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "怪"}}}},
            "response_format.json_schema.schema",
        ),
        ({"guided_regex": "("}, "guided_regex"),
        ({"structured_outputs": {"grammar": "x"}}, "structured_outputs.grammar"),
    ],
)
def test_读不懂的约束说出是哪个字段_不露源文件(model, fields, param):
    with pytest.raises(ApiError) as caught:
        answer(model, **fields)
    assert caught.value.status == 400 and caught.value.param == param
    assert ".cc" not in caught.value.message and "/" not in caught.value.message.replace("#/$defs/", "")


def test_约束只能写一个():
    body = {"messages": [USER], "guided_regex": "a", "response_format": {"type": "json_object"}}
    with pytest.raises(ValueError, match="只能写一个"):
        ChatRequest.model_validate(body)


def test_json里键的次序进到文法_工具的也是(model):
    names = ["z", "a", "m"]
    asked = tool("f", schema_of({name: {"type": "integer"} for name in names}))
    made = answer(model, tools=[asked], tool_choice="required")
    arguments = {name: 1 for name in names}
    ids = written(model.tokenizer, {"tool_calls": [{"name": "f", "arguments": arguments}]})
    assert walk(made.job.request.hook(), ids[1:]) == (None, True)
    assert list(json.loads(json.dumps(arguments))) == names
