"""命令行对话：尺寸自动认出、续写与对话分明、出错一句话。端到端的几条走子进程。"""

import io
import os
import subprocess
import sys

import pytest
import torch

from minimind import chat
from minimind.model import MiniMindConfig, MiniMindForCausalLM
from minimind.runtime.checkpoint import config_dict, save_weights, weights_path
from minimind.tokenizer import load_tokenizer, tokenizer_fingerprint


def make_weights(save_dir, weight="full_sft", sidecar=True, recipe=None, **sizes):
    """随机初始化的小权重；上下文只有 96，便于测太长的提示。"""
    torch.manual_seed(0)
    options = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 96,
    }
    model = MiniMindForCausalLM(MiniMindConfig(**options | sizes))
    path = weights_path(model.config, weight, save_dir)
    note = {"config": config_dict(model.config), "recipe": recipe or weight}
    note["tokenizer_hash"] = tokenizer_fingerprint(load_tokenizer())
    save_weights(model, path, note)
    if not sidecar:
        path.with_suffix(".json").unlink()
    return path


@pytest.fixture(scope="module")
def save_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    make_weights(folder)
    make_weights(folder, "pretrain")
    return str(folder)


@pytest.fixture
def ask(monkeypatch, capsys):
    """在本进程里跑一次，返回 (退出码, stdout, stderr)。"""

    def run(*argv: str, typed: str = ""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        code = chat.main([*argv, "--device", "cpu", "--seed", "1"])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_不给尺寸也能打开_并报告速度(ask, save_dir):
    code, out, err = ask("--save_dir", save_dir, "--max_new_tokens", "5", "--prompt", "你好")
    assert code == 0
    assert out.startswith("答：") and "tokens/s（5 个）" in out
    assert "full_sft_32.pth" in err


def test_公共项目的参数照旧(ask, save_dir):
    words = "--load_from model --weight full_sft --lora_weight None --hidden_size 32 --num_hidden_layers 2"
    words += " --use_moe 0 --inference_rope_scaling --max_new_tokens 3 --temperature 0.85 --top_p 0.85"
    words += " --historys 2 --open_thinking 1 --show_speed 0"
    code, out, _ = ask("--save_dir", save_dir, *words.split(), typed="1\n你好\n再见\n\n")
    assert code == 0
    assert out.count("答：<think>") == 2
    assert "tokens/s" not in out


def test_菜单_自动测试念完全部问题(ask, save_dir):
    _, out, _ = ask("--save_dir", save_dir, "--max_new_tokens", "2", typed="x\n0\n")
    assert "请输入 0 或 1" in out
    assert [f"你：{prompt}\n" in out for prompt in chat.CHAT_PROMPTS] == [True] * len(chat.CHAT_PROMPTS)


def test_预训练权重续写纯文本(ask, save_dir, monkeypatch):
    from minimind.inference import chat as sessions

    seen = []
    real = sessions.stream_tokens

    def spy(model, ids, **options):
        seen.append(list(ids))
        return real(model, ids, **options)

    monkeypatch.setattr(sessions, "stream_tokens", spy)
    tokenizer = load_tokenizer()
    common = ["--save_dir", save_dir, "--max_new_tokens", "2", "--prompt", "从前<|im_end|>"]
    _, out, _ = ask("--weight", "pretrain", *common)
    assert out.startswith("续：")
    ask("--weight", "full_sft", *common)
    plain, chatted = seen
    assert tokenizer.decode(plain) == "<|im_start|>从前<|im_end|>"
    # 用户打的控制 token 只是文字：真正的只有开头那一个
    assert plain.count(tokenizer.bos_token_id) == 1 and tokenizer.eos_token_id not in plain
    assert chatted.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(chatted).endswith("<|im_start|>assistant\n")


def test_历史按条数携带_放不下时丢最早的(save_dir):
    args = chat.ChatArguments(
        save_dir=save_dir, device="cpu", historys=3, max_new_tokens=4, temperature=0.0, dtype="float32"
    )
    session = chat.open_session(args)
    for prompt in ("甲", "乙", "丙"):
        list(session.reply(prompt))
    text = session.tokenizer.decode(session.encode("丁"))
    # 3 条凑成整轮是 4 条：乙、丙两轮
    assert [word in text for word in "甲乙丙丁"] == [False, True, True, True]
    text = session.tokenizer.decode(session.encode("戊" * 30))
    assert session.dropped >= 2 and "乙" not in text


def test_没有旁注的旧权重靠文件名与参数(ask, tmp_path):
    make_weights(tmp_path, sidecar=False, num_attention_heads=8, num_hidden_layers=8)
    code, _, err = ask("--save_dir", str(tmp_path), "--max_new_tokens", "2", "--prompt", "你好")
    assert code == 0, err


def test_有几个尺寸时用最新的并说明(ask, tmp_path):
    old = make_weights(tmp_path)
    make_weights(tmp_path, hidden_size=64)
    os.utime(old, (0, 0))
    common = ["--save_dir", str(tmp_path), "--max_new_tokens", "1", "--prompt", "你好"]
    _, _, err = ask(*common)
    assert "有 2 个 full_sft 权重" in err and "full_sft_64.pth：" in err
    _, _, err = ask(*common, "--hidden_size", "32")
    assert "full_sft_32.pth：" in err


def test_工具_随机权重写出什么都不崩_预训练权重说不行(ask, tmp_path):
    make_weights(tmp_path, max_position_embeddings=1024)
    make_weights(tmp_path, "pretrain", max_position_embeddings=1024)
    common = ["--save_dir", str(tmp_path), "--tools", "--tool_rounds", "1", "--max_new_tokens", "6"]
    code, out, err = ask(*common, "--tool_names", "calculator,get_time", "--mode", "auto")
    assert code == 0, err
    assert all(f"你：{prompt}\n" in out for prompt in chat.TOOL_PROMPTS)
    code, _, err = ask(*common, "--weight", "pretrain", "--prompt", "你好")
    assert code == 2 and "不会用工具" in err


def test_打开_hf_目录(ask, tmp_path):
    torch.manual_seed(0)
    tokenizer = load_tokenizer()
    config = MiniMindConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    MiniMindForCausalLM(config).save_pretrained(tmp_path / "hf")
    tokenizer.save_pretrained(tmp_path / "hf")
    code, out, err = ask("--load_from", str(tmp_path / "hf"), "--max_new_tokens", "3", "--prompt", "你好")
    assert code == 0, err
    assert "（3 个）" in out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--weight", "dpo"], "train_dpo.py"),
        (["--num_hidden_layers", "3"], "num_hidden_layers"),
        (["--hidden_size", "64"], "full_sft_32.pth"),
        (["--lora_weight", "lora_identity"], "train_lora.py"),
        (["--load_from", "no/such/folder"], "目录不存在"),
        (["--temperature", "-1"], "--temperature：值是 -1.0；期望：0 到 100"),
        (["--prompt", "长" * 200], "模型的上下文只有 96 个"),
    ],
)
def test_错误是一句话并带办法(ask, save_dir, argv, said):
    code, _, err = ask("--save_dir", save_dir, "--prompt", "你好", *argv)
    (line,) = [line for line in err.splitlines() if line.startswith("错误")]
    assert code == 2 and said in line and "修复办法" in line


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--device", "cuda:99"], "cuda:99"),
        (["--device", "tpu"], "不认识的设备"),
        (["--weight", "grpo"], "train_grpo.py"),
    ],
)
def test_端到端_子进程退出码与一行错误(root_dir, save_dir, argv, said):
    done = subprocess.run(
        [sys.executable, str(root_dir / "eval_llm.py"), "--save_dir", save_dir, "--prompt", "你好", *argv],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )
    assert done.returncode == 2
    assert said in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""


