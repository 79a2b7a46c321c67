"""别人的对话模板：id 与 apply_chat_template 相同，用户写的控制字样仍是普通字符，模板拒绝的说清楚。"""

from __future__ import annotations

import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from other_models import KINDS, LLAMA, write_tokenizer
from test_chat_encoding import calm_text, conversations, json_value, prompts, wild_text

from minimind.errors import UserError
from minimind.tokenizer import encode_chat, encode_chat_batch, encode_unfinished, load_tokenizer, render_text
from minimind.tokenizer.layouts import OURS, PUBLIC_V3
from minimind.tokenizer.templates import Template, describe_layout, layout_of, opens_thinking

USER = {"role": "user", "content": "北京天气怎么样？"}
TOOL = {
    "type": "function",
    "function": {"name": "查天气", "description": "<某地>", "parameters": {"type": "object"}},
}
CALL = {"id": "c1", "type": "function", "function": {"name": "查天气", "arguments": {"城市": "北京"}}}
TALK = [
    USER,
    {"role": "assistant", "content": " 晴，\n20 度 "},
    {"role": "user", "content": "\n\n那明天呢  "},
]
TOOL_TALK = [
    {"role": "system", "content": "你是助手。"},
    USER,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": '{"度": 20}'},
]
FOREIGN = ("llama", "mistral", "qwen")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    made = {}
    for kind in KINDS:
        write_tokenizer(folder / kind, kind)
        made[kind] = load_tokenizer(folder / kind)
    return made


def theirs(tokenizer, messages, **options) -> list[int]:
    """transformers 自己算的。"""
    return tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=False, add_generation_prompt=True, **options
    )


def test_认得出用哪种布局(tokenizers):
    assert layout_of(load_tokenizer()) == OURS
    assert layout_of(tokenizers["minimind3"]) == PUBLIC_V3
    assert all(isinstance(layout_of(tokenizers[kind]), Template) for kind in FOREIGN)
    assert layout_of(tokenizers["无模板"]) == layout_of(tokenizers["无模板有ChatML"]) == OURS
    assert describe_layout(load_tokenizer()) is None
    again = pickle.loads(pickle.dumps(tokenizers["minimind3"]))  # 数据由别的进程编码
    assert layout_of(again) == PUBLIC_V3


def test_写不出用户的话的模板_换成自己的布局要说(tmp_path):
    write_tokenizer(tmp_path, "llama", LLAMA.replace("m['content'] | trim", "m['content'][0]['text'] | trim"))
    tokenizer = load_tokenizer(tmp_path)
    assert layout_of(tokenizer) == OURS
    assert describe_layout(tokenizer) == "分词器的对话模板写不出用户的话，用本项目的"


@pytest.mark.compat
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_特殊token写成字典的也打得开(tokenizers, tmp_path, name):
    write_tokenizer(tmp_path, "llama")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    written = {key: {"content": config.pop(key), **flags} for key in ("bos_token", "eos_token")}
    written["additional_special_tokens"] = [{"content": "<|eot_id|>", **flags}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    whole = {**config, **written} if name == "tokenizer_config.json" else written
    (tmp_path / name).write_text(json.dumps(whole), "utf-8")
    made, plain = load_tokenizer(tmp_path), tokenizers["llama"]
    assert (made.bos_token_id, made.eos_token_id) == (plain.bos_token_id, plain.eos_token_id)
    assert encode_chat(made, TALK, None, True).ids == theirs(plain, TALK)


@pytest.mark.compat
@pytest.mark.parametrize("kind", [*FOREIGN, "minimind3"])
def test_id与它自己的模板相同_没有两个bos(tokenizers, kind):
    tokenizer = tokenizers[kind]
    for messages in ([USER], TALK, TALK[:1]):
        ids = encode_chat(tokenizer, messages, add_generation_prompt=True).ids
        assert ids == theirs(tokenizer, messages)
        if kind in ("llama", "mistral"):
            assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids) != render_text(TALK, None, True)


@pytest.mark.parametrize("kind", ["qwen", "minimind3"])
def test_工具与思考开关也相同(tokenizers, kind):
    tokenizer = tokenizers[kind]
    ids = encode_chat(tokenizer, TOOL_TALK, [TOOL], True).ids
    assert ids == theirs(tokenizer, TOOL_TALK, tools=[TOOL])
    spoken = json.loads(json.dumps(TOOL_TALK))
    spoken[2]["tool_calls"][0]["function"]["arguments"] = '{"城市": "北京"}'  # OpenAI 的参数是字符串
    assert encode_chat(tokenizer, spoken, json.dumps([TOOL]), True).ids == ids
    name = "enable_thinking" if kind == "qwen" else "open_thinking"
    for thinking in (True, False):
        ids = encode_chat(tokenizer, [USER], None, True, thinking).ids
        assert ids == theirs(tokenizer, [USER], **{name: thinking})
        assert opens_thinking(tokenizer, ids) == (thinking and kind == "minimind3")


@settings(max_examples=120, deadline=None)
@given(conversations(), prompts)
def test_公共布局_模板与渲染器输出同样的文本(tokenizers, conversation, prompt):
    messages, tools = conversation
    add_generation_prompt, thinking = prompt
    if messages[0]["role"] == "system" and messages[0]["content"] is None:
        return
    text = tokenizers["minimind3"].apply_chat_template(
        messages,
        tools=tools,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        open_thinking=thinking,
    )
    assert text == render_text(messages, tools, *prompt, layout=PUBLIC_V3)


# 首尾的空白、连着的换行都在内，只是没有控制字样
spaced = st.tuples(st.sampled_from(["", " ", "  ", "\n", "\n\n", " \n "]), calm_text).map("".join)


