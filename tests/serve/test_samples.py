"""一个样本的文字：工具调用只在请求带了工具时才给成 ``tool_calls``。"""

from __future__ import annotations

import json

import pytest

from minimind.inference.generate import TextStream
from minimind.inference.reply import ReplyParser
from minimind.serve.chat import merge_delta
from minimind.serve.samples import ChatSample, TextSample
from minimind.serve.stops import StopMatcher
from minimind.serve.tickets import Increment, TokenOut
from minimind.tokenizer import encode_chat, encode_plain, load_tokenizer
from minimind.tokenizer.loading import codec_of
from minimind.tokenizer.vocabulary import vocabulary_of

CALL = {"function": {"name": "calculator", "arguments": '{"expression": "1+1"}'}}


def answer(calls: bool) -> tuple[dict, str | None]:
    """模型写了一句话与一次调用，逐词元放进去。"""
    tokenizer = load_tokenizer()
    user = {"role": "user", "content": "算"}
    written = {"role": "assistant", "content": "好的。", "tool_calls": [CALL]}
    start = len(encode_chat(tokenizer, [user], add_generation_prompt=True).ids)
    ids = encode_chat(tokenizer, [user, written]).ids[start:]
    ids = ids[: ids.index(tokenizer.eos_token_id) + 1]
    parser = ReplyParser.for_tokenizer(tokenizer, make_id=lambda index: f"call_{index}")
    sample = ChatSample(0, parser, StopMatcher([]), {tokenizer.eos_token_id}, calls)
    message: dict = {"role": "assistant"}
    for position, token in enumerate(ids):
        finished = "stop" if position == len(ids) - 1 else None
        for delta in sample.push(Increment(0, [TokenOut(token)], finished)):
            merge_delta(message, delta)
    return message, sample.finish_reason


def test_带了工具_调用单独给出():
    message, reason = answer(True)
    assert message["content"] == "好的。" and reason == "tool_calls"
    assert message["tool_calls"] == [{"id": "call_0", "type": "function", **CALL}]


def test_没带工具_调用当正文给_标签不露():
    message, reason = answer(False)
    assert reason == "stop" and "tool_calls" not in message
    assert message["content"].startswith("好的。") and '"calculator"' in message["content"]
    assert "<tool_call>" not in message["content"]


@pytest.mark.parametrize("stop", ["。", "calc"])
def test_停止串对正文有效(stop):
    tokenizer = load_tokenizer()
    ids = tokenizer("好的。calculator", add_special_tokens=False).input_ids
    sample = ChatSample(0, ReplyParser.for_tokenizer(tokenizer), StopMatcher([stop]), set())
    pieces = [d["content"] for t in ids for d in sample.push(Increment(0, [TokenOut(t)], None))]
    assert "".join(pieces) == "好的。calculator".split(stop)[0] and sample.finish_reason == "stop"


# ---------------------------------------------------------------- 照着写：标签是真的，其余是文字


def ids_of(text):
    """``<tool_call>`` 一类写成真的标签。"""
    tokenizer = load_tokenizer()
    controls, ids = codec_of(tokenizer).controls, []
    for piece in text.replace("<", "\0<").replace(">", ">\0").split("\0"):
        ids += [controls[piece]] if piece in controls else encode_plain(tokenizer, piece)
    return ids


def play(text, finished="stop", thinking=False, eos=None, stops=(), **options):
    """逐个词元放进去；返回各 delta、并好的消息、为什么停、样本。"""
    tokenizer = load_tokenizer()
    eos = tokenizer.eos_token_id
    parser = ReplyParser.for_tokenizer(tokenizer, thinking, make_id=lambda index: f"call_{index}")
    sample = ChatSample(0, parser, StopMatcher(list(stops)), {eos}, **options)
    ids = ids_of(text) + ([eos] if finished == "stop" else [])
    deltas = []
    for position, token in enumerate(ids):
        last = finished if position == len(ids) - 1 else None
        deltas += sample.push(Increment(0, [TokenOut(token)], last))
        if sample.finish_reason is not None:
            break
    message: dict = {}
    for delta in deltas:
        merge_delta(message, delta)
    if sample.unclosed:
        message.pop("reasoning_content", None)
    return deltas, message, sample.finish_reason, sample


