"""别家的写法：意思清楚的改写并计数，矛盾的报错指到字段，不认识的字段说出来；没有一样内容悄悄不见。"""

from __future__ import annotations

import json

import pytest
from data_helpers import chat

from minimind.dataset import DPODataset, RLAIFDataset, SFTDataset, build_cache
from minimind.dataset.check import main_check
from minimind.dataset.jsonl import DataError
from minimind.dataset.schema import read_record
from minimind.tokenizer import encode_chat, render_text

USER = {"role": "user", "content": "问"}
ANSWER = {"role": "assistant", "content": "答"}
CALL = {"name": "f", "arguments": {"a": 1}}
CALL_TEXT = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def read(record, kind="sft"):
    """``(改写后的记录, 说过的话)``。"""
    said = set()
    return read_record(json.dumps(record, ensure_ascii=False).encode(), kind, said.add), said


def sft(*turns, **fields):
    return {**fields, "conversations": list(turns)}


def learned(tokenizer, conversation):
    """``(全文, 要学的部分)``。"""
    encoding = encode_chat(tokenizer, conversation)
    target = [i for i, t in zip(encoding.ids, encoding.target) if t]
    return tokenizer.decode(encoding.ids), tokenizer.decode(target)


def reply(tokenizer, *turns, **fields):
    """助手开头之后的全文与要学的部分。"""
    whole, target = learned(tokenizer, read(sft(USER, *turns, **fields))[0]["conversations"])
    return whole.split("<|im_start|>assistant\n", 1)[1], target


THINK_OFF = {**ANSWER, "reasoning_content": ""}
WITH_CALL = {"role": "assistant", "content": "", "tool_calls": [CALL]}
# (别家的记录, 同样意思的标准写法)
SAME = [
    (sft(USER, {**ANSWER, "content": "<think></think>答"}), sft(USER, THINK_OFF)),
    (sft(USER, {**ANSWER, "content": "<think>\n\n</think>\n\n答"}), sft(USER, THINK_OFF)),
    (sft(USER, {**ANSWER, "content": "\n<think> \n</think>\n答"}), sft(USER, THINK_OFF)),
    (sft(USER, {**ANSWER, "reasoning": ""}), sft(USER, THINK_OFF)),
    (sft(USER, {**ANSWER, "reasoning": "想"}), sft(USER, {**ANSWER, "reasoning_content": "想"})),
    (sft(USER, {**ANSWER, "thinking": "想"}), sft(USER, {**ANSWER, "reasoning_content": "想"})),
    (
        sft(USER, {**ANSWER, "thinking": "想", "reasoning": "想"}),
        sft(USER, {**ANSWER, "reasoning_content": "想"}),
    ),
    (sft(USER, ANSWER, reasoning="想"), sft(USER, {**ANSWER, "reasoning_content": "想"})),
    (sft(USER, {**ANSWER, "content": "", "function_call": CALL}), sft(USER, WITH_CALL)),
    (sft(USER, {**ANSWER, "content": None, "function_call": json.dumps(CALL)}), sft(USER, WITH_CALL)),
    (sft(USER, {"role": "assistant", "function_call": CALL}), sft(USER, WITH_CALL)),
    (
        sft(USER, {**ANSWER, "function_call": {"name": "f", "arguments": '{"a":1}'}}),
        sft(USER, {**ANSWER, "tool_calls": [CALL]}),
    ),
    (sft(USER, {**WITH_CALL, "function_call": CALL}), sft(USER, WITH_CALL)),
    (
        sft(USER, {**WITH_CALL}, {"role": "function", "name": "f", "content": "1"}, ANSWER),
        sft(USER, WITH_CALL, {"role": "tool", "content": "1"}, ANSWER),
    ),
    (sft(USER, {**WITH_CALL, "content": CALL_TEXT}), sft(USER, WITH_CALL)),
    (
        sft(USER, {**WITH_CALL, "content": "看看\n" + CALL_TEXT, "tool_calls": json.dumps([CALL])}),
        sft(USER, {**WITH_CALL, "content": "看看"}),
    ),
    (
        sft(USER, {**WITH_CALL, "content": CALL_TEXT, "tool_calls": [{"function": CALL}, {"name": "g"}]}),
        sft(USER, {**WITH_CALL, "tool_calls": [CALL, {"name": "g"}]}),
    ),
    (sft(USER, ANSWER, tools=TOOLS), sft({"role": "system", "content": "", "tools": TOOLS}, USER, ANSWER)),
    (sft(USER, ANSWER, tools=json.dumps(TOOLS)), sft(USER, ANSWER, tools=TOOLS)),
    (sft(USER, ANSWER, tools="[]"), sft(USER, ANSWER)),
    (sft(USER, ANSWER, tools=" [] ", functions="[]"), sft(USER, ANSWER)),
    (sft(USER, ANSWER, functions=[{"name": "f"}]), sft(USER, ANSWER, tools=TOOLS)),
    (
        sft({"role": "system", "content": "系"}, USER, ANSWER, tools=TOOLS),
        sft({"role": "system", "content": "系", "tools": TOOLS}, USER, ANSWER),
    ),
    (
        sft({"role": "system", "content": "系", "tools": json.dumps(TOOLS)}, USER, ANSWER, tools=TOOLS),
        sft({"role": "system", "content": "系", "tools": TOOLS}, USER, ANSWER),
    ),
    (sft(USER, ANSWER, system="系"), sft({"role": "system", "content": "系"}, USER, ANSWER)),
    (sft({"role": "developer", "content": "系"}, USER, ANSWER), sft(USER, ANSWER, system="系")),
    ({"messages": [USER, ANSWER], "tools": TOOLS}, sft(USER, ANSWER, tools=TOOLS)),
    (
        sft({"role": "user", "content": [{"type": "text", "text": "问"}]}, ANSWER),
        sft(USER, ANSWER),
    ),
    (sft(USER, {**ANSWER, "loss": False}), sft(USER, {**ANSWER, "weight": 0})),
    (sft(USER, {**ANSWER, "train": False}), sft(USER, {**ANSWER, "weight": 0})),
    (sft(USER, {**ANSWER, "weight": 1}), sft(USER, ANSWER)),
    (sft({**USER, "weight": 0}, {**ANSWER, "loss": True}), sft(USER, ANSWER)),
]