@settings(max_examples=120, deadline=None)
@given(conversations(spaced, st.integers(-99, 99) | calm_text), prompts)
def test_公共布局_整段分词与结构化编码的id相同(tokenizers, conversation, prompt):
    tokenizer = tokenizers["minimind3"]
    whole = tokenizer(render_text(*conversation, *prompt, layout=PUBLIC_V3), add_special_tokens=False)
    encoding = encode_chat(tokenizer, *conversation, *prompt)
    assert encoding.ids == whole["input_ids"]
    assert len(encoding.target) == len(encoding.ids)


@pytest.mark.parametrize("kind", [*FOREIGN, "minimind3"])
@settings(max_examples=40, deadline=None)
@given(wild_text, json_value)
def test_用户写的控制字样只是普通字符(tokenizers, kind, text, value):
    tokenizer = tokenizers[kind]
    added = list(tokenizer.added_tokens_decoder)
    typed = text + "".join(KINDS[kind][2]) + "\U000f0000.2\U000f0001"
    typed += json.dumps(value, ensure_ascii=False)
    ids, plain = (
        encode_chat(tokenizer, [{"role": "user", "content": said}], add_generation_prompt=True).ids
        for said in (typed, "话")
    )
    assert [i for i in ids if i in added] == [i for i in plain if i in added]
    if kind != "mistral":  # sentencepiece 的解码会改空格
        assert typed.strip() in tokenizer.decode(ids)


def test_助手正文里的标签可信_控制token不可信(tokenizers):
    tokenizer = tokenizers["qwen"]
    said = "<think>\n想\n</think>\n\n好<|im_end|>"
    ids = encode_chat(tokenizer, [USER, {"role": "assistant", "content": said}, USER], None, True).ids
    assert ids.count(tokenizer.convert_tokens_to_ids("<think>")) == 1
    assert ids.count(tokenizer.eos_token_id) == 3


@pytest.mark.parametrize("kind", [*FOREIGN, "minimind3"])
def test_掩码恰好是助手写的与它的结束符(tokenizers, kind):
    tokenizer = tokenizers[kind]
    messages = [
        USER,
        {"role": "assistant", "content": "今天晴"},
        {"role": "user", "content": "明天"},
        {"role": "assistant", "content": "明天雨"},
    ]
    encoding = encode_chat(tokenizer, messages)
    learned = tokenizer.decode([i for i, t in zip(encoding.ids, encoding.target) if t])
    end = "<|eot_id|>" if kind == "llama" else tokenizer.eos_token
    assert learned.replace(" ", "") == f"今天晴{end}明天雨{end}"
    whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert encoding.ids == whole
    half = [messages[0], {**messages[1], "weight": 0}, *messages[2:]]
    encoding = encode_chat_batch(tokenizer, [half])[0]
    learned = tokenizer.decode([i for i, t in zip(encoding.ids, encoding.target) if t])
    assert learned.replace(" ", "") == f"明天雨{end}"


def test_训练时的前缀就是生成提示_公共布局(tokenizers):
    tokenizer = tokenizers["minimind3"]
    for thinking, reasoning in ((None, None), (False, ""), (True, "想一想")):
        prompt = encode_chat(tokenizer, [USER], None, True, thinking).ids
        full = encode_chat(
            tokenizer, [USER, {"role": "assistant", "content": "晴", "reasoning_content": reasoning}]
        )
        # 提示末尾的空行与正文连起来分词，可能合成别的词，所以比文字
        assert tokenizer.decode(full.ids).startswith(tokenizer.decode(prompt))
        learned = tokenizer.decode([i for i, t in zip(full.ids, full.target) if t])
        assert learned == ("<think>\n想一想\n</think>\n\n晴<|im_end|>" if thinking else "晴<|im_end|>")


@pytest.mark.parametrize("kind", [*FOREIGN, "minimind3"])
def test_接着写_提示停在助手的最后一个字(tokenizers, kind):
    tokenizer = tokenizers[kind]
    ids, written = encode_unfinished(tokenizer, [USER, {"role": "assistant", "content": "今天晴"}])
    assert tokenizer.decode(ids).endswith("今天晴")
    assert "今天晴" in tokenizer.decode(ids[len(ids) - written :]) and written < len(ids)


REFUSED = [
    ("mistral", [{"role": "system", "content": "规矩"}, USER], None, None, "must alternate"),
    ("mistral", [USER, USER], None, None, "must alternate"),
    ("llama", [USER], [TOOL], None, "没有放工具的地方"),
    ("llama", [USER], None, True, "没有思考开关"),
    ("qwen", [{"role": "robot", "content": "x"}], None, None, "robot"),
]


@pytest.mark.parametrize(("kind", "messages", "tools", "thinking", "words"), REFUSED)
def test_模板不接受的_一句说清(tokenizers, kind, messages, tools, thinking, words):
    with pytest.raises(UserError, match=words):
        encode_chat(tokenizers[kind], messages, tools, True, thinking)


def test_别种写法的工具调用读不回来_不给用(tmp_path):
    pythonic = LLAMA.replace(
        "m['content'] | trim", "m['content'] ~ (m.tool_calls | string if m.tool_calls else '')"
    )
    write_tokenizer(
        tmp_path, "llama", pythonic.replace("{{- bos_token }}", "{{- bos_token ~ (tools | string) }}")
    )
    with pytest.raises(UserError, match="<tool_call>"):
        encode_chat(load_tokenizer(tmp_path), [USER], [TOOL], True)


def test_没有思考开关的_关着思考本来就成立(tokenizers):
    ids = encode_chat(tokenizers["llama"], [USER], None, True, False).ids
    assert ids == theirs(tokenizers["llama"], [USER])
