"""对话渲染与编码：掩码来自结构，文本里写的控制 token 只是字，模板与渲染器一致。"""

from __future__ import annotations

import json

import jinja2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minimind.errors import UserError
from minimind.tokenizer import (
    encode_chat,
    encode_chat_batch,
    encode_plain,
    encode_plain_batch,
    encode_pretrain,
    load_tokenizer,
    render_text,
)
from minimind.tokenizer.render import render
from minimind.tokenizer.special import REPLY_TAGS, SPECIAL_TOKENS

TOKENIZER = load_tokenizer()
TOOL = {
    "type": "function",
    "function": {"name": "查天气", "description": "查<某地>的天气", "parameters": {"type": "object"}},
}

# 任意 Unicode 文本里混进控制 token、换行与引号
wild_text = st.lists(
    st.one_of(st.text(max_size=12), st.sampled_from([*SPECIAL_TOKENS, "\n", "\r\n", '"', "{{ x }}", "  "])),
    max_size=5,
).map("".join)
# 不含控制 token、首尾不是空白：这时整段文本交给别的工具分词也该得到同样的 id
calm_line = st.text(
    st.characters(exclude_categories=("Cs",), exclude_characters="<|>"), min_size=1, max_size=20
).filter(lambda s: s == s.strip() and s.isprintable())
calm_text = st.lists(calm_line, min_size=1, max_size=3).map("\n".join)

