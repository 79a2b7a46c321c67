"""工具调用的正确率：逐级判分、两种格式、不该调用的地方也看。"""

import json

import pytest
from call_helpers import read_call
from eval_helpers import saved_pair_argv

from minimind.dataset.jsonl import DataError
from minimind.evaluate import tools_accuracy
from minimind.evaluate.generation import Written
from minimind.evaluate.tools_accuracy import LEVELS, canonical, judge, read_cases, summarize, to_cases
from minimind.tokenizer import encode_chat, load_tokenizer

TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
ONE = [{"name": "f", "arguments": {"x": 1}}]


def call(name="f", **arguments):
    return read_call(json.dumps({"name": name, "arguments": arguments}))


@pytest.mark.parametrize(
    ("calls", "reached"),
    [
        ([], 0),
        ([read_call("坏")], 1),
        ([call(), read_call("坏")], 1),
        ([call("g", x=1)], 2),
        ([call(x=1), call(x=1)], 2),
        ([call(x=2)], 3),
        ([call(x=True)], 3),
        ([call(x="1")], 3),
        ([call(x=1)], 4),
        ([call(x=1.0)], 4),
    ],
)
def test_逐级判分(calls, reached):
    assert list(judge(calls, ONE).values()) == [level < reached for level in range(len(LEVELS))]


def test_并行的调用不分先后_重复的要够数():
    expected = [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {}}]
    assert judge([call("g"), call(x=1)], expected)["exact"]
    assert not judge([call(x=1), call(x=1)], expected)["name"]


def test_参数按值比():
    assert canonical({"a": [1, {"b": None}], "c": "x"}) == canonical({"c": "x", "a": [1.0, {"b": None}]})
    assert canonical([1, 2]) != canonical([2, 1])
    assert canonical({"a": None}) != canonical({}) and canonical(0) != canonical(False)


def minimind_record():
    return {
        "conversations": [
            {"role": "system", "content": "会用工具。", "tools": json.dumps([TOOL])},
            {"role": "user", "content": "查一下"},
            {"role": "assistant", "content": "", "tool_calls": json.dumps(ONE)},
            {"role": "tool", "content": "{}"},
            {"role": "assistant", "content": "好了。"},
        ]
    }


def test_两种格式得到同样的考点():
    record = minimind_record()
    openai = {
        "messages": [
            {"role": "user", "content": "查一下"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
                ],
            },
        ],
        "tools": [TOOL],
    }
    first, second = to_cases(record)
    assert first.calls == ONE and first.tools == [TOOL] and len(first.messages) == 2
    assert second.calls == [] and len(second.messages) == 4
    (same,) = to_cases(openai)
    assert same.calls == ONE and same.tools == [TOOL]
    assert (
        to_cases(
            {"conversations": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]}
        )
        == []
    )


def test_坏行指出位置(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(minimind_record()) + "\n" + '{"text": "x"}\n', "utf-8")
    with pytest.raises(DataError, match=r"t.jsonl:2.*没有对话"):
        read_cases(path)


def test_标准答案本身得满分_沉默得零分():
    tokenizer = load_tokenizer()
    cases = to_cases(minimind_record())
    start = len(encode_chat(tokenizer, [], add_generation_prompt=True).ids)
    perfect = []
    for case in cases:
        message = {"role": "assistant", "content": "" if case.calls else "好了。", "tool_calls": case.calls}
        ids = encode_chat(tokenizer, [message]).ids[start:]
        perfect.append(Written(ids[: ids.index(tokenizer.eos_token_id)], "", True))
    result = summarize(cases, perfect, tokenizer)
    assert all(entry["accuracy"] == 1 for entry in result["methods"].values())
    assert (result["should_call"], result["should_not"]) == (1, 1)
    silent = summarize(cases, [Written([], "", True)] * 2, tokenizer)["methods"]
    assert silent["called"]["accuracy"] == 0 and silent["restraint"]["accuracy"] == 1
    wrong = summarize(cases, perfect[::-1], tokenizer)["methods"]
    assert wrong["restraint"]["accuracy"] == 0 and wrong["exact"]["accuracy"] == 0


def test_真实数据读得懂_两种格式的考点相同(shared_dir):
    openai = read_cases(shared_dir / "data" / "heldout" / "toolcall.heldout.jsonl")
    ours = read_cases(shared_dir / "data" / "heldout" / "toolcall_minimind.heldout.jsonl")
    assert [case.calls for case in openai] == [case.calls for case in ours]
    assert sum(bool(case.calls) for case in openai) > 250 and len(openai) > 320


def test_命令行_太长的提示不考(tmp_path, capsys):
    long = minimind_record()
    long["conversations"][1]["content"] = "长" * 600
    data = tmp_path / "t.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in (minimind_record(), long)), "utf-8")
    argv = saved_pair_argv(tmp_path, data)
    assert tools_accuracy.main([*argv, "--max_new_tokens", "4", "--save_items"]) == 0
    said = capsys.readouterr()
    assert "2 处的提示超过" in said.err and "工具选对了" in said.out
    result = json.loads((tmp_path / "full_sft_32_tools.json").read_text("utf-8"))
    assert result["questions"] == 2 and len(result["items"]) == 2
