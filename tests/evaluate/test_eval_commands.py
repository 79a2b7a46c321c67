"""评测命令：微世界与每字节比特数，从权重文件到结果文件。"""

import json

import pytest
from eval_helpers import make_pair

from minimind.evaluate import cli
from minimind.evaluate.generation import generate_answers
from minimind.inference.generate import stream_tokens
from minimind.runtime.checkpoint import config_dict, save_weights, weights_path
from minimind.tokenizer import encode_pretrain, load_tokenizer

ITEMS = [
    {"task": "add", "level": "easy", "kind": "chat", "prompt": "1+1=？", "messages": [{"role": "user", "content": "1+1=？"}], "answer": "2", "grader": "numeric"},
    {"task": "sort", "level": "hard", "kind": "chat", "prompt": "排", "messages": [{"role": "user", "content": "排"}], "answer": "甲", "grader": "exact"},
    {"task": "noun", "level": "easy", "kind": "cloze", "prompt": "甜的反义词：", "messages": [], "answer": "苦", "grader": "prefix"},
]  # fmt: skip


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "cache"))
    model, _ = make_pair()
    for weight in ("pretrain", "full_sft"):
        note = {"config": config_dict(model.config), "recipe": weight}
        save_weights(model, weights_path(model.config, weight, tmp_path), note)
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS), "utf-8")
    return tmp_path


def common(out, *argv):
    return ["--save_dir", str(out), "--device", "cpu", "--out_dir", str(out / "eval"), *argv]


def result_of(out, name):
    return json.loads((out / "eval" / name).read_text("utf-8"))


def test_结果写不了_打开模型之前就说(out, monkeypatch, capsys):
    (out / "文件").touch()
    monkeypatch.setattr(
        "minimind.inference.loading.load_for_inference", lambda **_: pytest.fail("已经动手了")
    )
    argv = [*common(out), "--out_dir", str(out / "文件"), "--data_path", str(out / "eval.jsonl")]
    assert cli.main_world(argv) == 2
    assert "错误：--out_dir" in capsys.readouterr().err


def test_微世界_按权重的种类考_分任务分难度(out, capsys):
    assert (
        cli.main_world(
            common(out, "--data_path", str(out / "eval.jsonl"), "--save_items", "--max_new_tokens", "4")
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "add" in said and "合计 hard" in said and "noun" not in said
    result = result_of(out, "full_sft_32_world.json")
    assert set(result["tasks"]) == {"add", "sort"} and result["methods"]["easy"]["total"] == 1
    assert [item["task"] for item in result["items"]] == ["add", "sort"]
    assert (
        cli.main_world(
            common(
                out, "--weight", "pretrain", "--data_path", str(out / "eval.jsonl"), "--max_new_tokens", "4"
            )
        )
        == 0
    )
    assert set(result_of(out, "pretrain_32_world.json")["tasks"]) == {"noun"}


@pytest.mark.parametrize(
    ("argv", "said"),
    [(["--tasks", "ad"], "没有任务 ad；期望：add、sort"), (["--tasks", "noun"], "没有 chat 题")],
)
def test_微世界_写错任务名说出有哪些(out, capsys, argv, said):
    assert cli.main_world(common(out, "--data_path", str(out / "eval.jsonl"), *argv)) == 2
    assert said in capsys.readouterr().err


def test_每字节比特数_jsonl_与纯文本相同_对话只数助手(out, capsys):
    text = "春天来了，河水涨了三尺。The otter sleeps."
    (out / "a.jsonl").write_text(json.dumps({"text": text}) + "\n", "utf-8")
    (out / "a.txt").write_text(text, "utf-8")
    results = []
    for name in ("a.jsonl", "a.txt"):
        assert cli.main_bpb(common(out, "--weight", "pretrain", "--data_path", str(out / name))) == 0
        results.append(result_of(out, "pretrain_32_bpb.json"))
    first, second = results
    assert first["bpb"] == second["bpb"] and first["bytes"] == len(text.encode())
    assert first["tokens"] == len(encode_pretrain(load_tokenizer(), text)) - 1
    turns = [{"role": "user", "content": "问" * 30}, {"role": "assistant", "content": "答案是三。"}]
    (out / "c.jsonl").write_text(json.dumps({"conversations": turns}) + "\n", "utf-8")
    assert cli.main_bpb(common(out, "--data_path", str(out / "c.jsonl"))) == 0
    assert result_of(out, "full_sft_32_bpb.json")["bytes"] == len("答案是三。".encode())
    assert "bits per byte" in capsys.readouterr().out


@pytest.mark.parametrize(("content", "said"), [(b"", "空的"), ("中文".encode("gbk"), "不是 UTF-8")])
def test_每字节比特数_坏文件一句话(out, capsys, content, said):
    (out / "bad.txt").write_bytes(content)
    assert cli.main_bpb(common(out, "--data_path", str(out / "bad.txt"))) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("which", [0, 1], ids=["minimind", "llama"])
def test_整批生成与逐条流式一致_与题目同序(which):
    model = make_pair()[which]
    tokenizer = load_tokenizer()
    prompts = [[1, 50, 60, 70], [1, 80], [1, *range(100, 130)]]
    seen = []
    answers = generate_answers(
        model, tokenizer, prompts, max_new_tokens=12, batch_size=2, advance=seen.append
    )
    assert sum(seen) == 3
    for prompt, answer in zip(prompts, answers):
        alone = list(stream_tokens(model, prompt, max_new_tokens=12, eos_ids={tokenizer.eos_token_id}))
        assert answer.ids == alone and answer.finished == (len(alone) < 12)
        assert answer.text == tokenizer.decode(alone)