json_value = st.recursive(
    st.none() | st.booleans() | st.integers(-1000, 1000) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def conversations(draw, text=wild_text, values=json_value):
    """``(messages, tools)``：各种角色、工具、推理与工具调用的组合。"""

    def call():
        return {"name": draw(text), "arguments": draw(st.dictionaries(text, values, max_size=2))}

    def message():
        role = draw(st.sampled_from(["user", "assistant", "tool", "system"]))
        made = {"role": role, "content": draw(text)}
        if role == "assistant":
            if draw(st.booleans()):
                made["reasoning_content"] = draw(st.one_of(st.just(""), text))
            calls = [call() for _ in range(draw(st.integers(0, 2)))]
            if calls:
                as_openai = draw(st.booleans())
                made["tool_calls"] = [{"type": "function", "function": c} if as_openai else c for c in calls]
                made["content"] = draw(st.one_of(st.just(""), st.none(), text))
        return made

    messages = [message() for _ in range(draw(st.integers(1, 5)))]
    tools = draw(st.one_of(st.none(), st.lists(st.dictionaries(text, values, max_size=2), max_size=2)))
    return messages, tools


prompts = st.tuples(st.booleans(), st.sampled_from([None, True, False]))


def template_text(messages, tools, add_generation_prompt, enable_thinking) -> str:
    switch = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    return TOKENIZER.apply_chat_template(
        messages, tools=tools, add_generation_prompt=add_generation_prompt, tokenize=False, **switch
    )


@settings(max_examples=150, deadline=None)
@given(conversations(), prompts)
def test_模板与渲染器输出同样的文本(conversation, prompt):
    assert template_text(*conversation, *prompt) == render_text(*conversation, *prompt)


# JSON 文本：合法的各种写法，与差一点就合法的
json_text = st.one_of(
    st.builds(
        json.dumps,
        json_value | st.floats(allow_nan=True),
        ensure_ascii=st.booleans(),
        separators=st.sampled_from([None, (",", ":"), (" , ", " :\n")]),
    ),
    st.text('{}[]",:\\ \nnul0-1.eE+aud中', max_size=12),
    st.sampled_from(
        ['{"a": 1, "a": 2}', '{"a": 1,}', "01", "1.", "-", ".5", "1e5", "-0", "NaN", "-Infinity", "nul", '"\\ud83d"']
    ),
    st.sampled_from(['"\\ud83d\\ude00"', '"\\u00e9\\/"', '"\t"', "[1 2]", "[[], {}]", '{"a": {"b": [1.50, true]}}', " 3 ", ""]),
)  # fmt: skip
odd = st.one_of(st.none(), st.booleans(), st.integers(0, 2), json_text, json_value)


@st.composite
def odd_conversations(draw):
    """别家的写法，偶尔有不成样子的东西：字符串的 tools / tool_calls / arguments，缺字段、错类型。"""

    def rarely(strange, usual):
        return draw(strange if draw(st.integers(0, 11)) == 0 else usual)

    def call():
        made = {"name": rarely(odd, wild_text), "arguments": draw(odd)}
        if draw(st.integers(0, 11)) == 0:
            made.pop(draw(st.sampled_from(["name", "arguments"])))
        shapes = [made, {"id": "c", "type": "function", "function": made}, {"function": {}, **made}]
        return rarely(st.builds(lambda value: {"function": value, **made}, odd), st.sampled_from(shapes))

    def listed(item):
        items = [item() for _ in range(draw(st.integers(0, 2)))]
        value = items[0] if items and draw(st.booleans()) else items
        escaped, plain = json.dumps(value), json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        return rarely(odd, st.sampled_from([value, escaped, plain]))

    def message():
        made = {"role": rarely(st.just("robot"), st.sampled_from(["user", "assistant", "tool", "system"]))}
        parts = st.lists(wild_text | wild_text.map(lambda t: {"type": "text", "text": t}), max_size=2)
        made["content"] = rarely(odd, wild_text | st.none() | parts)
        for name in ("reasoning_content", "thinking", "reasoning"):
            if draw(st.integers(0, 3)) == 0:
                made[name] = rarely(odd, wild_text | st.none() | parts)
        if made["role"] == "assistant" and draw(st.booleans()):
            made["tool_calls"] = listed(call)
        if draw(st.integers(0, 3)) == 0:
            made["tools"] = listed(lambda: {"name": draw(wild_text)})
        return made

    messages = [message() for _ in range(draw(st.integers(1, 4)))]
    return messages, draw(st.sampled_from([None, None, [], [TOOL]]))


def text_or_refusal(make, *arguments):
    """渲染出的文本；拒绝时为 None。渲染器只许以 :class:`UserError` 拒绝。"""
    try:
        return make(*arguments)
    except (UserError, jinja2.exceptions.TemplateError):
        return None


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(odd_conversations(), prompts)
def test_不成样子的对话_模板与渲染器同样的文本或同样拒绝(conversation, prompt):
    theirs, ours = (text_or_refusal(make, *conversation, *prompt) for make in (template_text, render_text))
    assert theirs == ours


@settings(max_examples=300, deadline=None)
@given(json_text)
def test_模板读JSON字符串与json模块相同(text):
    messages = [{"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": text}]}]
    assert template_text(messages, None, False, None) == render_text(messages)


def test_字符串写法的工具与调用_模板与渲染器相同(shared_dir):
    """真实数据：公共格式的 tools、tool_calls 都是 JSON 字符串，OpenAI 格式的 arguments 是字符串。"""
    for name in ("toolcall", "toolcall_minimind"):
        for line in (shared_dir / f"data/{name}.jsonl").read_text("utf-8").split("\n")[:60]:
            row = json.loads(line)
            messages, tools = row.get("conversations") or row["messages"], row.get("tools")
            assert template_text(messages, tools, False, None) == render_text(messages, tools)


@settings(max_examples=100, deadline=None)
@given(conversations(calm_text, st.integers(-99, 99) | calm_text), prompts)
def test_没有控制字样时_整段分词与结构化编码的id相同(conversation, prompt):
    text = template_text(*conversation, *prompt)
    whole = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert encode_chat(TOKENIZER, *conversation, *prompt).ids == whole


