"""带工具的强化学习：公开格式的文件训练两步再续、自己的工具、样例与体征、说不通的参数。"""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from recipe_cases import CASES, log_lines, saved

from minimind.dataset.check import main_check
from minimind.recipes.agent import AgentArguments, main
from minimind.recipes.health import AgentHealth
from minimind.rl.agent import transcript
from minimind.rl.conversations import ANSWERED, OUT_OF_LENGTH, OUT_OF_TURNS, Trajectory
from minimind.rl.policy import policy_loss

CASE = CASES["agent"]


def tool(name, **properties):
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": "说明", "parameters": parameters}}


def published(kind: str) -> list[dict]:
    """照公开的格式写的几行：agent_rl 是六样工具混着、也有没有工具的；agent_rl_math 只有算式。"""
    text = {"type": "string"}
    math = json.dumps([tool("calculate_math", expression=text)], ensure_ascii=False)
    many = json.dumps(
        [tool("get_current_weather", location=text), tool("calculate_math", expression=text)],
        ensure_ascii=False,
    )

    def row(system, question, gt):
        turns = [system, {"role": "user", "content": question}, {"role": "assistant", "content": ""}]
        return {"conversations": [turn for turn in turns if turn], "gt": gt}

    rows = [
        row({"role": "system", "content": "", "tools": math}, f"{a}加{a + 1}等于多少？", [str(2 * a + 1)])
        for a in range(6)
    ]
    if kind == "agent_rl":
        rows += [
            row(
                {"role": "system", "content": "你会用工具。", "tools": many},
                "北京天气，再算3*4",
                ["28", "12"],
            )
        ]
        rows += [row(None, "写一句话。", []), row({"role": "system", "content": "简短些。"}, "你是谁？", [])]
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def argv(world, path, **changes):
    options = {
        "max_steps": 2,
        "save_interval": 1,
        "eval_interval": 0,
        "log_interval": 1,
        "val_path": None,
        **changes,
    }
    return CASE.argv(world, data_path=path, **options)


@pytest.mark.parametrize("kind", ["agent_rl", "agent_rl_math"])
def test_公开格式的文件_查得过_训练两步_续训(home, world, kind, capsys):
    path = write(home / f"{kind}.jsonl", published(kind))
    assert main_check([str(path)]) == 0
    assert main(argv(world, path, val_ratio=0, reward="agent")) == 0
    assert saved(home, CASE)["step"] == 2
    assert main(argv(world, path, val_ratio=0, reward="agent", max_steps=3, from_resume=1)) == 0
    assert saved(home, CASE)["step"] == 3


def test_公开格式的文件_不写data_path也找得到(home, world, capsys):
    (home / "dataset").mkdir()
    write(home / "dataset" / "agent_rl.jsonl", published("agent_rl"))
    assert main(argv(world, None, val_ratio=0, reward="agent")) == 0
    shown = capsys.readouterr()
    assert "agent_rl.jsonl" in shown.err + shown.out and saved(home, CASE)["step"] == 2


def test_自己的工具_没列工具的题也用得上_换了文件续训说清(home, world, capsys):
    tools = home / "mine.py"
    tools.write_text('def dice(sides: int) -> int:\n    """掷骰子。"""\n    return sides\n', "utf-8")
    path = write(
        home / "rows.jsonl",
        [{"conversations": [{"role": "user", "content": f"掷{i}面"}], "gt": [str(i)]} for i in range(2, 9)],
    )
    options = {"val_ratio": 0, "tools": tools, "tool_timeout": 30, "debug_mode": 1, "debug_interval": 1}
    options["max_total_len"] = 700
    assert main(argv(world, path, **options, epochs=20)) == 0
    out = capsys.readouterr()
    assert "掷骰子" in out.out + out.err, "使用者的工具没有写进提示"
    tools.write_text('def dice(sides: int) -> int:\n    """掷骰子。"""\n    return sides + 1\n', "utf-8")
    assert main(argv(world, path, **options, epochs=20, from_resume=1, max_steps=2)) == 2
    assert "工具" in capsys.readouterr().err


@pytest.mark.parametrize("gt", [{"a": 1}, [None], [""], [True], [["12"]], "  "])
def test_gt里是找不了的值_开训之前就说_指出行号(home, world, capsys, gt):
    rows = published("agent_rl_math")
    rows[2]["gt"] = gt
    path = write(home / "a.jsonl", rows)
    assert main(argv(world, path, reward="agent:1,length:0.1")) == 2
    assert f"{path}:3 字段 gt" in capsys.readouterr().err
    # 自己的奖励函数怎么用 gt 由它定
    assert main(argv(world, path, max_steps=1)) == 0


