"""格式规则：每一种坏记录都要指到字段、说清该怎么修；公共数据的写法都要收。"""

from __future__ import annotations

import pytest

from minimind.dataset.jsonl import DataError
from minimind.dataset.schema import VALIDATORS, detect_kind, read_record
from minimind.errors import UserError

USER = {"role": "user", "content": "问"}
ANSWER = {"role": "assistant", "content": "答"}
CALL = {"role": "assistant", "content": "", "tool_calls": '[{"name": "f", "arguments": {}}]'}
TOOL = {"role": "tool", "content": "1"}


def sft(*turns):
    return {"conversations": list(turns)}


BAD = [
    # 种类, 记录, 字段路径, 修法里要出现的话
    ("pretrain", {}, "text", "text"),
    ("pretrain", {"Text": "x"}, "text", "把 Text 改名为 text"),
    ("pretrain", {"text": 3}, "text", "字符串"),
    ("pretrain", {"text": " \n"}, "text", "skip"),
    ("pretrain", sft(USER, ANSWER), "text", "sft"),
    ("sft", {"text": "x"}, "conversations", "pretrain"),
    ("sft", {"messages": [USER, ANSWER]}, "conversations", "messages"),
    ("sft", {"conversations": []}, "conversations", "role"),
    ("sft", {"conversations": "x"}, "conversations", "role"),
    ("sft", sft("x"), "conversations[0]", "对象"),
    ("sft", sft(USER, {"content": "x"}), "conversations[1].role", "role"),
    ("sft", sft({"from": "human", "value": "x"}), "conversations[0].role", "human→user"),
    ("sft", sft({"role": "human", "content": "x"}), "conversations[0].role", "改成 user"),
    ("sft", sft(USER, {"role": "assistnat", "content": "x"}), "conversations[1].role", "改成 assistant"),
    ("sft", sft(USER, {"role": "assistant"}), "conversations[1].content", "补上"),
    ("sft", sft(USER, {"role": "assistant", "content": None}), "conversations[1].content", "字符串"),
    ("sft", sft({"role": "user", "content": ["x"]}, ANSWER), "conversations[0].content", "非文本"),
    ("sft", sft({"role": "user", "content": " "}, ANSWER), "conversations[0].content", "补上内容"),
    ("sft", sft(USER, {"role": "assistant", "content": ""}), "conversations[1].content", "补上内容"),
    ("sft", sft({"role": "system", "content": ""}, USER, ANSWER), "conversations[0].content", "补上内容"),
    ("sft", sft(USER), "conversations", "补上回答"),
    ("sft", sft(ANSWER, USER), "conversations[0].role", "提问"),
    ("sft", sft(USER, USER, ANSWER), "conversations[1].role", "合并"),
    ("sft", sft(USER, ANSWER, ANSWER), "conversations[2].role", "合并"),
    ("sft", sft(USER, ANSWER, {"role": "system", "content": "x"}), "conversations[2].role", "开头"),
    ("sft", sft(USER, ANSWER, TOOL), "conversations[2].role", "tool_calls"),
    ("sft", sft(TOOL, ANSWER), "conversations[0].role", "tool_calls"),
    ("sft", sft(USER, CALL, TOOL, USER), "conversations[3].role", "次序"),
    ("sft", sft(USER, {**CALL, "tool_calls": "[{"}, TOOL), "conversations[1].tool_calls", "json.dumps"),
    ("sft", sft(USER, {**CALL, "tool_calls": "[]"}), "conversations[1].content", "补上内容"),
    ("sft", sft(USER, {**CALL, "tool_calls": [{"x": 1}]}), "conversations[1].tool_calls[0]", "工具名"),
    (
        "sft",
        sft({"role": "system", "content": "", "tools": "3"}, USER, ANSWER),
        "conversations[0].tools",
        "[{",
    ),
    ("sft", sft(USER, {**ANSWER, "reasoning_content": 1}), "conversations[1].reasoning_content", "字符串"),
    ("dpo", {"chosen": [USER, ANSWER]}, "rejected", "rejected"),
    ("dpo", {"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, "rejected", "偏好"),
    ("dpo", {"chosen": [USER], "rejected": [USER, ANSWER]}, "chosen[0].role", "补上回答"),
    (
        "dpo",
        {"chosen": [USER, ANSWER], "rejected": [{"role": "user", "content": "另问"}, ANSWER]},
        "rejected[0]",
        "同一份提问",
    ),
    ("rl", sft({"role": "system", "content": "x"}), "conversations", "提问"),
    ("rl", sft(USER, {"role": "assistant", "content": ""}, USER), "conversations[1].content", "补上内容"),
]


@pytest.mark.parametrize(("kind", "record", "field", "fix"), BAD, ids=lambda v: str(v)[:50])
def test_坏记录指到字段并说清怎么修(kind, record, field, fix):
    with pytest.raises(DataError) as caught:
        VALIDATORS[kind](record)
    error = caught.value.at("a.jsonl", 17)
    assert error.field == field
    assert fix in error.fix
    assert str(error).startswith(f"a.jsonl:17 字段 {field}：")
    assert "期望：" in str(error)


GOOD = [
    ("pretrain", {"text": "文", "source": 1}),
    ("sft", sft(USER, ANSWER)),
    ("sft", sft({"role": "system", "content": "", "tools": '[{"name": "f"}]'}, USER, CALL, TOOL, ANSWER)),
    ("sft", sft(USER, {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]})),
    ("sft", sft(USER, CALL, TOOL, TOOL, ANSWER, USER)),
    ("sft", sft(USER, {"role": "assistant", "content": "<tool_call>{}</tool_call>"}, TOOL, ANSWER)),
    ("sft", sft(USER, {**ANSWER, "reasoning_content": "想"})),
    ("sft", sft(USER, {**ANSWER, "reasoning_content": None, "tool_calls": ""})),
    ("dpo", {"chosen": [USER, ANSWER], "rejected": [USER, {"role": "assistant", "content": "差"}]}),
    ("rl", sft(USER)),
    ("rl", sft(USER, {"role": "assistant", "content": ""})),
    ("rl", sft({"role": "system", "content": "x"}, USER, {"role": "assistant", "content": "空"})),
    ("rl", sft(USER, CALL, TOOL)),
]


@pytest.mark.parametrize(("kind", "record"), GOOD, ids=lambda v: str(v)[:50])
def test_公共数据的写法都收(kind, record):
    VALIDATORS[kind](record)


def test_参考数据逐行通过校验(shared_dir):
    # toolcall_minimind 里有两行工具结果没有对应的调用，是真的坏数据
    expected_bad = {"toolcall_minimind.jsonl": [296, 1501]}
    for kind, names in {
        "pretrain": ["pretrain_en.jsonl"],
        "sft": ["lora_identity.jsonl", "reason_sft.jsonl", "toolcall_minimind.jsonl", "lora_medical.jsonl"],
        "dpo": ["dpo.jsonl"],
    }.items():
        for name in names:
            bad, lines = [], (shared_dir / "data" / name).read_bytes().splitlines()
            for number, raw in enumerate(lines, 1):
                try:
                    read_record(raw, kind)
                except DataError:
                    bad.append(number)
            assert len(lines) > 50
            assert bad == expected_bad.get(name, []), name


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        ({"text": "x"}, "pretrain"),
        (sft(USER, ANSWER), "sft"),
        (sft(USER, {"role": "assistant", "content": "空"}), "rl"),
        (sft(USER), "rl"),
        (sft(USER, CALL), "sft"),
        ({"chosen": [USER, ANSWER], "rejected": [USER]}, "dpo"),
    ],
    ids=str,
)
def test_猜出数据种类(write_jsonl, record, kind):
    assert detect_kind(write_jsonl(["", "坏行", record])) == kind


def test_猜不出种类时请使用者指明(write_jsonl):
    with pytest.raises(UserError, match="--kind"):
        detect_kind(write_jsonl([{"question": "x"}]))