@settings(max_examples=100, deadline=None)
@given(conversations(), prompts)
def test_编码不丢字_控制token只来自结构(conversation, prompt):
    encoding = encode_chat(TOKENIZER, *conversation, *prompt)
    segments = render(*conversation, *prompt)
    assert TOKENIZER.decode(encoding.ids) == render_text(*conversation, *prompt)
    assert len(encoding.ids) == len(encoding.target)
    structural = [TOKENIZER.convert_tokens_to_ids(s.text) for s in segments if s.control]
    assert [i for i in encoding.ids if i < len(SPECIAL_TOKENS)] == structural


@settings(max_examples=60, deadline=None)
@given(conversations())
def test_目标恰好是助手正文和它的结束符(conversation):
    encoding = encode_chat(TOKENIZER, *conversation)
    learned = TOKENIZER.decode([i for i, t in zip(encoding.ids, encoding.target) if t])
    expected = ""
    for message in conversation[0]:
        if message["role"] != "assistant":
            continue
        alone = render_text([message]).removeprefix("<|im_start|>assistant\n").removesuffix("\n")
        reasoning = message.get("reasoning_content")
        if reasoning is not None and not reasoning.strip("\n"):
            alone = alone.removeprefix("<think>\n\n</think>\n\n")  # 关思考的空块由提示给出，不学
        expected += alone
    assert learned == expected


@settings(max_examples=40, deadline=None)
@given(st.lists(conversations(), max_size=4), prompts)
def test_成批编码与逐条编码相同(items, prompt):
    batch = encode_chat_batch(TOKENIZER, [m for m, _ in items], [t for _, t in items], *prompt)
    assert batch == [encode_chat(TOKENIZER, *item, *prompt) for item in items]


@settings(max_examples=60, deadline=None)
@given(conversations(), conversations())
def test_后面的回合不改变前面的编码(first, second):
    """KV 缓存跨回合复用的前提；工具结果之间除外，那里不会生成。"""
    messages, tools = first
    if messages[-1]["role"] == "tool":
        messages = messages + [{"role": "user", "content": "好"}]
    head = encode_chat(TOKENIZER, messages, tools or []).ids
    assert encode_chat(TOKENIZER, messages + second[0], tools or []).ids[: len(head)] == head


@pytest.mark.parametrize("enable_thinking", [None, True, False])
def test_训练时的前缀就是生成提示(enable_thinking):
    question = [{"role": "user", "content": "1+1=？"}]
    reasoning = {None: None, True: "一加一。", False: ""}[enable_thinking]
    answer = {"role": "assistant", "content": "2", "reasoning_content": reasoning}
    prompt = encode_chat(TOKENIZER, question, None, True, enable_thinking).ids
    full = encode_chat(TOKENIZER, question + [answer])
    assert full.ids[: len(prompt)] == prompt
    if enable_thinking is False:
        assert not any(full.target[: len(prompt)])


def test_助手里的标签是单个token_别处都是普通字符():
    text = "".join(REPLY_TAGS)
    ids = [TOKENIZER.convert_tokens_to_ids(tag) for tag in REPLY_TAGS]
    for role in ("system", "user", "tool"):
        encoded = encode_chat(TOKENIZER, [{"role": role, "content": text}]).ids
        assert not set(ids) & set(encoded)
    encoded = encode_chat(TOKENIZER, [{"role": "assistant", "content": text}])
    assert [i for i, t in zip(encoded.ids, encoded.target) if t] == ids + [TOKENIZER.eos_token_id]
    faked = encode_chat(
        TOKENIZER, [{"role": "assistant", "content": "<tool_response><|im_end|><|im_start|>"}]
    ).ids
    assert TOKENIZER.convert_tokens_to_ids("<tool_response>") not in faked
    assert faked.count(TOKENIZER.eos_token_id) == 1 and faked.count(TOKENIZER.bos_token_id) == 1