def test_列着不会的工具_开训之前就说_指出行号(home, world, capsys):
    rows = published("agent_rl_math")
    bad = json.dumps([tool("fly", to={"type": "string"})])
    rows.append(
        {
            "conversations": [
                {"role": "system", "content": "", "tools": bad},
                {"role": "user", "content": "飞"},
            ],
            "gt": [],
        }
    )
    path = write(home / "rows.jsonl", rows)
    assert main(argv(world, path, val_ratio=0)) == 2
    error = capsys.readouterr().err
    assert "rows.jsonl:7" in error and "fly" in error and "--tools" in error
    assert not (home / "checkpoints").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_total_len": 200}, "--max_total_len 200"),
        ({"tools": "没有.py"}, "--tools 没有.py"),
        ({"thinking_ratio": 1.5}, "--thinking_ratio"),
        ({"max_turns": 0}, "--max_turns"),
        ({"num_generations": 1}, "--num_generations"),
        ({"loss_type": "cispo", "epsilon_high": 0.28}, "--epsilon_high"),
        ({"reasoning": 1, "thinking_ratio": 0.5}, "--thinking_ratio"),
        ({"tool_timeout": 3}, "--tool_timeout"),
    ],
)
def test_说不通的参数(home, world, capsys, changes, words):
    assert main(CASE.argv(world, **changes)) == 2
    assert words in capsys.readouterr().err


def test_日志里有体征_样例是整段对话(home, world, capsys):
    assert main(CASE.argv(world, sample_prompts="2", eval_interval=2, max_steps=2, log_interval=1)) == 0
    lines = log_lines(home, CASE)
    trained = [line for line in lines if "lr" in line]
    for line in trained:
        assert {"success", "calls", "unfinished", "turns", "reward"} <= set(line)
        assert 1 <= line["turns"] <= 2 and 0 <= line["unfinished"] <= 1
    assert any("val_success" in line for line in lines)
    shown = [line for line in lines if "rollouts" in line]
    assert shown and {one["kind"] for one in shown[0]["rollouts"]} == {"best", "median", "worst"}


def test_样例的题另给一个文件的_答那个文件的(home, world):
    (home / "ask.txt").write_text("一加一？\n你是谁？\n", "utf-8")
    assert main(CASE.argv(world, sample_prompts=home / "ask.txt", eval_interval=2, max_steps=2)) == 0
    (shown,) = [line["samples"] for line in log_lines(home, CASE) if "samples" in line]
    assert [one["prompt"] for one in shown] == ["一加一？", "你是谁？"]


def test_思考的比例_开着的提示以think结尾(home, world, monkeypatch):
    from minimind.rl import agent

    seen = []
    real = agent.encode_chat

    def spy(*args, enable_thinking=None):
        seen.append(enable_thinking)
        return real(*args, enable_thinking=enable_thinking)

    monkeypatch.setattr(agent, "encode_chat", spy)
    assert main(CASE.argv(world, thinking_ratio=0.5, max_steps=5, eval_interval=0, val_max_rows=1)) == 0
    seen = seen[1:]  # 第一个是训练前考的
    assert set(seen) == {True, None} and 4 <= seen.count(True) <= len(seen) - 4


def test_cispo用不到的epsilon_照收_说一声(capsys):
    """公共项目的命令带着它；写成默认值的、别的损失用得到的不说。"""
    for changes, told in (
        ({"epsilon": 0.1}, True),
        ({}, False),
        ({"epsilon": 0.1, "loss_type": "grpo"}, False),
    ):
        args = AgentArguments(**changes)
        policy_loss(args, args.loss_type)
        assert ("--epsilon 0.1 用不到" in capsys.readouterr().err) == told


def test_样例里没写完与什么也没答分得清():
    opening, empty = SimpleNamespace(), SimpleNamespace(text="", calls=[])
    told = {
        ending: transcript(Trajectory(opening, 0, 0, [], [], replies=[empty], ending=ending))
        for ending in (ANSWERED, OUT_OF_TURNS, OUT_OF_LENGTH)
    }
    assert told == {ANSWERED: "（什么也没答）", OUT_OF_TURNS: "（没写完）", OUT_OF_LENGTH: "（没写完）"}


def test_体征说成话():
    health = AgentHealth(48)
    assert any("微调" in s for s in health({"valid_calls": 0.2, "calls": 1}))
    assert any("--max_turns" in s for s in health({"unfinished": 0.8, "out_of_turns": 0.8}))
    assert any("错误" in s for s in health({"tool_errors": 0.9}))
    assert (
        health(
            {"valid_calls": 1.0, "unfinished": 0.1, "truncated": 0.1, "tool_errors": 0.0, "reward_std": 0.3}
        )
        == []
    )


def test_公共项目的默认名字():
    args = AgentArguments(num_generations=4)
    assert (args.save_weight, args.loss_type, args.max_total_len, args.max_turns) == (
        "agent",
        "cispo",
        2500,
        3,
    )
