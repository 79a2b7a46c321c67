"""两个配方：从哪里运行都一样、数据从哪里来、学得会、出错说得清。"""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from minimind.errors import UserError
from minimind.evaluate.microworld import evaluate_items
from minimind.inference.loading import load_for_inference
from minimind.recipes import entry, full_sft, pretrain

# 小到一步几十毫秒；头数由隐层宽度决定的默认值 8 整除 64
SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "max_seq_len": 128,
    "batch_size": 4,
    "log_interval": 5,
    "save_interval": 0,
    "eval_interval": 0,
    "device": "cpu",
    "dtype": "float32",
}
FACTS = {"云川": "河", "小满": "猫", "石桥": "桥", "木舟": "船", "青岚": "山", "白露": "花"}


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return str(path)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """像一个仓库根：有 trainer/ 与 minimind/，缓存也在里面。"""
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    texts = [f"{name}是一{'座条只艘'[i % 4]}{kind}。" * 6 for i, (name, kind) in enumerate(FACTS.items())]
    write_jsonl(tmp_path / "pre.jsonl", [{"text": text} for text in texts * 4])
    turns = [
        [
            {"role": "user", "content": f"{name}是什么？"},
            {"role": "assistant", "content": f"{name}是{kind}。"},
        ]
        for name, kind in FACTS.items()
    ]
    write_jsonl(tmp_path / "sft.jsonl", [{"conversations": turn} for turn in turns])
    return tmp_path


def test_先预训练再微调_学会作答并知道停(home):
    first = pretrain.run(pretrain.PretrainArguments(data_path="pre.jsonl", val_ratio=0, epochs=6, **SMALL))
    assert first.weights == home / "out" / "pretrain_64.pth"
    losses = [json.loads(line)["loss"] for line in first.log.read_text().splitlines()]
    assert losses[-1] < losses[0]
    second = full_sft.run(
        full_sft.SFTArguments(
            data_path="sft.jsonl", val_ratio=0, epochs=120, **{**SMALL, "batch_size": 1}, learning_rate=4e-3
        )
    )
    sidecar = json.loads((home / "out" / "full_sft_64.json").read_text())
    assert sidecar["recipe"] == "full_sft" and sidecar["step"] == second.step
    loaded = load_for_inference(weight="full_sft", device="cpu")
    items = [
        {
            "task": "facts",
            "prompt": "",
            "messages": [{"role": "user", "content": f"{name}是什么？"}],
            "answer": f"{name}是{kind}。",
            "grader": "exact",
        }
        for name, kind in FACTS.items()
    ]
    results = evaluate_items(loaded.model, loaded.tokenizer, items, max_new_tokens=20)
    assert [answered.response for answered in results] == [item["answer"] for item in items]
    assert all(answered.finished and answered.score == 1 for answered in results)


def test_微调的目标只有助手的话(home):
    from minimind.dataset import SFTDataset
    from minimind.tokenizer import load_tokenizer

    tokenizer = load_tokenizer()
    row = SFTDataset("sft.jsonl", tokenizer, max_length=128)[0]
    text = tokenizer.decode(row["labels"][row["labels"] >= 0])
    assert "什么" not in text and "assistant" not in text
    assert text.count("<|im_end|>") == len(row["seg_lens"]) - 1


def test_初始损失接近词表大小的对数(home):
    from minimind.trainer.recipe import count_targets, language_model_loss
    from minimind.trainer.trainer_utils import init_model, model_config, start_run

    args = pretrain.PretrainArguments(data_path="pre.jsonl", val_ratio=0, **SMALL)
    model, tokenizer = init_model(model_config(args), "none", None, args.save_dir, start_run(args))
    opened = entry.open_datasets(pretrain.PretrainDataset, args, tokenizer)
    assert opened.val is None
    batch = pretrain.collate_packed([opened.train[0]])
    with torch.no_grad():
        loss, _ = language_model_loss(model, batch)
    assert abs(loss / count_targets(batch) - torch.log(torch.tensor(6400.0))) < 0.25


def test_数据的来源_给的_惯用的_内置的(home, monkeypatch, capsys):
    monkeypatch.setattr("minimind.microworld.ensure_microworld", lambda: home / "dataset" / "microworld")
    given = entry.training_files("pretrain", "pre.jsonl", None)
    assert given == (home / "pre.jsonl", None)
    world = home / "dataset" / "microworld"
    assert entry.training_files("sft", None, None) == (world / "sft.jsonl", world / "sft_heldout.jsonl")
    assert "内置的微世界" in capsys.readouterr().err
    (home / "dataset").mkdir()
    for name in ("sft_512.jsonl", "sft_mini_512.jsonl"):
        shutil.copy("sft.jsonl", home / "dataset" / name)
    found, validation = entry.training_files("sft", None, None)
    assert found.name == "sft_mini_512.jsonl" and validation is None
    line = capsys.readouterr().err
    assert "sft_mini_512.jsonl" in line and line.count("\n") == 1
    shutil.copy("sft.jsonl", home / "dataset" / "sft_t2t_mini.jsonl")  # 两代的都有：用与模型同一代的
    assert entry.training_files("sft", None, None)[0].name == "sft_mini_512.jsonl"
    assert entry.training_files("sft", None, None, arch="v3")[0].name == "sft_t2t_mini.jsonl"


@pytest.mark.parametrize("flag", ["data_path", "val_path"])
def test_数据文件不存在_说出是哪个参数(home, flag):
    with pytest.raises(UserError, match=f"--{flag}.*nope.jsonl"):
        entry.training_files(
            "pretrain", *(("nope.jsonl", None) if flag == "data_path" else (None, "nope.jsonl"))
        )


def test_没有预训练权重就微调_指出先运行什么(home, capsys):
    argv = ["--data_path", "sft.jsonl", "--hidden_size", "64", "--num_hidden_layers", "2", "--device", "cpu"]
    assert full_sft.main(argv) == 2
    error = capsys.readouterr().err
    assert "pretrain_64.pth" in error and "train_pretrain.py --hidden_size 64" in error


def command(script: str, *extra: str) -> list[str]:
    small = (
        "--hidden_size 64 --num_hidden_layers 2 --max_seq_len 64 --max_steps 2 --device cpu --dtype float32"
    )
    return [script, *f"{small} --batch_size 2 --save_interval 0 --val_ratio 0".split(), *extra]


def run_python(args, cwd, launcher=()):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, *launcher, *args], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr


def test_从_trainer_里运行_相对路径仍指根目录(home, root_dir):
    shutil.copytree(root_dir / "trainer", home / "trainer")
    (home / "minimind").symlink_to(root_dir / "minimind", target_is_directory=True)
    run_python(command("train_pretrain.py", "--data_path", "../pre.jsonl"), home / "trainer")
    assert (home / "out" / "pretrain_64.pth").is_file()
    assert {p.suffix for p in (home / "trainer").iterdir()} <= {".py", ""}


def test_torchrun_两个进程从同一份数据开始(home, root_dir):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = str(root_dir / "trainer" / "train_pretrain.py")
    stderr = run_python(command(script, "--data_path", "pre.jsonl"), home, launcher)
    assert "2 进程" in stderr
    assert stderr.count("训练完成") == 1
    assert (home / "out" / "pretrain_64.pth").is_file()
