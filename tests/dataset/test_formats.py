"""Alpaca、ShareGPT 与偏好的各种写法：改写后与标准写法逐 token 相同，报错说使用者文件里的字段。"""

from __future__ import annotations

import json

import pytest
from data_helpers import chat

from minimind.dataset import DPODataset, KTODataset, SFTDataset
from minimind.dataset.formats import ALPACA, PREFERENCE, SHAREGPT
from minimind.dataset.jsonl import DataError
from minimind.dataset.schema import detect_kind, read_record
from minimind.tokenizer import render_text


def read(record: dict, kind: str = "sft") -> tuple[dict, set[str]]:
    said: set[str] = set()
    return read_record(json.dumps(record, ensure_ascii=False).encode(), kind, said.add), said


def share(*turns: tuple[str, str], **extra) -> dict:
    return {"conversations": [{"from": who, "value": said} for who, said in turns], **extra}


CALL = {"name": "查天气", "arguments": {"城市": "杭州"}}


@pytest.mark.parametrize(
    ("record", "standard", "sentence"),
    [
        ({"instruction": "问", "output": "答"}, chat("问", "答"), ALPACA),
        ({"instruction": "问", "input": "", "output": "答"}, chat("问", "答"), ALPACA),
        ({"instruction": "翻译", "input": "hello", "output": "你好"}, chat("翻译\nhello", "你好"), ALPACA),
        ({"instruction": "", "input": "只有输入", "output": "答"}, chat("只有输入", "答"), ALPACA),
        (
            {"instruction": "三", "output": "四", "history": [["一", "二"]], "system": "设定"},
            chat("一", "二", "三", "四", system="设定"),
            ALPACA,
        ),
        (share(("human", "问"), ("gpt", "答")), chat("问", "答"), SHAREGPT),
        (
            share(("system", "设定"), ("user", "问"), ("chatgpt", "答")),
            chat("问", "答", system="设定"),
            SHAREGPT,
        ),
        (share(("human", "问"), ("gpt", "答"), system="设定"), chat("问", "答", system="设定"), SHAREGPT),
        (
            {"messages": [{"role": "user", "value": "问"}, {"from": "gpt", "content": "答"}]},
            chat("问", "答"),
            SHAREGPT,
        ),
        (
            share(
                ("human", "天气"),
                ("function_call", json.dumps(CALL)),
                ("observation", "晴"),
                ("gpt", "是晴天"),
            ),
            {
                "conversations": [
                    {"role": "user", "content": "天气"},
                    {"role": "assistant", "content": "", "tool_calls": [CALL]},
                    {"role": "tool", "content": "晴"},
                    {"role": "assistant", "content": "是晴天"},
                ]
            },
            SHAREGPT,
        ),
    ],
)
def test_改写之后与标准写法渲染出同样的文字(record, standard, sentence):
    fixed, said = read(record)
    assert sentence in said
    assert render_text(fixed["conversations"]) == render_text(standard["conversations"])


PROMPT = [{"role": "user", "content": "问"}]


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "问", "input": "", "chosen": "好", "rejected": "坏"},
        {"prompt": "问", "chosen": "好", "rejected": "坏"},
        {"prompt": PROMPT, "chosen": "好", "rejected": "坏"},
        {
            "conversations": [{"from": "human", "value": "问"}],
            "chosen": {"from": "gpt", "value": "好"},
            "rejected": {"from": "gpt", "value": "坏"},
        },
    ],
)
def test_只写回答的偏好补上提问(record):
    fixed, said = read(record, "dpo")
    assert PREFERENCE in said
    for name, answer in (("chosen", "好"), ("rejected", "坏")):
        assert fixed[name] == [*PROMPT, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize(
    ("record", "kind", "field"),
    [
        ({"instruction": "问", "input": ""}, "sft", "output"),
        ({"instruction": "问", "output": ""}, "sft", "output"),
        ({"instruction": "问", "output": ["答"]}, "sft", "output"),
        ({"instruction": 3, "output": "答"}, "sft", "instruction"),
        ({"instruction": " ", "input": " ", "output": "答"}, "sft", "instruction"),
        ({"instruction": "问", "input": 5, "output": "答"}, "sft", "input"),
        ({"instruction": "问", "output": "答", "history": [["一"]]}, "sft", "history[0]"),
        (share(("human", "问"), ("路人", "答")), "sft", "conversations[1].from"),
        (share(("human", "问"), ("gpt", "")), "sft", "conversations[1].value"),
        (share(("gpt", "答"), ("human", "问")), "sft", "conversations[0].from"),
        (
            {"conversations": [{"from": "human"}, {"from": "gpt", "value": "答"}]},
            "sft",
            "conversations[0].value",
        ),
        ({"conversations": [{"value": "问"}]}, "sft", "conversations[0].from"),
        (share(("human", "问"), ("function_call", "不是 JSON")), "sft", "conversations[1].value"),
        (
            {"conversations": [{"from": "human", "role": "system", "value": "问"}]},
            "sft",
            "conversations[0].from",
        ),
        ({"prompt": "问", "instruction": "另一问", "chosen": "好", "rejected": "坏"}, "dpo", "prompt"),
    ],
)
def test_报错的字段是使用者文件里的名字(record, kind, field):
    with pytest.raises(DataError) as caught:
        read(record, kind)
    assert caught.value.field == field and caught.value.fix


def test_强化学习也认得_回答可以空着():
    fixed, _ = read({"instruction": "问", "output": ""}, "rl")
    assert fixed["conversations"][-1] == {"role": "assistant", "content": ""}


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        ({"instruction": "问", "input": "", "output": "答", "text": "全文"}, "sft"),
        ({"instruction": "问", "output": ""}, "rl"),
        (share(("human", "问"), ("gpt", "答")), "sft"),
        (share(("human", "问"), ("gpt", "空")), "rl"),
        (share(("human", "问")), "rl"),
        ({"instruction": "问", "chosen": "好", "rejected": "坏"}, "dpo"),
    ],
)
def test_猜得出种类(record, kind, write_jsonl):
    assert detect_kind(write_jsonl([record])) == kind