def test_答着的时候CtrlC_只停这个回答_历史里没有它(ask, save_dir, monkeypatch):
    from minimind.inference import chat as sessions

    real, asked = sessions.stream_tokens, []

    def interrupted(model, ids, **options):
        asked.append(list(ids))
        tokens = real(model, ids, **options)
        yield next(tokens)
        if len(asked) == 1:
            raise KeyboardInterrupt
        yield from tokens

    monkeypatch.setattr(sessions, "stream_tokens", interrupted)
    common = ["--save_dir", save_dir, "--mode", "manual", "--max_new_tokens", "3", "--historys", "4"]
    code, out, _ = ask(*common, typed="甲\n乙\n\n")
    assert code == 0 and out.count("答：") == 2 and out.count("停下了") == 1
    assert "甲" not in load_tokenizer().decode(asked[1]) and "乙" in load_tokenizer().decode(asked[1])


def test_只问一句时CtrlC_结束程序(ask, save_dir, monkeypatch):
    from minimind.inference import chat as sessions

    def interrupted(*_, **__):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(sessions, "stream_tokens", interrupted)
    assert ask("--save_dir", save_dir, "--prompt", "你好")[0] == 130


@pytest.mark.parametrize("present", [True, False])
def test_没听说过的权重名_说的是一句能照做的话(ask, tmp_path, present):
    if present:
        make_weights(tmp_path)
    code, _, err = ask("--save_dir", str(tmp_path), "--weight", "我的权重", "--prompt", "你好")
    assert code == 2 and "先运行 训练时" not in err and "--save_weight 我的权重 --hidden_size" in err
    assert ("full_sft_32.pth" in err) == present


# ---- 管道 ----


