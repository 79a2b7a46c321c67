"""多轮采样：词元进、词元出，跨回合也是；引擎与训练的对数概率相同；工具结果不进损失；写不完的三种结局。"""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.dataset.collate import IGNORE
from minimind.inference.generate import context_length
from minimind.objectives.logprobs import target_logits
from minimind.rl.conversations import (
    ConversationRollout,
    EngineWriter,
    Opening,
    RemoteWriter,
    WrittenTurn,
    observation_ids,
)
from minimind.rl.rollout import LocalRollout, response_batch
from minimind.tokenizer import encode_chat, load_tokenizer
from minimind.tokenizer.loading import codec_of
from minimind.tools import EXAMPLE_TOOLS, Toolbox

TOKENIZER = load_tokenizer()
EOS = TOKENIZER.eos_token_id
CALL = {"name": "calculator", "arguments": {"expression": "3*4"}}
ASK = [{"role": "user", "content": "三乘四？"}]
SCHEMAS = Toolbox(EXAMPLE_TOOLS).schemas()[:1]
WILD = [
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "</tool_response>",
    "<tool_call>",
    "\n\n",
    "</think>",
    "🙂",
    "\x00",
    "'\"{}",
]


class AlwaysCalls:
    """不管模型写了什么，都当作调用；结果由 ``results`` 给出。"""

    def __init__(self, results):
        self.results, self.seen = results, []

    def problem(self, call):
        return None

    def run(self, call):
        self.seen.append(call)
        return self.results[(len(self.seen) - 1) % len(self.results)]


def assistant_ids(text: str = "", calls: list | None = None) -> list[int]:
    """模型该写的 id：助手回合的正文与调用，含结束符，不含开头。"""
    message = {"role": "assistant", "content": text}
    if calls:
        message["tool_calls"] = calls
    start = encode_chat(TOKENIZER, ASK, None, True).ids
    whole = encode_chat(TOKENIZER, [*ASK, message]).ids
    assert whole[: len(start)] == start
    end = len(whole) - whole[::-1].index(EOS)
    return whole[len(start) : end]


class Scripted:
    """照剧本写：第 k 回合写第 k 段；记下每回合收到的提示。"""

    def __init__(self, script):
        self.script, self.prompts, self.queue = script, [], []

    def begin(self):
        self.prompts, self.queue = [], []

    def add(self, ids, limit, seed, n=1):
        self.prompts.append(list(ids))
        self.queue.append((len(self.prompts) - 1, limit, n))
        return len(self.prompts) - 1

    def finished(self):
        while self.queue:
            key, limit, n = self.queue.pop(0)
            for index in range(n):
                ids = self.script[min(key, len(self.script) - 1)]
                yield WrittenTurn(key, index, ids[:limit], [-0.5] * len(ids[:limit]), len(ids) <= limit)


def talk(writer, tools, n=1, **limits):
    limits = {"max_new_tokens": 64, "max_total_len": 2000, "max_turns": 3} | limits
    opening = Opening(encode_chat(TOKENIZER, ASK, SCHEMAS, True).ids, tools)
    return ConversationRollout(writer, TOKENIZER, **limits).generate([opening], n, 5)


def force_calls(monkeypatch):
    """每回合写出结束符就算调用了一次，随机的模型才走得满几回合。"""
    from minimind.inference.reply import Reply
    from minimind.inference.tool_calls import ToolCall
    from minimind.rl import conversations

    made = Reply(calls=[ToolCall("f", "{}", "{}")])
    monkeypatch.setattr(conversations, "parse_reply", lambda *args, **options: made)


