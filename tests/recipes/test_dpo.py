"""DPO 配方：学得会偏好，参考模型的对数概率只算一遍，数据的毛病说得出文件与行号。"""

from __future__ import annotations

import json
import multiprocessing
import time

import pytest
import torch

from minimind.errors import UserError
from minimind.model import MiniMindConfig, MiniMindForCausalLM
from minimind.recipes import dpo
from minimind.recipes.health import preference_health
from minimind.runtime.checkpoint import config_dict, load_file, save_weights, weights_path
from minimind.tokenizer import load_tokenizer
from minimind.trainer import reference

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "max_seq_len": 64,
    "data_path": "dpo.jsonl",
    "val_ratio": 0.0,
    "save_interval": 0,
    "eval_interval": 0,
    "log_interval": 5,
    "device": "cpu",
    "dtype": "float32",
}
NAMES = ("云川", "小满", "石桥", "木舟", "青岚", "白露", "星门", "雨巷")


def turns(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def pair(question, good, bad):
    return {"chosen": turns(question, good), "rejected": turns(question, bad)}


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """有随机初始化的 full_sft 与一份“客气好、不耐烦坏”的偏好数据。"""
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_jsonl(
        tmp_path / "dpo.jsonl",
        [
            pair(f"{n}{i}在哪里？", f"您好，{n}在河边{'，请慢走' * (i % 3)}。", f"哼，{n}在河边。")
            for i, n in enumerate(NAMES * 2)
        ],
    )
    torch.manual_seed(3)
    config = MiniMindConfig(hidden_size=64, num_hidden_layers=2)
    model = MiniMindForCausalLM(config)
    save_weights(model, weights_path(config, "full_sft", "out"), {"config": config_dict(config)})
    return tmp_path


def train(**changes):
    return dpo.run(dpo.DPOArguments(**{**SMALL, **changes}))


def log_of(result):
    return [json.loads(line) for line in result.log.read_text().splitlines()]


def test_学会偏好_验证集上也分得开(home):
    write_jsonl(home / "val.jsonl", [pair(f"{n}远吗？", f"您好，{n}不远。", f"哼，{n}不远。") for n in NAMES])
    result = train(val_path="val.jsonl", epochs=8, learning_rate=1e-3, log_interval=1)
    lines = [line for line in log_of(result) if "lr" in line]
    # 策略就是参考模型：第一步的损失是 ln 2，优势是 0
    assert lines[0]["loss"] == pytest.approx(0.693147, abs=1e-4) and abs(lines[0]["margin"]) < 1e-4
    assert lines[-1]["accuracy"] == 1 and lines[-1]["reward_chosen"] > lines[-1]["reward_rejected"]
    assert result.metrics["val_accuracy"] > 0.9 and result.metrics["val_margin"] > 0.1
    assert "val_bpb" not in result.metrics  # 损失不是每个词元的负对数概率


def test_参考值只算一遍_换了参考权重才重算(home, monkeypatch, capsys):
    calls = []
    original = reference.sequence_logprobs
    monkeypatch.setattr(reference, "sequence_logprobs", lambda *args: calls.append(1) or original(*args))
    first = train(max_steps=2)
    assert calls
    calls.clear()
    again = train(max_steps=2)
    assert not calls and "读自缓存" in capsys.readouterr().err
    assert log_of(first)[0]["loss"] == log_of(again)[0]["loss"]
    resumed = train(max_steps=4, from_resume=1)
    assert not calls and resumed.step == 4
    train(max_steps=2, from_weight="dpo")
    assert calls


def test_几次训练同时要同一份参考值_只有一个算_其余等它算完来读(home):
    """扫 beta 时的样子：四个进程同时来。"""
    context = multiprocessing.get_context("spawn")
    results, go = context.Queue(), context.Event()
    workers = [context.Process(target=reference_in_process, args=(go, results)) for _ in range(4)]
    for worker in workers:
        worker.start()
    go.set()
    got = [results.get(timeout=300) for _ in workers]
    for worker in workers:
        worker.join()
    assert sum(computed for computed, _ in got) == 1
    assert all(values == got[0][1] for _, values in got)
    assert [p.suffix for p in (home / "cache" / "reference").iterdir()] == [".pt"]


def reference_in_process(go, results):
    from minimind.dataset import DPODataset

    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=2))
    pairs = DPODataset("dpo.jsonl", load_tokenizer(), 64)
    computed, original = [], reference.pair_logprobs

    def counted(*args, **options):
        computed.append(1)
        time.sleep(1)  # 放大窗口：别的进程这时都在门外
        return original(*args, **options)

    reference.pair_logprobs = counted
    go.wait()
    logps = reference.cached_pair_logprobs(model, pairs, key="k", batch_size=4, dtype=torch.float32)
    results.put((len(computed), logps.tolist()))


def test_参考值的缓存断电截短了_重新算(home, capsys):
    first = train(max_steps=2)
    [cache] = (home / "cache" / "reference").iterdir()
    cache.write_bytes(cache.read_bytes()[:100])
    again = train(max_steps=2)
    assert "重新算" in capsys.readouterr().err
    assert log_of(first)[0]["loss"] == log_of(again)[0]["loss"]