WEATHER = '<tool_call>\n{"name": "weather", "arguments": {"city": "北京", "days": 3}}\n</tool_call>'


def test_截断在调用的任何地方_都是length():
    ids = len(ids_of(WEATHER))
    tokenizer = load_tokenizer()
    for cut in range(1, ids + 1):
        parser = ReplyParser.for_tokenizer(tokenizer)
        sample = ChatSample(0, parser, StopMatcher([]), {tokenizer.eos_token_id})
        tokens = [TokenOut(token) for token in ids_of(WEATHER)[:cut]]
        list(sample.push(Increment(0, tokens, "length")))
        assert sample.finish_reason == "length", cut


def test_第二个调用被截断也是length_写完的才是tool_calls():
    _, message, reason, _ = play(f"{WEATHER}\n{WEATHER[:40]}", "length")
    assert reason == "length" and len(message["tool_calls"]) >= 1
    assert play(f"{WEATHER}\n{WEATHER}")[2] == "tool_calls"


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        ('{"name": "f", "arguments": null}', {}),
        ('{"name": "f", "arguments": ""}', {}),
        ('{"name": "f"}', {}),
        ('{"name": "f", "parameters": {"a": 1}}', {"a": 1}),
        ('{"parameters": {"a": 1}, "name": "f"}', {"a": 1}),
        ('{"name": "f", "parameters": null}', {}),
        ('{"name": "f", "parameters": "{\\"a\\": 2}"}', {"a": 2}),
        ('{"name": "f", "arguments": null, "parameters": {"a": 4}}', {"a": 4}),
        ('{"type": "function", "function": {"name": "f", "arguments": {"a": 3}}}', {"a": 3}),
        ('{"name": "f", "arguments": {"a": "一\n二\t三"}}', {"a": "一\n二\t三"}),
        ('{"name": "f", "arguments": {"键\n": ["\r\n", {"b": "\x01"}]}}', {"键\n": ["\r\n", {"b": "\x01"}]}),
        ('{"arguments": {"a": "一\n二"}, "name": "f"}', {"a": "一\n二"}),
        ('{"arguments": {"a": "\\ud800"}, "name": "f"}', {"a": "\ud800"}),
    ],
)
def test_各种写法的参数都读得出_给出去的总是合法的JSON(call, arguments):
    deltas, message, reason, _ = play(f"<tool_call>\n{call}\n</tool_call>")
    (made,) = message["tool_calls"]
    assert json.loads(made["function"]["arguments"]) == arguments and reason == "tool_calls"
    assert message.get("content") is None and made["function"]["name"] == "f"
    json.dumps(deltas, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    "call", ['{"name": "f", "arguments": {"a": }}', '{"name": "f", "arguments": {"a": NaN}}']
)
def test_写坏的参数不说tool_calls(call):
    assert play(f"<tool_call>\n{call}\n</tool_call>")[2] == "stop"


def test_没有arguments却有别的_不悄悄丢掉():
    _, message, reason, _ = play('<tool_call>\n{"name": "f", "expression": "1+1"}\n</tool_call>')
    assert "tool_calls" not in message and "expression" in message["content"] and reason == "stop"


def test_只差收尾标签的调用照样能执行():
    _, message, reason, _ = play(WEATHER.removesuffix("\n</tool_call>"))
    assert reason == "tool_calls" and json.loads(message["tool_calls"][0]["function"]["arguments"])


def test_扣着的停止串开头在调用之前给出():
    deltas, message, reason, _ = play(f"好的。EN{WEATHER}", stops=["END"])
    kinds = [next(iter(delta)) for delta in deltas]
    assert message["content"] == "好的。EN" and reason == "tool_calls"
    assert kinds.index("tool_calls") > max(i for i, kind in enumerate(kinds) if kind == "content")


def test_parallel_tool_calls为假_第一个调用之后就停():
    _, message, reason, _ = play(f"{WEATHER}\n{WEATHER}", one_call=True)
    assert len(message["tool_calls"]) == 1 and reason == "tool_calls"
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"city": "北京", "days": 3}


@pytest.mark.parametrize("text", ["35-4=31。", "<think>\n35-4=31。"])
def test_没有收尾的思考写完了_就是回答(text):
    deltas, message, reason, sample = play(text, thinking=not text.startswith("<"))
    assert message == {"content": "35-4=31。"} and reason == "stop" and sample.unclosed
    assert "".join(delta.get("content", "") for delta in deltas) == "35-4=31。", "流式也给正文"