@pytest.fixture
def pipe(root_dir, save_dir):
    """真的管道：送进字节，返回完成的子进程。"""

    def run(data: bytes, *argv: str):
        return subprocess.run(
            [
                *(sys.executable, "-m", "minimind", "chat", "--save_dir", save_dir, "--max_new_tokens", "2"),
                *("--temperature", "0", "--device", "cpu", "--show_speed", "0", *argv),
            ],
            input=data,
            capture_output=True,
            env={**os.environ, "PYTHONIOENCODING": "utf-8", "PYTHONPATH": str(root_dir)},
        )

    return run


def asked(done) -> list[str]:
    lines = done.stdout.decode().splitlines()
    return [line.removeprefix("你：") for line in lines if line.startswith("你：")]


@pytest.mark.parametrize(
    "data",
    [
        "你好\n1加1等于几？\n",
        "你好\n1加1等于几？",
        "\ufeff你好\r\n\r\n  \r\n1加1等于几？\r\n",
        "\n\n你好\n\n1加1等于几？\n\n\n",
        "1\n你好\n1加1等于几？\n",  # 旧脚本先回答菜单
    ],
)
def test_管道里一行一问_空行与_BOM_与回车不算(pipe, data):
    done = pipe(data.encode())
    assert done.returncode == 0, done.stderr.decode()
    assert asked(done) == ["你好", "1加1等于几？"]
    assert done.stdout.decode().count("答：") == 2 and "[0] 自动测试" not in done.stdout.decode()


def test_管道里的各行是同一段对话(monkeypatch, save_dir, capsys):
    from minimind.inference import chat as sessions

    real, seen = sessions.stream_tokens, []

    def spy(model, ids, **options):
        seen.append(load_tokenizer().decode(list(ids)))
        return real(model, ids, **options)

    monkeypatch.setattr(sessions, "stream_tokens", spy)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("甲\n乙\n".encode())))
    argv = ["--save_dir", save_dir, "--device", "cpu", "--max_new_tokens", "1", "--historys", "4"]
    assert chat.main(argv) == 0
    assert "甲" in seen[1] and "乙" in seen[1]
    capsys.readouterr()


def test_管道里不是_UTF8_的一行_说出第几行_前面的已经答了(pipe):
    done = pipe("你好\n".encode() + "再见\n".encode("gb18030"))
    error = done.stderr.decode()
    assert done.returncode == 2 and "第 2 行不是合法的 UTF-8" in error and "iconv" in error
    assert asked(done) == ["你好"] and "Traceback" not in error


def test_空的管道照旧是自动测试(pipe):
    assert asked(pipe(b"")) == list(chat.CHAT_PROMPTS)


def test_手动模式里管道也是一行一问(pipe):
    assert asked(pipe("甲\n\n乙\n".encode(), "--mode", "manual")) == ["甲", "乙"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX 的管道")
def test_读答案的走了_安静地结束(root_dir, save_dir):
    command = (
        f"yes 你好 | {sys.executable} -m minimind chat --save_dir {save_dir} --max_new_tokens 2 --device cpu"
    )
    done = subprocess.run(
        ["bash", "-c", f"{command} | head -n 1; echo ${{PIPESTATUS[1]}}"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root_dir), "PYTHONIOENCODING": "utf-8"},
    )
    assert done.stdout == "你：你好\n141\n" and "Traceback" not in done.stderr


@pytest.mark.parametrize("encoding", ["gbk", "ascii", "latin-1"])
def test_标准输出的编码写不出的字_写成转义_不中途报错(root_dir, save_dir, encoding):
    """中文的 Windows 上把输出存进文件就是 GBK：问题、回答里的表情符号与 � 都写不出。"""
    done = subprocess.run(
        [sys.executable, "-m", "minimind", "chat", "--save_dir", save_dir, "--max_new_tokens", "2"],
        input="😀是什么\n再见\n".encode(),
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(root_dir)},
    )
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    out = done.stdout.decode(encoding)
    assert (
        "\\U0001f600" in out and out.count("答：".encode(encoding, "backslashreplace").decode(encoding)) == 2
    )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="没有 /dev/full")
@pytest.mark.parametrize("words", [["--help"], ["chat"]])
def test_标准输出写进的磁盘满了_是一句话(root_dir, save_dir, words):
    options = ["--save_dir", save_dir, "--max_new_tokens", "2"] if words == ["chat"] else []
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "minimind", *words, *options],
            input="你好\n".encode(),
            stdout=full,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONIOENCODING": "utf-8", "PYTHONPATH": str(root_dir)},
        )
    error = done.stderr.decode()
    assert done.returncode == 2 and "错误：标准输出：写不出去" in error and "Traceback" not in error


def test_管道里太长的一问_说出第几行_前面的已经答了(pipe):
    done = pipe(("你好\n\n" + "长" * 40_000 + "\n再见\n").encode())
    error = done.stderr.decode()
    assert done.returncode == 2 and "错误：标准输入第 3 行：提示有" in error
    assert asked(done)[0] == "你好" and "再见" not in asked(done)