def test_丢弃与截断的对在开头说出条数(home, capsys):
    long = "很长，" * 200
    records = [pair(f"问{i}", "好", "差") for i in range(3)]
    records += [pair("问", long + "好", long + "差"), pair("问二", "好" + long, "差")]
    write_jsonl(home / "dpo.jsonl", records)
    train(max_steps=1)
    said = capsys.readouterr().err
    assert "dpo.jsonl：1 对截到 64 个 token（后面的" in said and "丢弃 1 对" in said


def test_续训时参考模型换了_报错(home):
    train(max_steps=2)
    config = MiniMindConfig(hidden_size=64, num_hidden_layers=2)
    save_weights(MiniMindForCausalLM(config), weights_path(config, "full_sft", "out"), {})
    with pytest.raises(UserError, match="参考"):
        train(max_steps=4, from_resume=1)


@pytest.mark.parametrize("loss_type", ["sigmoid", "sigmoid_norm", "ipo"])
def test_现算参考值与缓存的结果相同(home, loss_type):
    options = {"max_steps": 3, "loss_type": loss_type, "log_interval": 1, "sft_coef": 0.1}
    cached = train(**options)
    weights = load_file(home / "checkpoints" / "dpo_64_resume.pth")["model"]
    online = train(**options, cache_reference=0)
    for a, b in zip(log_of(cached), log_of(online)):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    for key, value in load_file(home / "checkpoints" / "dpo_64_resume.pth")["model"].items():
        torch.testing.assert_close(value, weights[key], atol=1e-4, rtol=0, msg=key)
    assert online.step == 3


def test_参考值与逐对单独算一致_和批的切法无关(home):
    from minimind.dataset import DPODataset

    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=2))
    pairs = DPODataset("dpo.jsonl", load_tokenizer(), 64)
    options = {"dtype": torch.float32, "description": "测"}
    one = reference.pair_logprobs(model, pairs, batch_size=1, **options)
    many = reference.pair_logprobs(model, pairs, batch_size=5, **options)
    torch.testing.assert_close(one, many, atol=1e-4, rtol=0)
    ids, labels = pairs[3]["rejected"], pairs[3]["rejected_labels"]
    with torch.no_grad():
        table = model.eval()(ids[None]).logits[0].log_softmax(-1)
    alone = sum(float(table[t - 1, ids[t]]) for t in (labels != -100).nonzero()[:, 0].tolist())
    assert float(one[3, 1]) == pytest.approx(alone, abs=1e-3)


def test_按长度排过再算_次序仍对得上(home):
    from minimind.dataset import DPODataset

    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=2))
    pairs = DPODataset("dpo.jsonl", load_tokenizer(), 64)
    whole = reference.pair_logprobs(model, pairs, batch_size=4, dtype=torch.float32, description="测")
    for i in (0, 7, 15):
        single = reference.sequence_logprobs(model, pairs.collate([pairs[i]])).logps
        torch.testing.assert_close(whole[i], single.detach(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "record, words",
    [
        (pair("问", "答", "答"), r"dpo\.jsonl.*3.*完全相同.*删掉这一行"),
        (pair("问", "答", ""), r"dpo\.jsonl.*3.*rejected.*回答是空的"),
        (pair("问", " ", "答"), r"dpo\.jsonl.*3.*chosen.*回答是空的"),
        ({"chosen": turns("问", "答")}, r"dpo\.jsonl.*3.*rejected"),
        ({"chosen": turns("问甲", "答"), "rejected": turns("问乙", "答")}, r"dpo\.jsonl.*3.*提问相同"),
    ],
)
def test_坏的偏好对_说出文件行号与修法(home, record, words):
    good = pair("问", "好", "坏")
    write_jsonl(home / "dpo.jsonl", [good, pair("二", "好", "坏"), record])
    with pytest.raises(UserError, match=words):
        train()
    result = train(on_bad_line="skip", max_steps=1)
    assert result.step == 1


@pytest.mark.parametrize(
    "changes, flag",
    [
        ({"beta": 0.0}, "--beta"),
        ({"label_smoothing": 0.5}, "--label_smoothing"),
        ({"sft_coef": -1}, "--sft_coef"),
    ],
)
def test_参数取值不对(changes, flag):
    with pytest.raises(UserError, match=flag):
        dpo.DPOArguments(**changes)


def test_健康的话_各说各的毛病():
    fine = {"step": 100, "accuracy": 0.9, "margin": 1.0, "reward_chosen": 0.3, "reward_rejected": -0.7}
    assert preference_health(fine) == []
    assert "50 %" in preference_health({**fine, "accuracy": 0.5})[0]
    assert "大跌" in preference_health({**fine, "reward_chosen": -1.5, "reward_rejected": -2.5})[0]
    assert "可以停了" in preference_health({**fine, "margin": 12.0})[0]
    assert preference_health({**fine, "step": 5, "accuracy": 0.5}) == []