def test_没有收尾的思考里的调用_写完了就是调用_截断了还是思考():
    _, message, reason, _ = play(WEATHER, thinking=True)
    assert message["tool_calls"][0]["function"]["name"] == "weather" and reason == "tool_calls"
    _, message, reason, sample = play("还在想", "length", thinking=True)
    assert message == {"reasoning_content": "还在想"} and reason == "length" and not sample.unclosed


def test_收尾了的思考照旧():
    _, message, _, sample = play("想\n</think>\n\n好", thinking=True)
    assert message == {"reasoning_content": "想", "content": "好"} and not sample.unclosed


@pytest.mark.parametrize(
    ("before", "text", "expected"),
    [
        ("35-4=", "31。", {"content": "31。"}),
        ("第一行\n", "第二行", {"content": "第二行"}),
        ("<think>\n先", "想\n</think>\n\n好", {"reasoning_content": "想", "content": "好"}),
        ("<think>\n先想\n</think>\n\n", "好", {"content": "好"}),
    ],
)
def test_接着写_只给新写的(before, text, expected):
    assert play(text, written_before=ids_of(before))[1] == expected


def test_接着写一半的调用_名字与剩下的参数照给():
    cut = len(WEATHER) - len('京", "days": 3}}\n</tool_call>')
    _, message, reason, _ = play(WEATHER[cut:], written_before=ids_of(WEATHER[:cut]))
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"city": "北京", "days": 3}
    assert reason == "tool_calls"


def test_停止串自己也给_写够之前不算数():
    tokenizer = load_tokenizer()
    sample = ChatSample(
        0, ReplyParser.for_tokenizer(tokenizer), StopMatcher(["停"], include=True), set(), least=3
    )
    ids = [token for word in "停甲乙丙停丁" for token in encode_plain(tokenizer, word)]
    assert len(ids) == 6
    pieces = [d["content"] for t in ids for d in sample.push(Increment(0, [TokenOut(t)], None))]
    assert "".join(pieces).startswith("停甲乙丙停") and sample.finish_reason == "stop"


# ---------------------------------------------------------------- 续写的对数概率


def test_一个字分成几个词元_写法各不相同_位置不漂移():
    tokenizer = load_tokenizer()
    vocabulary = vocabulary_of(tokenizer)
    ids = encode_plain(tokenizer, "a龘鱻😀b")
    assert len(ids) > 5, "这几个字都不是一个词元"
    sample = TextSample(0, TextStream(tokenizer), StopMatcher([]), {tokenizer.eos_token_id})
    halves = [ids[2], ids[3], ids[4]]
    tops = tuple((token, -float(rank)) for rank, token in enumerate(halves))
    text = ""
    for token in [*ids, tokenizer.eos_token_id]:
        text += sample.push(Increment(0, [TokenOut(token, -0.5, tops)], None))
    logprobs = sample.take_logprobs(vocabulary)
    assert text == "a龘鱻😀b"
    # 手算：每个词元从它的第一个字节所在的那个字开始
    expected, data = [], b""
    for token in ids:
        expected.append(len(data.decode("utf-8", "ignore")))
        data += vocabulary.bytes_of(token)
    assert logprobs["text_offset"] == [*expected, len(text)]
    for token, name, table in zip(ids, logprobs["tokens"], logprobs["top_logprobs"]):
        assert len(table) == len({*halves, token}) and table[name] == -0.5 and "\ufffd" not in name


def test_没写完的字后面换了别的_那个替代符算在没写完的词元上():
    tokenizer = load_tokenizer()
    vocabulary = vocabulary_of(tokenizer)
    half = encode_plain(tokenizer, "龘")[0]
    assert len(vocabulary.bytes_of(half)) == 2, "这个字的头两个字节"
    ids = [half, encode_plain(tokenizer, "你好")[0], half, half, encode_plain(tokenizer, "b")[0]]
    sample = TextSample(0, TextStream(tokenizer), StopMatcher([]), set())
    text = "".join(sample.push(Increment(0, [TokenOut(token)], None)) for token in ids)
    assert text == "�你好��b"
    assert sample.take_logprobs(vocabulary)["text_offset"] == [0, 1, 3, 4, 5]
