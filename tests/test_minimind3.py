"""从 minimind-3 过来：文档里的每条命令都在替身上走一遍；公共权重不写分词器与布局也读得对。"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import sys
import urllib.request

import pytest
import torch
from public_minimind3 import Hub, lay_out
from transformers import AutoModelForCausalLM, AutoTokenizer

from minimind.cli import main as minimind
from minimind.errors import UserError
from minimind.inference.loading import load_for_inference
from minimind.model import PRESETS
from minimind.recipes import full_sft
from minimind.runtime.checkpoint import read_sidecar
from minimind.tokenizer import load_tokenizer, tokenizer_fingerprint
from minimind.trainer.trainer_utils import model_config

ASK = [{"role": "user", "content": "你好，1加2等于多少？"}]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """一层的替身；只读，各测试各拷一份。"""
    lay_out(home := tmp_path_factory.mktemp("minimind3") / "home")
    return home


@pytest.fixture
def home(made, tmp_path, monkeypatch):
    for name in ("minimind3", "minimind3_moe"):
        monkeypatch.setitem(PRESETS, name, {**PRESETS[name], "num_hidden_layers": 1})
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.chdir(shutil.copytree(made, tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def page(root_dir, monkeypatch):
    """读文档里的命令的那份代码，与 ``run_documented_commands.py --page`` 是同一份。"""
    monkeypatch.syspath_prepend(root_dir / "benchmarks")
    import documented_page

    yield documented_page
    sys.modules.pop("documented_page")


def run_here(words: list[str], root_dir) -> int:
    """在本进程里运行一条。"""
    if words[0] == "minimind":
        return minimind(words[1:]) or 0
    target = re.search(r'launch\("([\w.]+):(\w+)"\)', (root_dir / words[1]).read_text("utf-8"))
    return getattr(importlib.import_module(target[1]), target[2])(words[2:]) or 0


@pytest.mark.slow
def test_文档里的每条命令都走得到头(home, page, root_dir, capfd):
    commands, port, server = page.commands(root_dir / "docs" / "minimind3.md"), page.free_port(), None
    names = [page.program(words)[0] for words in commands]
    assert {"eval_llm", "serve_openai_api", "train_pretrain", "export hf", "import", "data download"} <= {
        *names
    }
    env = {**os.environ, "PYTHONPATH": str(root_dir)}
    with Hub(home / "remote") as hub:
        for name, words in zip(names, commands, strict=True):
            line = [*words, *page.extras(words, hub.url, port)]
            if "--student_num_layers" in line:
                line[line.index("--student_num_layers") + 1] = "1"
            if name == "serve_openai_api":
                line = [sys.executable, str(root_dir / line[1]), *line[2:]]
                server = page.Server(line, home, port, env)
                server.start()
            elif name == "curl":
                body = words[words.index("-d") + 1].encode()
                request = urllib.request.Request(
                    f"{server.url}/v1/chat/completions", body, {"Content-Type": "application/json"}
                )
                with urllib.request.urlopen(request, timeout=120) as response:
                    assert json.load(response)["choices"][0]["message"]["role"] == "assistant"
                assert server.stop() == 0
            else:
                assert run_here(line, root_dir) == 0, f"{' '.join(words)}\n{capfd.readouterr().err[-2000:]}"
    made_here = {path.name for path in (home / "out").glob("*.pth")}
    assert {
        "my_sft_768.pth",
        "my_sft_768_moe.pth",
        "my_public3_768.pth",
        "pretrain_theirs_768.pth",
    } <= made_here
    assert json.loads((home / "hf/my-minimind-3-moe/config.json").read_text())["model_type"] == "qwen3_moe"


def test_公共的pth不写布局与分词器_与HF目录同一套数(home, capfd):
    """同一份权重的两种文件：模板渲染的 id 与 logits 都同 transformers。"""
    tokenizer = AutoTokenizer.from_pretrained(home / "minimind-3")
    ids = tokenizer.apply_chat_template(
        ASK, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    theirs = AutoModelForCausalLM.from_pretrained(home / "minimind-3", dtype=torch.float32)
    loaded = load_for_inference(weight="full_sft", use_moe=0, device="cpu", dtype="float32")
    assert "model 的分词器" in capfd.readouterr().err
    assert tokenizer_fingerprint(loaded.tokenizer) == tokenizer_fingerprint(load_tokenizer("minimind-3"))
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, theirs(ids).logits, atol=1e-4, rtol=1e-4)


def test_没有model目录时提醒(home, capfd):
    shutil.rmtree(home / "model")
    load_for_inference(weight="full_sft", use_moe=0, device="cpu", dtype="float32")
    assert "--tokenizer_path" in capfd.readouterr().err


def test_只写宽度_布局与分词器随起点_接着用也随旁注(home, capfd):
    words = "--hidden_size 768 --num_hidden_layers 1 --save_weight mine --max_steps 1 --val_ratio 0 --batch_size 2"
    words += " --data_path remote/sft_t2t_mini.jsonl"
    assert full_sft.main(words.split()) == 0
    sidecar = read_sidecar(home / "out" / "mine_768.pth")
    assert sidecar["config"]["arch"] == "v3"
    assert sidecar["tokenizer_hash"] == tokenizer_fingerprint(load_tokenizer("model"))
    capfd.readouterr()
    loaded = load_for_inference(weight="mine", device="cpu", dtype="float32")
    assert tokenizer_fingerprint(loaded.tokenizer) == sidecar["tokenizer_hash"]


def test_自带分词器的权重不理会model目录(home):
    words = "--hidden_size 64 --num_hidden_layers 1 --from_weight none --save_weight own --max_steps 1 --val_ratio 0"
    words += " --data_path remote/sft_mini_512.jsonl"
    assert full_sft.main(words.split()) == 0
    loaded = load_for_inference(weight="own", device="cpu", dtype="float32")
    assert tokenizer_fingerprint(loaded.tokenizer) == tokenizer_fingerprint(load_tokenizer())


@pytest.mark.parametrize("name", ["minimind3", "minimind3_moe"])
def test_预设带着布局_与写明的不同就报错(home, name):
    args = full_sft.SFTArguments(preset=name, from_weight="none")
    assert model_config(args).arch == "v3" and args.width == 768
    with pytest.raises(UserError, match=f"--preset {name} --arch v2"):
        model_config(full_sft.SFTArguments(preset=name, arch="v2"))