@pytest.mark.parametrize(("other", "standard"), SAME, ids=lambda v: json.dumps(v, ensure_ascii=False)[:60])
def test_别家的写法与标准写法逐token相同_掩码也相同(other, standard, tokenizer):
    got, want = (encode_chat(tokenizer, read(record)[0]["conversations"]) for record in (other, standard))
    assert got == want


def test_空的思考块不学_有内容的照学(tokenizer):
    assert reply(tokenizer, {**ANSWER, "content": "<think></think>二"}) == (
        "<think>\n\n</think>\n\n二<|im_end|>\n",
        "二<|im_end|>",
    )
    inline = "<think>\n先想\n</think>\n\n四"
    assert reply(tokenizer, {**ANSWER, "content": inline})[1] == inline + "<|im_end|>"
    assert reply(tokenizer, {**ANSWER, "reasoning": "r1"})[1] == "<think>\nr1\n</think>\n\n答<|im_end|>"


def test_函数调用与正文都留着_同一次调用只写一次(tokenizer):
    both = reply(tokenizer, {**ANSWER, "content": "看看", "function_call": CALL})
    assert both == (f"看看\n{CALL_TEXT}<|im_end|>\n", f"看看\n{CALL_TEXT}<|im_end|>")
    once = reply(tokenizer, {**WITH_CALL, "content": CALL_TEXT})
    assert once[0] == f"{CALL_TEXT}<|im_end|>\n"