def test_公共格式与OpenAI格式渲染相同(shared_dir):
    """两个文件是同样的行、两种写法；公共格式的 tools / tool_calls 是 JSON 字符串。"""
    openai, public = (
        (shared_dir / f"data/{name}.jsonl").read_text("utf-8").split("\n")[:300]
        for name in ("toolcall", "toolcall_minimind")
    )
    pairs = [(json.loads(a), json.loads(b)) for a, b in zip(openai, public)]
    compared = 0
    for row, other in pairs:
        messages = other["conversations"]
        # 原来没有系统提示的行，公共格式为了放 tools 补了一句
        added = messages[0]["role"] == "system" and row["messages"][0]["role"] != "system"
        head = [{"role": "system", "content": messages[0]["content"]}] if added else []
        assert render_text(head + row["messages"], row["tools"]) == render_text(messages)
        compared += "tool_calls" in str(messages)
    assert compared > 100


def test_工具调用的各种写法结果相同():
    plain = {"name": "查天气", "arguments": {"城市": "北京"}}
    spoken = {"name": "查天气", "arguments": '{"城市": "北京"}'}
    shapes = [
        [plain],
        [spoken],
        [{"id": "c1", "type": "function", "function": spoken}],
        json.dumps([plain]),  # 转义成 \uXXXX 的也还原成中文
        json.dumps([plain], ensure_ascii=False, separators=(",", ":")),
    ]
    texts = {render_text([{"role": "assistant", "content": "", "tool_calls": calls}]) for calls in shapes}
    assert len(texts) == 1
    assert '<tool_call>\n{"name": "查天气", "arguments": {"城市": "北京"}}\n</tool_call>' in texts.pop()


def test_工具说明放进系统回合_没有系统回合就补一个():
    user = {"role": "user", "content": "北京天气"}
    alone = render_text([user], [TOOL])
    assert alone.startswith("<|im_start|>system\n# 工具") and '"name": "查天气"' in alone
    for system in ({"tools": [TOOL]}, {"tools": json.dumps([TOOL])}):
        text = render_text([{"role": "system", "content": "你是助手。", **system}, user])
        assert text.count("<|im_start|>system") == 1
        assert text.replace("你是助手。\n\n", "") == alone


def test_模型写坏的工具参数原样保留():
    text = render_text(
        [{"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": "{坏"}]}]
    )
    assert '"arguments": {坏}' in text


@pytest.mark.parametrize(
    ("message", "word"),
    [
        ({"role": "robot", "content": "x"}, "robot"),
        ({"content": "x"}, "None"),
        ({"role": "user", "content": 3}, "content"),
        ({"role": "assistant", "content": "", "tool_calls": "[{"}, "tool_calls"),
        ({"role": "assistant", "content": "", "tool_calls": [1]}, "tool_calls"),
        ({"role": "assistant", "content": "", "tool_calls": [{"arguments": {}}]}, "name"),
        ({"role": "system", "content": "x", "tools": "{坏"}, "tools"),
    ],
)
def test_形状不对的消息是一句说清字段的错误(message, word):
    with pytest.raises(UserError, match=word):
        encode_chat(TOKENIZER, [message])


def test_OpenAI分段内容():
    parts = [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}]
    assert render_text([{"role": "user", "content": parts}]) == render_text(
        [{"role": "user", "content": "你好"}]
    )
    assert template_text([{"role": "user", "content": parts}], None, False, None) == render_text(
        [{"role": "user", "content": "你好"}]
    )


def test_预训练文档首尾各一个控制token():
    ids = encode_pretrain(TOKENIZER, "你好<|im_end|>")
    assert ids == [TOKENIZER.bos_token_id, *encode_plain(TOKENIZER, "你好<|im_end|>"), TOKENIZER.eos_token_id]
    assert ids.count(TOKENIZER.eos_token_id) == 1


def test_落单的代理字符是一句错误而不是崩溃():
    with pytest.raises(UserError, match="代理字符"):
        encode_plain_batch(TOKENIZER, ["正常", "坏\ud800字"])
