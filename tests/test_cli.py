"""命令行总入口：快、认得别名、写错了给建议、退出码正确。"""

import importlib
import subprocess
import sys

import pytest

from minimind import cli
from minimind.errors import UserError


def test_帮助不导入重的库():
    code = (
        "import sys; from minimind.cli import main; main(['--help']);"
        "heavy = {'torch', 'transformers', 'matplotlib', 'numpy', 'rich'} & set(sys.modules);"
        "sys.exit(f'导入了 {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in cli.COMMANDS:
        assert name in done.stdout


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_命令表指向存在的函数(name):
    module, function = cli.COMMANDS[name].target.split(":")
    assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["pretrain", "--epochs", "1"], ("pretrain", ["--epochs", "1"])),
        (["full_sft"], ("sft", [])),
        (["data", "check", "a.jsonl"], ("data check", ["a.jsonl"])),
        (["tokenizer", "eval", "--help"], ("tokenizer eval", ["--help"])),
        (["eval", "choice", "--limit", "9"], ("eval choice", ["--limit", "9"])),
    ],
)
def test_认出命令与其余参数(argv, expected):
    assert cli.find_command(argv) == expected


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["pretrian"], "minimind pretrain"),
        (["tokeniser", "train"], "minimind tokenizer train"),
        (["data"], "data check、data download"),
        (["data", "chek"], "data check"),
        (["eval"], "eval choice、eval gsm"),
        (["eval", "--weight", "full_sft"], "要对话用 minimind chat"),
        (["zzzz"], "minimind --help"),
    ],
)
def test_写错的命令给出建议(argv, hint):
    with pytest.raises(UserError, match=hint):
        cli.find_command(argv)


def test_未知命令退出码为二且只有一行(capsys):
    assert cli.main(["pretrian"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_使用者的错误与退出码穿过命令表(monkeypatch, capsys):
    fake = type(sys)("fake_command")
    fake.main = lambda argv: (_ for _ in ()).throw(UserError("坏了", fix="修"))
    fake.exit_143 = lambda argv: sys.exit(143)
    monkeypatch.setitem(sys.modules, "fake_command", fake)
    monkeypatch.setitem(cli.COMMANDS, "fake", cli.Command("fake_command:main", "", ""))
    monkeypatch.setitem(cli.COMMANDS, "term", cli.Command("fake_command:exit_143", "", ""))
    monkeypatch.setattr(sys, "argv", ["minimind"])
    assert cli.main(["fake"]) == 2
    assert "坏了；修复办法：修" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        cli.main(["term"])
    assert stopped.value.code == 143