@pytest.mark.parametrize("mark", [{"weight": 0}, {"loss": False}, {"train": 0}, {"weight": 0.0}])
def test_标着不学的回合只当上文(mark, tokenizer, write_jsonl):
    whole, target = reply(tokenizer, {**ANSWER, **mark})
    assert (whole, target) == ("答<|im_end|>\n", "")
    dataset = SFTDataset(
        write_jsonl([sft(USER, {**ANSWER, **mark}, USER, {**ANSWER, "content": "要学"})]), tokenizer, 64
    )
    labels = dataset[0]["labels"]
    assert tokenizer.decode(labels[labels != -100]) == "要学<|im_end|>"
    lone = SFTDataset(write_jsonl([sft(USER, {**ANSWER, **mark}), sft(USER, ANSWER)]), tokenizer, 64)
    assert lone.stats["dropped"] == 1 and "丢弃 1 条" in lone.lost()


BAD = [
    (sft(USER, {**ANSWER, "content": "<think>甲</think>六", "reasoning_content": "乙"}), "[1].reasoning_content"),
    (sft(USER, {**ANSWER, "content": "<think></think>六", "reasoning": "乙"}), "[1].reasoning_content"),
    (sft(USER, {**ANSWER, "content": "想完了</think>六", "thinking": "乙"}), "[1].reasoning_content"),
    (sft(USER, {**ANSWER, "content": "<think></think>"}), "[1].content"),
    (sft(USER, {**ANSWER, "reasoning": "甲", "reasoning_content": "乙"}), "[1].reasoning"),
    (sft(USER, {**ANSWER, "reasoning": ["甲"]}), "[1].reasoning_content"),
    (sft({**USER, "reasoning_content": "想"}, ANSWER), "[0].reasoning_content"),
    (sft({**USER, "tool_calls": [CALL]}, ANSWER), "[0].tool_calls"),
    (sft(USER, {**WITH_CALL, "content": '<tool_call>{"name": "g"}</tool_call>'}), "[1].tool_calls"),
    (sft(USER, {**WITH_CALL, "content": "<tool_call>{坏</tool_call>"}), "[1].tool_calls"),
    (sft(USER, {**WITH_CALL, "content": CALL_TEXT * 2}), "[1].tool_calls"),
    (sft(USER, {**WITH_CALL, "content": "<tool_call>没收尾"}), "[1].tool_calls"),
    (sft(USER, {**WITH_CALL, "function_call": {"name": "g"}}), "[1].function_call"),
    (sft(USER, {**ANSWER, "function_call": "{坏"}), "[1].function_call"),
    (sft(USER, {**ANSWER, "function_call": {"name": "f", "arguments": "{坏"}}), "[1].tool_calls[0].arguments"),
    (sft(USER, {**WITH_CALL, "tool_calls": [{"name": "f", "arguments": "a=1"}]}), "[1].tool_calls[0].arguments"),
    (sft(USER, {**WITH_CALL, "tool_calls": [{"name": "f", "arguments": [1]}]}), "[1].tool_calls[0].arguments"),
    (sft(USER, {**WITH_CALL, "tool_calls": [{"function": {"name": "f", "arguments": "3"}}]}), "[1].tool_calls[0].arguments"),
    (sft(USER, {**ANSWER, "function_call": {"arguments": {}}}), "[1].function_call"),
    (sft(USER, {**ANSWER, "weight": 0.5}), "[1].weight"),
    (sft(USER, {**ANSWER, "loss": "no"}), "[1].loss"),
    (sft(USER, {**ANSWER, "weight": 1, "loss": False}), "[1].weight"),
    (sft({**USER, "train": True}, ANSWER), "[0].train"),
    (sft({**USER, "images": ["a.png"]}, ANSWER), "[0].images"),
    (sft({"role": "system", "content": "甲", "tools": TOOLS}, {**USER, "tools": [{"name": "g"}]}, ANSWER), "[1].tools"),
]  # fmt: skip
BAD_TOP = [
    (sft({"role": "system", "content": "系"}, USER, ANSWER, system="另"), "system"),
    (sft({"role": "system", "content": "", "tools": TOOLS}, USER, ANSWER, tools=[{"name": "g"}]), "tools"),
    (sft(USER, ANSWER, tools=TOOLS, functions=[{"name": "g"}]), "functions"),
    (sft(USER, ANSWER, functions="{坏"), "functions"),
    (sft(USER, ANSWER, USER, ANSWER, reasoning="想"), "reasoning"),
    (sft(USER, ANSWER, weight=0), "weight"),
    (sft(USER, ANSWER, images=["a.png"]), "images"),
    (sft(USER, ANSWER, history=[["甲", "乙"]]), "history"),
    (sft(USER, ANSWER, messages=[USER]), "messages"),
]