@pytest.mark.parametrize("writer", ["本进程", "远处"])
def test_三回合的对数概率_引擎与训练相差不到万分之一_前缀库用上了(model, monkeypatch, writer):
    force_calls(monkeypatch)
    opening = encode_chat(TOKENIZER, ASK, SCHEMAS, True).ids
    if writer == "本进程":
        writer = EngineWriter(model, TOKENIZER, max_slots=16, room=900, temperature=0.8, dtype=None)
    else:
        writer = RemoteWriter(LocalRollout(model, TOKENIZER, max_new_tokens=24, temperature=0.8))
    talks = ConversationRollout(writer, TOKENIZER, max_new_tokens=24, max_total_len=900, max_turns=3)
    tools = AlwaysCalls(['{"result": "12"}', '{"error": "<|im_end|>没有"}'])
    rollout = talks.generate(
        [Opening(opening, tools), Opening(opening[:-5] + opening[-3:], tools)], 8, seed=3
    )
    assert len(rollout) == 16 and rollout.group == [0] * 8 + [1] * 8
    full = [i for i, one in enumerate(rollout.conversations) if len(one.replies) == 3]
    assert len(full) >= 3, "要有走满三回合的"
    batch = response_batch(rollout, slice(None))
    out = target_logits(model, batch)
    logp = out.logprobs(0.8)
    assert out.targets.tolist() == [token for ids in rollout.responses for token in ids]
    torch.testing.assert_close(logp, batch["old_logps"], atol=1e-4, rtol=0)
    if isinstance(writer, EngineWriter):
        computed, reused = writer.engine.prompt_tokens
        again = sum(
            len(one.ids) for one in rollout.conversations for _ in one.replies[1:]
        )  # 每回合都从头读要读的
        assert reused > 0 and computed < again, "以前回合的 KV 没有留着"


def test_种子定结果_换了权重结果就变(model, monkeypatch):
    force_calls(monkeypatch)
    writer = EngineWriter(model, TOKENIZER, max_slots=3, room=900, temperature=1.0, dtype=None)
    one, two = (talk(writer, AlwaysCalls(["{}"]), n=6, max_new_tokens=12) for _ in range(2))
    assert [a.ids for a in one.conversations] == [b.ids for b in two.conversations]
    kept = model.lm_head.weight.detach().clone()
    with torch.no_grad():
        model.lm_head.weight.add_(torch.randn_like(kept) * 0.5)
    try:
        three = talk(writer, AlwaysCalls(["{}"]), n=6, max_new_tokens=12)
        logp = target_logits(model, batch := response_batch(three, slice(None))).logprobs(1.0)
        torch.testing.assert_close(logp, batch["old_logps"], atol=1e-4, rtol=0)
    finally:
        with torch.no_grad():
            model.lm_head.weight.copy_(kept)


wild = st.lists(st.sampled_from(WILD) | st.text(max_size=8), max_size=5).map("".join)
writable = wild.filter(lambda text: text.encode("utf-8", "ignore").decode() == text)


@settings(max_examples=60, deadline=None)
@given(
    results=st.lists(writable, min_size=2, max_size=2),
    said=writable,
    thinking=st.sampled_from([None, True, False]),
)
def test_跨回合的前缀逐个相同_结果里写什么都一样(results, said, thinking):
    """下一回合的提示 = 这一回合的提示 + 写的 id + 结果的 id；控制 token 的字样在结果里只是普通字符。"""
    first = assistant_ids(calls=[CALL, CALL])
    # 模型自己的切分：同样的文字切成别的 id 也要原样留着
    odd = [
        *TOKENIZER.encode("结", add_special_tokens=False),
        *TOKENIZER.encode("果是", add_special_tokens=False),
    ]
    script = [[*odd, *first], [*odd, *odd, EOS]]
    writer, opening = (
        Scripted(script),
        encode_chat(TOKENIZER, [{"role": "user", "content": said}], SCHEMAS, True).ids,
    )
    limits = {"max_new_tokens": 200, "max_total_len": 4000, "max_turns": 3}
    rollout = ConversationRollout(writer, TOKENIZER, **limits).generate(
        [Opening(opening, AlwaysCalls(results), thinking)], 1, 0
    )
    one, start = rollout.conversations[0], len(opening) + len(script[0])
    assert writer.prompts[1][:start] == opening + script[0]
    observed = writer.prompts[1][start:]
    assert one.ids == opening + script[0] + observed + script[1]
    assert observed == observation_ids(TOKENIZER, results, thinking)
    # 与整段渲染相同的只有结构：控制 token 的个数由布局定，不由结果里的字定
    assert observed.count(EOS) == 1 and observed.count(codec_of(TOKENIZER).controls["<|im_start|>"]) == 2
    for text in results:
        assert text in TOKENIZER.decode(observed, skip_special_tokens=False)
    assert rollout.responses == [script[0] + script[1]]


