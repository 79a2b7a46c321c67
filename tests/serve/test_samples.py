"""一个样本的文字：工具调用只在请求带了工具时才给成 ``tool_calls``。"""

from __future__ import annotations

import pytest

from minimind.inference.reply import ReplyParser
from minimind.serve.chat import merge_delta
from minimind.serve.samples import ChatSample
from minimind.serve.stops import StopMatcher
from minimind.serve.tickets import Progress, TokenOut
from minimind.tokenizer import encode_chat, load_tokenizer

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
        for delta in sample.push(Progress(0, [TokenOut(token)], finished)):
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
    pieces = [d["content"] for t in ids for d in sample.push(Progress(0, [TokenOut(t)], None))]
    assert "".join(pieces) == "好的。calculator".split(stop)[0] and sample.finish_reason == "stop"