@pytest.mark.parametrize(
    ("record", "field"), [(r, f"conversations{f}") for r, f in BAD] + BAD_TOP, ids=lambda v: str(v)[-50:]
)
def test_矛盾与不支持的写法指到字段(record, field, write_jsonl, tokenizer):
    path = write_jsonl([sft(USER, ANSWER), record])
    with pytest.raises(DataError) as caught:
        SFTDataset(path, tokenizer, 64)
    assert (caught.value.line, caught.value.field) == (2, field)
    assert str(caught.value).startswith(f"{path}:2 字段 {field}：") and caught.value.fix


def test_改名后工具一个也不丢(shared_dir, tokenizer, tmp_path):
    """同样的行、两种写法：把 messages 改名（或不改）与公共格式的逐 token 相同。"""
    rows = (shared_dir / "data/toolcall.jsonl").read_text("utf-8").splitlines()[:200]
    other = (shared_dir / "data/toolcall_minimind.jsonl").read_text("utf-8").splitlines()[:200]
    compared = 0
    for row, standard in zip(map(json.loads, rows), map(json.loads, other)):
        renamed = {"conversations": row["messages"], "tools": row["tools"]}
        added = standard["conversations"][0]["role"] == "system" != row["messages"][0]["role"]
        if added:  # 公共格式为了放 tools 补了一句系统提示
            renamed["system"] = row["system"] = standard["conversations"][0]["content"]
        want = render_text(standard["conversations"])
        assert render_text(read(renamed)[0]["conversations"]) == want
        assert render_text(read(row)[0]["conversations"]) == want
        compared += "# 工具" in want
    assert compared > 150


def test_没有用上的字段说出名字与条数(write_jsonl, tokenizer, capsys):
    rows = [
        sft({**USER, "id": 1, "name": "小满"}, {**ANSWER, "critique": "不好"}, source="网", plan="三步"),
        sft(USER, {**ANSWER, "critique": "也不好"}, plan=""),
        sft(USER, ANSWER),
    ]
    path = write_jsonl(rows)
    build_cache(path, "sft", tokenizer)
    said = capsys.readouterr().err
    assert "不认识的字段 conversations[].critique 没有用上 2 条" in said
    assert "不认识的字段 plan 没有用上 1 条" in said
    assert "source" not in said and "name" not in said
    build_cache(path, "sft", tokenizer)
    assert "critique" not in capsys.readouterr().err  # 一份缓存只说一遍


def test_检查命令列出每一种写法与条数(write_jsonl, capsys):
    rows = [
        *[sft(USER, {**ANSWER, "content": f"<think></think>{i}"}) for i in range(3)],
        sft(USER, ANSWER, tools=TOOLS),
        *[sft(USER, {**ANSWER, "weight": 7})] * 2,
        sft(USER, {**ANSWER, "content": "<think>甲</think>", "reasoning": "乙"}),
    ]
    assert main_check([str(write_jsonl(rows))]) == 1
    out = capsys.readouterr().out
    for words in (
        ["空的 <think></think> 当作 reasoning_content 为空", "3 条"],
        ["顶层 tools 归到 system 回合", "1 条"],
        ["2 条", "conversations[].weight"],
        ["1 条", "conversations[].reasoning_content"],
    ):
        assert any(all(word in line for word in words) for line in out.splitlines()), words


