"""工具调用的解析：怎么切都一样、写坏了不崩、解析后再渲染得回原文。"""

import itertools
import json

import pytest
from call_helpers import read_call
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.inference.reply import (
    BadCall,
    CallArguments,
    CallEnd,
    CallStart,
    ReasoningDelta,
    Reply,
    ReplyParser,
    TextDelta,
    parse_reply,
)
from minimind.inference.tool_calls import CallScanner
from minimind.inference.tool_loop import reply_message
from minimind.tokenizer import encode_chat, encode_plain, load_tokenizer, render_text
from minimind.tokenizer.loading import codec_of
from minimind.tokenizer.special import TAGS

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**6), 10**6)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
ARGUMENTS = st.dictionaries(st.text('abc甲"\\{}', max_size=4), JSON, max_size=3)
NAMES = st.text('get_时间"\\ ', min_size=1, max_size=8)
# 坏输入：标签、JSON 的零件与普通文字乱拼
SHARDS = st.lists(
    st.sampled_from([*TAGS, "<tool", "_call>", "</", '{"name": "f", ', '"arguments": {', '"x": 1', "}", "}}", '"', "\\", "[", "好", "\n", " ", "NaN"])
    | st.text(max_size=3),
    max_size=14,
).map("".join)  # fmt: skip


def cut(text, points):
    """按 points 切成几段。"""
    edges = sorted({min(point, len(text)) for point in points} | {0, len(text)})
    return [text[a:b] for a, b in itertools.pairwise(edges)]


def collect(events):
    reply = Reply()
    for event in events:
        reply.add(event)
    return reply


@given(NAMES, ARGUMENTS, st.sampled_from([None, 1]), st.lists(st.integers(0, 200), max_size=6))
@settings(max_examples=150, deadline=None)
def test_合法调用_怎么切都读回原来的名字与参数(name, arguments, indent, points):
    raw = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False, indent=indent)
    scanner = CallScanner()
    streamed = "".join(scanner.feed(piece) for piece in cut(raw, points))
    call = scanner.finish()
    assert call.error is None
    assert call.name == name == scanner.name
    assert call.values() == arguments
    assert streamed == call.arguments == read_call(raw).arguments


@pytest.mark.parametrize(
    "raw",
    [
        '{"arguments": {"x": 1}, "name": "f"}',
        '{"name": "f", "arguments": "{\\"x\\": 1}"}',
        '\n{"id": 7, "name": "f", "arguments": {"x": 1}}\n',
    ],
)
def test_次序颠倒或参数写成字符串也认_只是要等写完(raw):
    scanner = CallScanner()
    assert scanner.feed(raw) == ""
    call = scanner.finish()
    assert (call.name, call.values(), call.error) == ("f", {"x": 1}, None)
    assert json.loads(call.to_openai()["function"]["arguments"]) == {"x": 1}


def test_没有参数就是空对象():
    assert read_call('{"name": "now"}').values() == {}


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ("", "不是合法的 JSON"),
        ("[1]", "不是 "),
        ('{"arguments": {}}', "没有工具名"),
        ('{"name": "", "arguments": {}}', "没有工具名"),
        ('{"name": "\\ud800", "arguments": {}}', "没有工具名"),
        ('{"name": "f", "arguments": [1]}', "arguments 不是对象"),
        ('{"name": "f", "arguments": "{"}', "arguments 不是合法的 JSON"),
        ('{"name": "f", "arguments": {"x": NaN}}', "NaN"),
        ('{"name": "f", "arguments": {"x": 1}', "不是合法的 JSON"),
        ('{"name": "f", "arguments": {"x": 1}, "name": "g"}', "不止一次"),
        ('{"name": "f", "arguments": {"x": ' + "[" * 5000 + "]" * 5000 + "}}", "嵌套过深"),
    ],
)
def test_写坏了说得出坏在哪里(raw, said):
    call = read_call(raw)
    assert said in call.error and call.raw == raw
    assert call.values() == {}


@given(SHARDS, st.lists(st.integers(0, 120), max_size=8), st.booleans())
@settings(max_examples=300, deadline=None)
def test_坏输入怎么切都是同一结果_事件的次序总是合法(text, points, thinking):
    parser = ReplyParser(thinking, make_id=str)
    events = [event for piece in cut(text, points) for event in parser.feed(piece)] + parser.finish()
    whole = ReplyParser(thinking, make_id=str)
    assert collect(events) == collect(whole.feed(text) + whole.finish())
    opened, written = [], {}
    for event in events:
        if isinstance(event, CallStart):
            assert event.index == len(opened) and event.name
            opened.append(event.name)
            written[event.index] = ""
        elif isinstance(event, CallArguments):
            written[event.index] += event.text
        elif isinstance(event, CallEnd):
            assert event.call.name == opened[event.index]
            assert event.call.arguments == written.pop(event.index)
        elif isinstance(event, BadCall):
            assert event.call.error and not event.call.name
        else:
            assert isinstance(event, TextDelta | ReasoningDelta) and event.text
    assert not written