def test_训练开头说出哪个文件认出了什么_多少条(write_jsonl, tokenizer, capsys):
    alpaca = write_jsonl([{"instruction": f"问{i}", "output": "答"} for i in range(30)], "甲.jsonl")
    shared = write_jsonl([share(("human", f"问{i}"), ("gpt", "答")) for i in range(20)], "乙.jsonl")
    SFTDataset(f"{alpaca},{shared}", tokenizer, 64)
    said = capsys.readouterr().err.splitlines()
    assert f"甲.jsonl：{ALPACA} 30 条。" in said and f"乙.jsonl：{SHAREGPT} 20 条。" in said


def test_偏好数据训练得了(write_jsonl, tokenizer):
    records = [{"prompt": f"问{i}", "chosen": "好的回答", "rejected": "坏的"} for i in range(5)]
    standard = [
        {
            name: chat(f"问{i}", answer)["conversations"]
            for name, answer in (("chosen", "好的回答"), ("rejected", "坏的"))
        }
        for i in range(5)
    ]
    ours, theirs = (
        DPODataset(write_jsonl(r, n), tokenizer, 64) for r, n in ((records, "a"), (standard, "b"))
    )
    for i in range(5):
        assert all((ours[i][key] == theirs[i][key]).all() for key in ours[i])


def test_ShareGPT与标准写法说的是同一个角色_不算矛盾():
    turns = [
        {"from": "human", "role": "user", "value": "问"},
        {"from": "gpt", "value": "答", "role": "assistant"},
    ]
    assert read({"conversations": turns})[0] == chat("问", "答")
    turns[0]["role"] = "assistant"
    with pytest.raises(DataError, match=r"conversations\[0\]\.from.*不同"):
        read({"conversations": turns})


@pytest.mark.parametrize(
    "rows",
    [
        [
            {"instruction": "问", "output": "答", "label": True},
            {"instruction": "问二", "output": "答", "label": False},
        ],
        [
            {"conversations": chat("问", "答")["conversations"], "label": 1},
            {"conversations": chat("问二", "答")["conversations"], "label": 0},
        ],
        [
            {"messages": chat("问", "答")["conversations"], "label": 1},
            {"prompt": "问二", "completion": "答", "label": 0},
        ],
    ],
)
def test_KTO认得标了好坏的各种写法(rows, write_jsonl, tokenizer):
    data = KTODataset(write_jsonl(rows), tokenizer, 64)
    assert not data.paired and [bool(data[i]["desirable"]) for i in range(2)] == [True, False]


def test_KTO的数据不对时_说的是KTO缺什么(write_jsonl, tokenizer):
    with pytest.raises(DataError, match="字段 conversations"):
        KTODataset(write_jsonl([{"foo": "x"}]), tokenizer, 64)
    with pytest.raises(DataError, match="--loss_type kto"):
        DPODataset(write_jsonl([{"prompt": "问", "completion": "答", "label": True}]), tokenizer, 64)


@pytest.mark.parametrize(("label", "words"), [(True, "3 条全是好的"), (False, "3 条全是坏的")])
def test_KTO只有一边时说一声(label, words, write_jsonl, tokenizer, capsys):
    rows = [{"prompt": f"问{i}", "completion": "答", "label": label} for i in range(3)]
    KTODataset(write_jsonl(rows), tokenizer, 64)
    assert words in capsys.readouterr().err
    KTODataset(write_jsonl([*rows, {**rows[0], "label": not label}]), tokenizer, 64)
    assert "全是" not in capsys.readouterr().err