def test_偏好数据的顶层提问与工具(tokenizer, write_jsonl):
    good, bad = [{**ANSWER, "content": "好"}], [{**ANSWER, "content": "差"}]
    standard = {"chosen": [USER, *good], "rejected": [USER, *bad]}
    for record in (
        {"prompt": "问", "chosen": good, "rejected": bad},
        {"prompt": [USER], "chosen": good, "rejected": bad},
        {"prompt": "问", **standard},
        {"prompt": [USER], **standard, "score_chosen": 3},
    ):
        assert read(record, "dpo")[0] | {"score_chosen": 3} == standard | {"score_chosen": 3}
    with_tools = read({**standard, "tools": TOOLS}, "dpo")[0]
    assert with_tools["chosen"][0] == with_tools["rejected"][0] == {
        "role": "system", "content": "", "tools": TOOLS,
    }  # fmt: skip
    for record, field in (
        ({"prompt": "另问", **standard}, "prompt"),
        ({"chosen": [USER, *good], "rejected": [USER, {**bad[0], "weight": 0}]}, "rejected[1].weight"),
        ({"chosen": [USER, *good, USER, *good], "rejected": [USER, *good]}, "rejected[1]"),
    ):
        with pytest.raises(DataError) as caught:
            read(record, "dpo")
        assert caught.value.field == field


# ---- 强化学习的占位答案 ----


@pytest.mark.parametrize(
    "word", ["", " ", "空", "无", "无。", " 无\n", "None", "NULL", "N/A", "-", "暂无答案"]
)
def test_占位的词不是参考答案(word, tokenizer, write_jsonl):
    dataset = RLAIFDataset(
        write_jsonl([chat("问", word), chat("问二", "无人机"), chat("问三", "0")]), tokenizer, 64
    )
    assert [dataset[i]["reference"] for i in range(3)] == ["", "无人机", "0"]


def test_多数参考答案相同时开训前说出来(tokenizer, write_jsonl, capsys):
    same = [chat(f"第{i}问", "略") for i in range(8)] + [chat("一加一", "二"), chat("空着", "无")]
    warning = RLAIFDataset(write_jsonl(same), tokenizer, 64).reference_warning()
    assert "80.0% 的参考答案都是 '略'" in warning
    assert "10.0% 的提示没有参考答案" in warning
    varied = [chat(f"第{i}问", f"{i}") for i in range(10)]
    path = write_jsonl(varied, "varied.jsonl")
    assert RLAIFDataset(path, tokenizer, 64).reference_warning() == ""
    assert main_check([str(write_jsonl(same)), "--kind", "rl"]) == 0
    out = capsys.readouterr().out
    assert "没有参考答案（空的或占位的词）" in out and "1（10.0%）" in out and "80.0%" in out


# ---- 丢弃与截断 ----


def test_丢弃与截断都说出条数(write_jsonl, tokenizer):
    long = "很长的回答，" * 3000
    sft_data = SFTDataset(
        write_jsonl([chat("问", long), chat("问" * 100, "答"), chat("问", "答")]), tokenizer, 64
    )
    whole = len(encode_chat(tokenizer, chat("问", long)["conversations"]).ids)
    assert sft_data.lost() == (
        f"1 条截到 64 个 token（后面的 {whole - 64:,} 个不学），丢弃 1 条（没有目标，或截断后没有目标可学）"
    )
    pairs = [
        {"chosen": chat(q, a)["conversations"], "rejected": chat(q, b)["conversations"]}
        for q, a, b in (
            ("问", "好", "差"),
            ("问" * 99, "好", "差"),
            ("问二", "好" + long, "差"),
            ("问" * 98, "一", "二"),
        )
    ]
    dpo = DPODataset(write_jsonl(pairs, "dpo.jsonl"), tokenizer, 64)
    assert dpo.lost().startswith("1 对截到 64 个 token") and "丢弃 2 对" in dpo.lost()
    rl = RLAIFDataset(write_jsonl([chat("问" * 99, "答"), chat("短", "答")], "rl.jsonl"), tokenizer, 64)
    assert rl.lost() == "丢弃 1 个超过 64 个 token 的提示"
    assert SFTDataset(write_jsonl([chat("问", "答")], "short.jsonl"), tokenizer, 64).lost() == ""
