"""minimind data check：数字对、坏行列出、退出码可用于脚本。"""

from __future__ import annotations

import pytest
from data_helpers import chat

from minimind.dataset.check import main_check
from minimind.errors import guard


def test_报告计数长度与例子(write_jsonl, capsys):
    records = [chat(f"第{i}问", f"第{i}答") for i in range(30)] + [chat("第0问", "第0答"), ""]
    assert main_check([str(write_jsonl(records)), "--max_seq_len", "64"]) == 0
    out = capsys.readouterr().out
    assert "（sft）" in out
    for row in (
        ["行数", "32"],
        ["可用记录", "31"],
        ["空行", "1"],
        ["坏行", "0"],
        ["完全重复的文档", "1（3.2%）"],
    ):
        assert any(all(part in line for part in row) for line in out.splitlines()), row
    for word in ("p50", "p90", "p99", "填充占比", "没有任何目标而丢弃", "user→assistant", "没有坏行"):
        assert word in out
    assert "⟦第0答<|im_end|>⟧" in out  # 要学的部分标了出来
    assert "⟦第0问" not in out


def test_有坏行时列出并返回非零(write_jsonl, capsys):
    path = write_jsonl([{"text": "好"}, "坏", {"text": ""}, {"text": "好"}])
    assert guard(main_check)([str(path)]) == 1
    out, err = capsys.readouterr()
    assert err.count("跳过了 2 条坏行") == 1
    assert "坏行 2 条" in out
    assert f"{path}:2" in out
    assert f"{path}:3 字段 text" in out


def test_全部过长时说不能训练而不是崩溃(write_jsonl, capsys):
    path = write_jsonl([chat("很长的问题" * 50, "答")] * 3)
    assert main_check([str(path), "--max_seq_len", "32"]) == 0
    assert "不能训练" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "record", "word"),
    [
        ("pretrain", {"text": "文[red]本"}, "一个 token 也不丢"),
        ("rl", chat("问", "答"), "可用的提示"),
        (
            "dpo",
            {"chosen": chat("问", "甲")["conversations"], "rejected": chat("问", "乙")["conversations"]},
            "可用的对",
        ),
    ],
)
def test_各种数据都能检查(write_jsonl, capsys, kind, record, word):
    assert main_check([str(write_jsonl([record] * 3)), "--kind", kind]) == 0
    out = capsys.readouterr().out
    assert word in out
    if kind == "pretrain":
        assert "文[red]本" in out  # 数据里的方括号不当成颜色标记


def test_文件不存在时一句话(tmp_path, capsys):
    assert guard(main_check)([str(tmp_path / "没有.jsonl")]) == 2
    assert "找不到数据文件" in capsys.readouterr().err