@given(
    st.text("好a \n<", max_size=6).map(str.strip),
    st.text("想b \n", max_size=6).map(str.strip),
    st.lists(st.tuples(st.sampled_from(["f", "查"]), ARGUMENTS), max_size=3),
)
@settings(max_examples=150, deadline=None)
def test_渲染再解析再渲染得回原文(content, reasoning, calls):
    message = {"role": "assistant", "content": content}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = [{"name": name, "arguments": arguments} for name, arguments in calls]
    head = "<|im_start|>assistant\n"
    text = render_text([message])
    reply = parse_reply(text.removeprefix(head).removesuffix("<|im_end|>\n"))
    assert (reply.text, reply.reasoning) == (content, reasoning)
    assert [(call.name, call.values()) for call in reply.calls] == calls
    assert render_text([reply_message(reply)]) == text


def test_写坏的调用照样留在历史里():
    raw = '<tool_call>{"name": 3}</tool_call>'
    assert reply_message(parse_reply("先查一下" + raw)) == {
        "role": "assistant",
        "content": "先查一下\n" + raw,
    }


def assistant_ids(tokenizer, message):
    """模型写出这条消息时的 token，不含结束符。"""
    start = len(encode_chat(tokenizer, [], add_generation_prompt=True).ids)
    ids = encode_chat(tokenizer, [message]).ids[start:]
    return ids[: ids.index(tokenizer.eos_token_id)]


def test_按_token_解析_引用的标签文字不是标签():
    tokenizer = load_tokenizer()
    call = {"name": "f", "arguments": {"x": "</tool_call>甲"}}
    quoted = "标签写作 <tool_call>，"
    body = assistant_ids(tokenizer, {"role": "assistant", "content": "", "tool_calls": [call]})
    reply = parse_reply([*encode_plain(tokenizer, quoted), *body], tokenizer=tokenizer)
    assert reply.text == quoted
    assert [(c.name, c.values()) for c in reply.calls] == [("f", {"x": "</tool_call>甲"})]


def test_分词器没有的标签按文字认(monkeypatch):
    tokenizer = load_tokenizer()
    controls = dict(codec_of(tokenizer).controls)
    monkeypatch.setattr(
        codec_of(tokenizer), "controls", {k: v for k, v in controls.items() if "think" not in k}
    )
    call = {"name": "f", "arguments": {}}
    message = {"role": "assistant", "content": "好", "reasoning_content": "想", "tool_calls": [call]}
    ids = encode_chat(tokenizer, [message]).ids
    assert controls["<think>"] not in ids and controls["<tool_call>"] in ids
    start = len(encode_chat(tokenizer, [], add_generation_prompt=True).ids)
    reply = parse_reply(ids[start : ids.index(tokenizer.eos_token_id)], tokenizer=tokenizer)
    assert (reply.text, reply.reasoning, reply.calls[0].name) == ("好", "想", "f")


def test_流式的名字在参数之前给出_汉字不拆开():
    tokenizer = load_tokenizer()
    call = {"name": "查天气", "arguments": {"city": "龘鱻镇"}}
    ids = assistant_ids(tokenizer, {"role": "assistant", "content": "", "tool_calls": [call]})
    parser = ReplyParser.for_tokenizer(tokenizer)
    events = [event for token in ids for event in parser.push(token)]
    kinds = [type(event) for event in events]
    assert kinds[0] is CallStart and kinds[-1] is CallEnd and kinds.count(CallArguments) > 2
    pieces = [event.text for event in events if isinstance(event, CallArguments)]
    assert json.loads("".join(pieces)) == call["arguments"] and not any("\ufffd" in piece for piece in pieces)


def test_思考里的调用是思考_没写完的思考也算思考():
    reply = parse_reply("想想<tool_call>x", thinking=True)
    assert (reply.text, reply.calls) == ("", []) and reply.reasoning == "想想<tool_call>x"


def test_被截断的调用说没有写完():
    (call,) = parse_reply('<tool_call>\n{"name": "f", "arguments": {"x": "一半').calls
    assert call.name == "f" and call.arguments == '{"x": "一半' and "没有写完" in call.error
