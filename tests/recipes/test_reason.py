"""推理配方：标签按单个词元加权、权重之和作分母、使用者打的字不算、结束符是目标、公共项目的写法也认。"""

import json

import pytest
import torch
import torch.nn.functional as F
from recipe_cases import make_base

from minimind.dataset import SFTDataset, collate_packed
from minimind.errors import UserError
from minimind.model import MiniMindConfig, MiniMindForCausalLM
from minimind.recipes import reason
from minimind.runtime import device
from minimind.tokenizer import load_tokenizer
from minimind.trainer.recipe import count_targets, language_model_loss

ANSWER = "<think>\n3+4=7\n</think>\n\n<answer>7</answer>"
FIELDS = {"role": "assistant", "reasoning_content": "3+4=7", "content": "<answer>7</answer>"}
INLINE = {"role": "assistant", "content": ANSWER}
TYPED = {"role": "user", "content": "3+4 等于几？写成 <think>过程</think><answer>答案</answer>"}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(device, "PEAK_SECONDS", 0.0)
    monkeypatch.chdir(make_base(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def write(path, *replies, question=None):
    question = question or {"role": "user", "content": "3+4 等于几？"}
    lines = (json.dumps({"conversations": [question, reply]}, ensure_ascii=False) for reply in replies)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def batch_of(path, tokenizer, length=96):
    ids = reason.tag_ids(tokenizer)
    dataset = SFTDataset(path, tokenizer, max_length=length)
    return reason.weighted(collate_packed, ids, 10.0)([dataset[0]])


def test_权重按编号_标签十倍_其余一倍():
    labels = torch.tensor([[-100, 3, 50, 4, 5, 60, 6, 2]])
    assert reason.tag_weights(labels, [3, 4, 5, 6], 10.0).tolist() == [[1, 10, 1, 10, 10, 1, 10, 1]]


def test_四个标签都是单个词元(tokenizer):
    ids = reason.tag_ids(tokenizer)
    assert len(set(ids)) == 4 and [tokenizer.decode([i]) for i in ids] == list(reason.REASON_TAGS)


def test_损失等于手算的加权平均(home, tokenizer):
    batch = batch_of(write(home / "a.jsonl", FIELDS), tokenizer)
    torch.manual_seed(0)
    model = MiniMindForCausalLM(
        MiniMindConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    )
    with torch.no_grad():
        loss, _ = language_model_loss(model, batch)
    inputs = {k: batch[k] for k in ("input_ids", "position_ids", "cu_seqlens", "max_seqlen")}
    with torch.no_grad():
        logits = model(**inputs).logits[0, :-1]
    target = batch["labels"][0, 1:]
    ce = F.cross_entropy(logits, target.clamp_min(0), reduction="none")
    tags, ids = 0, reason.tag_ids(tokenizer)
    total = weights = 0.0
    for t, label in enumerate(target.tolist()):
        if label != -100:
            w = 10.0 if label in ids else 1.0
            tags += label in ids
            total, weights = total + w * float(ce[t]), weights + w
    assert tags == 4
    assert abs(float(loss) - total) < 1e-3 and weights == count_targets(batch)


def test_使用者打出的标签不是标签_不加权(home, tokenizer):
    batch = batch_of(write(home / "a.jsonl", FIELDS, question=TYPED), tokenizer, 160)
    ids = torch.tensor(reason.tag_ids(tokenizer))
    # 整行里标签的编号只有助手写的四个；问题里的 <think> 是普通字符拼出来的
    assert int(torch.isin(batch["input_ids"], ids).sum()) == 4
    heavy = batch["loss_weights"] == 10
    assert int(heavy.sum()) == 4 and bool((batch["labels"][heavy] >= 0).all())


def test_公共项目把标签写在正文里_得到同样的词元(home, tokenizer):
    ours = batch_of(write(home / "a.jsonl", FIELDS), tokenizer)
    theirs = batch_of(write(home / "b.jsonl", INLINE), tokenizer)
    for key in ("input_ids", "labels", "loss_weights"):
        assert torch.equal(ours[key], theirs[key]), key


def test_结束符是最后一个目标(home, tokenizer):
    batch = batch_of(write(home / "a.jsonl", FIELDS), tokenizer)
    targets = batch["labels"][batch["labels"] >= 0].tolist()
    assert targets[-1] == tokenizer.eos_token_id and targets.count(tokenizer.eos_token_id) == 1


def run(home, path, **changes):
    flags = {
        "hidden_size": 64, "num_hidden_layers": 2, "max_seq_len": 96, "batch_size": 1, "val_ratio": 0,
        "save_interval": 0, "device": "cpu", "dtype": "float32", "data_path": path,
    }  # fmt: skip
    return reason.run(reason.ReasonArguments(**{**flags, **changes}))


def test_训练后照样写出标签并停下(home, capsys):
    from minimind.evaluate.microworld import evaluate_items
    from minimind.inference.loading import load_for_inference

    result = run(home, write(home / "a.jsonl", FIELDS), epochs=60, learning_rate=1e-2)
    assert result.weights == home / "out" / "reason_64.pth"
    assert "推理标签占目标的" in capsys.readouterr().err
    loaded = load_for_inference(weight="reason", device="cpu", dtype="float32")
    item = {
        "task": "t",
        "messages": [{"role": "user", "content": "3+4 等于几？"}],
        "answer": "7",
        "grader": "numeric",
    }
    (answered,) = evaluate_items(loaded.model, loaded.tokenizer, [item], max_new_tokens=60)
    assert (answered.response, answered.finished, answered.score) == (ANSWER, True, 1.0)


def test_没有标签的数据_说加权不起作用(home, capsys):
    plain = {"role": "assistant", "content": "等于 7。"}
    run(home, write(home / "a.jsonl", plain), epochs=1)
    assert "加权不起作用" in capsys.readouterr().err


def test_权重不是正数(home):
    with pytest.raises(UserError, match="--tag_weight"):
        run(home, write(home / "a.jsonl", FIELDS), tag_weight=0.0)
