"""命令行总入口：快、认得别名、写错了给建议、退出码正确。"""

import importlib
import os
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
        (["pretain"], "minimind pretrain"),
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


def run_without_reader(code: str, closed: str, unbuffered: str) -> subprocess.CompletedProcess:
    """在子进程里运行一段代码，``closed``（stdout、stderr 或 both）接到一个读的那头已经关了的管道上。"""
    read, write = os.pipe()
    os.close(read)
    streams = {name: write if closed in (name, "both") else subprocess.PIPE for name in ("stdout", "stderr")}
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    try:
        return subprocess.run([sys.executable, "-c", code], text=True, env=environment, **streams)
    finally:
        os.close(write)


@pytest.mark.skipif(os.name == "nt", reason="Windows 的管道没有 SIGPIPE 这回事")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("argv", "closed", "codes"),
    [
        (["--help"], "stdout", {141}),
        (["--version"], "stdout", {141}),
        (["data", "make-microworld", "--help"], "stdout", {0, 141}),  # argparse 自己也会咽下这个错误
        (["nope"], "stdout", {2}),  # 要说的话在 stderr 上，没有人走
        (["nope"], "both", {141}),
        (["data", "make-microworld", "--seeed", "1"], "stderr", {141}),
    ],
)
def test_读的那头先走了_安静地退出(argv, closed, codes, unbuffered):
    code = f"import sys; from minimind.cli import main; sys.exit(main({argv!r}))"
    done = run_without_reader(code, closed, unbuffered)
    assert done.returncode in codes, done.stderr
    if closed == "stdout":
        assert done.stderr.count("\n") == (1 if codes == {2} else 0)
        assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="同上")
def test_别处断的管道不当成读者走了():
    code = (
        "from minimind.errors import guard\n@guard\ndef main(): raise BrokenPipeError('采样服务断了')\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "采样服务断了" in done.stderr


@pytest.mark.parametrize("script", ["scripts/convert_model.py", "scripts/serve_openai_api.py", "eval_llm.py"])
def test_公共项目的脚本问用法_是用法不是错误(root_dir, script):
    done = subprocess.run([sys.executable, root_dir / script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "用法" in done.stdout and not done.stderr
