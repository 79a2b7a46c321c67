"""一场对话各轮共用一个引擎：历史不重算，文字与每轮新开一个引擎相同；说到一半打断也不影响下一轮。"""

import pytest
from engine_helpers import tiny

from minimind.inference.chat import ChatSession
from minimind.inference.generate import stream_tokens
from minimind.inference.loading import stop_ids
from minimind.inference.prefix_store import BLOCK
from minimind.inference.sampling import SamplingParams
from minimind.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def parts():
    tokenizer = load_tokenizer()
    return tiny(max_position_embeddings=512, vocab_size=len(tokenizer)), tokenizer


def session_of(parts, params):
    return ChatSession(*parts, params, max_new_tokens=24, history_messages=6)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_第二轮抄第一轮的_文字不变(parts, temperature):
    params = SamplingParams(temperature=temperature, seed=3)
    session, previous = session_of(parts, params), 0
    for question in ("雪顶镇的特产是什么？请说得详细一些。", "还有呢？", "一共几样？"):
        prompt, before = session.encode(question), session.engine.prompt_tokens
        eos = stop_ids(*parts)
        ids = stream_tokens(parts[0], prompt, max_new_tokens=24, params=params, eos_ids=eos)
        want = parts[1].decode(list(ids), skip_special_tokens=True)
        assert "".join(session.reply(question)) == want
        computed, reused = (b - a for a, b in zip(before, session.engine.prompt_tokens))
        assert computed + reused == len(prompt)
        assert reused >= previous // BLOCK * BLOCK, "上一轮的提示都是抄来的"
        previous = len(prompt)


def test_说到一半打断_下一轮照旧(parts):
    params = SamplingParams(temperature=1.0, seed=3)
    session = session_of(parts, params)
    answer = session.reply("你好")
    next(answer)
    answer.close()
    assert session.messages == []
    assert "".join(session.reply("你好")) == "".join(session_of(parts, params).reply("你好"))