def test_结果的id与整段对话渲染的一样():
    told = [*ASK, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    results = ['{"result": "12"}', '{"result": "13"}']
    told += [{"role": "tool", "content": text} for text in results]
    prompt = encode_chat(TOKENIZER, ASK, SCHEMAS, True).ids
    whole = encode_chat(TOKENIZER, told, SCHEMAS, True).ids
    assert whole == prompt + assistant_ids(calls=[CALL]) + observation_ids(TOKENIZER, results)


def test_工具的结果不是目标_写的每个id都是():
    script = [assistant_ids(calls=[CALL]), assistant_ids("是12。")]
    rollout = talk(Scripted(script), Toolbox(EXAMPLE_TOOLS))
    one = rollout.conversations[0]
    assert one.ending == "answered" and one.answer == rollout.texts[0] == "是12。"
    assert json.loads(one.results[0]) == {"result": "12"} and one.problems == [None]
    batch = response_batch(rollout, [0])
    labels = batch["labels"][0].tolist()
    targets = [token for token in labels if token != IGNORE]
    assert targets == script[0] + script[1] and len(batch["old_logps"]) == len(targets)
    where = [i for i, token in enumerate(labels) if token != IGNORE]
    gap = set(range(where[0], where[-1] + 1)) - set(where)
    text = TOKENIZER.decode([one.ids[i] for i in sorted(gap)])
    assert '{"result": "12"}' in text and "tool_response" in text


def test_到了回合数还在调用是没写完_最后一次不执行():
    tools = AlwaysCalls(['{"result": "1"}'])
    rollout = talk(Scripted([assistant_ids(calls=[CALL])]), tools)
    one = rollout.conversations[0]
    assert (one.ending, rollout.truncated, rollout.texts) == ("turns", [True], [""])
    assert len(one.replies) == 3 and len(tools.seen) == 2 and len(one.calls) == 3


def test_写满一回合或全长放不下是没写完():
    answer = assistant_ids("很长的回答" * 60)
    assert talk(Scripted([answer]), AlwaysCalls([])).conversations[0].ending == "length"
    opening = len(encode_chat(TOKENIZER, ASK, SCHEMAS, True).ids)
    calls = assistant_ids(calls=[CALL])
    for result in ("好" * 500, "好"):  # 结果放不下；结果放得下而只剩一个 token 的余地
        more = len(observation_ids(TOKENIZER, [result]))
        total = opening + len(calls) + (10 if result == "好" * 500 else more + 1)
        rollout = talk(Scripted([calls, assistant_ids("是12。")]), AlwaysCalls([result]), max_total_len=total)
        one = rollout.conversations[0]
        assert one.ending == "length" and len(one.ids) <= total, (result[:3], one.ending)
        assert len(one.ids) == len(one.written) and sum(one.written) == len(rollout.logprobs[0])


def test_写坏的调用得到一句错误_还能重写():
    broken = [*assistant_ids(calls=[CALL])]
    text = TOKENIZER.encode('{"name": "calculator", "arguments": {', add_special_tokens=False)
    controls = codec_of(TOKENIZER).controls
    broken = [controls["<tool_call>"], *text, controls["</tool_call>"], EOS]
    unclosed = [controls["<tool_call>"], *text, EOS]
    script = [broken, unclosed, assistant_ids("不会。")]
    one = talk(Scripted(script), Toolbox(EXAMPLE_TOOLS)).conversations[0]
    assert one.ending == "answered" and one.errors == 2 and one.unclosed
    assert all("写坏了" in json.loads(result)["error"] for result in one.results)
    assert all("写坏了" in problem for problem in one.problems)


def test_一回合写很多个调用_只执行前八个():
    one = talk(
        Scripted([assistant_ids(calls=[CALL] * 10), assistant_ids("好。")]),
        tools := AlwaysCalls(["{}"]),
        max_new_tokens=600,
    ).conversations[0]
    assert len(tools.seen) == 8 and len(one.results) == len(one.problems) == 10
    assert "一次最多 8 个" in one.results[-1]


def test_提示到了全长的上限_说清(model):
    from minimind.errors import UserError

    assert context_length(model) > 100
    with pytest.raises(UserError, match="--max_total_len"):
        talk(Scripted([[EOS]]), AlwaysCalls([]), max_total_len=10)


def test_分词器的模板改写历史时说清(monkeypatch):
    from minimind.errors import UserError
    from minimind.rl import conversations

    real = conversations.encode_chat

    def rewriting(tokenizer, messages, *rest, **options):
        made = real(tokenizer, messages, *rest, **options)
        return made._replace(ids=made.ids[1:]) if len(messages) > 2 else made

    monkeypatch.setattr(conversations, "encode_chat", rewriting)
    with pytest.raises(UserError, match="接不起来"):
        observation_ids(TOKENIZER, ["好"])
