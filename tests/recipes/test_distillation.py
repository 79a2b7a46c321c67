"""蒸馏配方：教师学生怎么选，词表不同说得清，有教师学得更快，在线作答逐位可重来。"""

from __future__ import annotations

import json

import pytest
import torch

from minimind.dataset import SFTDataset, collate_packed
from minimind.errors import UserError
from minimind.model import MiniMindConfig, MiniMindForCausalLM
from minimind.objectives.distillation import distillation_loss
from minimind.objectives.logprobs import target_logits
from minimind.recipes import distillation
from minimind.recipes.distillation import DistillationArguments, distill_loss
from minimind.recipes.health import distillation_health
from minimind.recipes.teacher import choose_models, last_prompts
from minimind.runtime.checkpoint import config_dict, load_file, save_weights, weights_path
from minimind.tokenizer import load_tokenizer, tokenizer_fingerprint
from minimind.trainer.recipe import count_targets, language_model_loss

SMALL = {
    "student_hidden_size": 32,
    "student_num_layers": 2,
    "max_seq_len": 64,
    "batch_size": 2,
    "data_path": "sft.jsonl",
    "val_ratio": 0.0,
    "save_interval": 0,
    "eval_interval": 0,
    "log_interval": 1,
    "device": "cpu",
    "dtype": "float32",
    "learning_rate": 3e-3,
}
NAMES = ("云川", "小满", "石桥", "木舟", "青岚", "白露", "星门", "雨巷")


def make_weights(name="full_sft", hash_of_tokenizer=True, **sizes):
    """随机初始化的权重放进 ``out``；返回模型。"""
    torch.manual_seed(sizes.get("hidden_size", 64))
    config = MiniMindConfig(**{"hidden_size": 64, "num_hidden_layers": 2, **sizes})
    model = MiniMindForCausalLM(config)
    model.model.embed_tokens.weight.data *= 4  # 随机教师也要有主见，否则处处均匀，没有东西可学
    sidecar = {"config": config_dict(config), "recipe": name}
    if hash_of_tokenizer:
        sidecar["tokenizer_hash"] = tokenizer_fingerprint(load_tokenizer())
    save_weights(model, weights_path(config, name, "out"), sidecar)
    return model


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    records = []
    for i, name in enumerate(NAMES * 3):
        turns = [(f"{name}{i}在哪里？", f"{name}在河边。"), ("远吗？", "不远。")][: 1 + i % 2]
        records.append(
            {
                "conversations": [
                    {"role": role, "content": text}
                    for pair in turns
                    for role, text in zip(("user", "assistant"), pair)
                ]
            }
        )
    (tmp_path / "sft.jsonl").write_text(
        "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8"
    )
    return tmp_path


def train(**changes):
    return distillation.run(DistillationArguments(**{**SMALL, **changes}))


def chosen(**changes):
    """``(选出的教师, 补好的参数)``。"""
    args = DistillationArguments(**changes)
    return choose_models(args), args


def log_of(result):
    return [json.loads(line) for line in result.log.read_text().splitlines()]


def final_weights(home, name="full_dist_32"):
    return load_file(home / "checkpoints" / f"{name}_resume.pth")["model"]


def test_批上的损失等于不分块的算法(home):
    teacher = make_weights().eval()
    torch.manual_seed(1)
    student = MiniMindForCausalLM(MiniMindConfig(hidden_size=32, num_hidden_layers=2))
    args = DistillationArguments(**SMALL, alpha=0.3, temperature=2.0)
    rows = SFTDataset("sft.jsonl", load_tokenizer(), 64)
    batch = collate_packed([rows[0], rows[1]])
    loss, parts = distill_loss(student, batch, args, student, teacher)
    loss.backward()
    got = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()
    ours = target_logits(student, batch)
    with torch.no_grad():
        guide = target_logits(teacher, batch).logits
    expected, expected_parts = distillation_loss(ours.logits, guide, ours.targets, alpha=0.3, temperature=2.0)
    expected.backward()
    assert count_targets(batch) == len(ours.targets) == int((batch["labels"][:, 1:] != -100).sum())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(parts["ce"], expected_parts["ce"], rtol=1e-5, atol=1e-4)
    for name, p in student.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_学生越来越像教师(home, divergence):
    make_weights()
    lines = log_of(train(epochs=6, alpha=0.0, divergence=divergence))
    assert lines[-1]["divergence"] < 0.7 * lines[0]["divergence"]


@pytest.mark.parametrize("teacher_moe, student_moe", [(True, 0), (False, 1)])
def test_混合专家与稠密可以互相教(home, teacher_moe, student_moe):
    make_weights(use_moe=teacher_moe)
    result = train(max_steps=2, student_use_moe=student_moe)
    assert result.weights.name == f"full_dist_32{'_moe' * student_moe}.pth"
    assert ("aux_loss" in str(log_of(result)[0])) is False and log_of(result)[1]["ce"] > 0


def test_alpha为一就是普通的监督微调(home):
    make_weights()
    train(max_steps=3, alpha=1.0)
    first = final_weights(home)
    original = distillation.distill_loss
    try:
        distillation.distill_loss = lambda model, batch, args, student, teacher: (
            language_model_loss(model, batch)[0],
            {"divergence": torch.ones(())},
        )
        train(max_steps=3, alpha=1.0)
    finally:
        distillation.distill_loss = original
    for key, value in final_weights(home).items():
        torch.testing.assert_close(
            value, first[key], atol=3e-5, rtol=0, msg=key
        )  # 两种写法只差舍入，AdamW 头几步放大它


# ---- 学生自己作答 ----


def test_提示取到最后一个回答之前(home):
    tokenizer = load_tokenizer()
    row = SFTDataset("sft.jsonl", tokenizer, 64)[0]
    texts = [tokenizer.decode(ids) for ids in last_prompts(collate_packed([row]))]
    assert len(texts) == len(row["seg_lens"]) - (row["num_tokens"] < 64)
    for text in texts:
        assert text.endswith("<|im_start|>assistant\n")
        assert ("不远" not in text) and (text.count("<|im_start|>user") == 1 or "在河边" in text)


def test_自己作答的批没有交叉熵_续训逐位相同(home):
    make_weights()
    # 学习率不随总步数变，半途停下再续才与一口气走完相同
    constant = {"schedule": "wsd", "warmup_ratio": 0.0, "decay_ratio": 0.0}
    options = {"on_policy": 0.5, "max_gen_len": 8, "accumulation_steps": 2, "epochs": 2, **constant}
    lines = log_of(train(**options, max_steps=6))
    shares = [line["on_policy"] for line in lines]
    assert 0 < sum(shares) < len(shares)
    for line in lines:
        if line["on_policy"] == 1:
            assert "ce" not in line
    whole = final_weights(home)
    train(**options, max_steps=3, save_weight="part")
    train(**options, max_steps=6, save_weight="part", from_resume=1)
    for key, value in final_weights(home, "part_32").items():
        if not torch.equal(value, whole[key]):
            pytest.fail(f"{key} 续训后不同，最大差 {(value - whole[key]).abs().max()}")


# ---- 选模型 ----


def test_什么都不说_用最大的教师_学生取一半(home):
    make_weights(hidden_size=128, num_hidden_layers=4)
    make_weights(hidden_size=32)
    teacher, args = chosen()
    assert teacher.path.name == "full_sft_128.pth"
    assert (args.hidden_size, args.num_hidden_layers, args.from_weight) == (64, 2, "none")
    assert args.learning_rate == pytest.approx(1.5 / 64)  # 从头训练
    make_weights("pretrain", hidden_size=64)
    args = chosen()[1]
    assert args.from_weight == "pretrain" and args.learning_rate == pytest.approx(0.5 / 64)
    make_weights(hidden_size=64)
    assert chosen()[1].from_weight == "full_sft"
    assert chosen(from_student_weight="none")[1].from_weight == "none"
    assert chosen(learning_rate=0.01)[1].learning_rate == 0.01


def test_建参数不看磁盘_选模型才看(home):
    args = DistillationArguments()  # 一个权重也没有
    assert args.learning_rate is None and args.from_weight == "none"
    with pytest.raises(UserError, match="没有教师的权重"):
        choose_models(args)
    make_weights(hidden_size=80, num_attention_heads=8)  # 一半是 40，至少补成 64
    assert chosen()[1].hidden_size == 64
    make_weights(hidden_size=176, num_attention_heads=8)  # 一半是 88，不是 16 的倍数
    with pytest.raises(UserError, match="hidden_size"):
        chosen()


def test_公共项目的默认尺寸(home):
    make_weights(hidden_size=768, num_hidden_layers=1, vocab_size=100)
    args = chosen()[1]
    assert (args.hidden_size, args.num_hidden_layers) == (512, 8)


def test_旧项目的权重没有旁注_由形状看出尺寸(home):
    make_weights(use_moe=True)
    (home / "out" / "full_sft_64_moe.json").unlink()
    teacher = chosen(**SMALL)[0]
    assert (teacher.config.hidden_size, teacher.config.num_hidden_layers) == (64, 2)
    assert teacher.config.use_moe and teacher.tokenizer_hash is None


def test_没有教师_说出训练它的命令(home, capsys):
    assert distillation.main(["--data_path", "sft.jsonl"]) == 2
    error = capsys.readouterr().err
    assert "没有教师的权重 full_sft" in error
    assert "train_full_sft.py --hidden_size 768 --num_hidden_layers 16" in error
    make_weights()
    with pytest.raises(UserError, match=r"full_sft_128\.pth；现有 full_sft_64\.pth"):
        chosen(teacher_hidden_size=128)
    with pytest.raises(UserError, match=r"教师有 2 层.*teacher_num_layers 8"):
        chosen(teacher_num_layers=8)


@pytest.mark.parametrize("kind", ["大小", "内容"])
def test_词表不同_说清哪里不同与怎么办(home, kind):
    if kind == "大小":
        make_weights(vocab_size=6500, hash_of_tokenizer=False)
    else:
        make_weights()
        path = home / "out" / "full_sft_64.json"
        sidecar = json.loads(path.read_text())
        path.write_text(json.dumps({**sidecar, "tokenizer_hash": "别的"}))
    words = "6500 与 6400" if kind == "大小" else "分词器不同"
    with pytest.raises(UserError, match=rf"full_sft_64\.pth.*词表对不上.*{words}.*--tokenizer_path"):
        train(max_steps=1)


def test_教师就是学生的起点_报错(home):
    make_weights()
    with pytest.raises(UserError, match="同一个权重"):
        train(student_hidden_size=64, max_steps=1)
    make_weights(hidden_size=32)  # 有别的教师可选就选别的
    assert train(student_hidden_size=64, max_steps=1).step == 1


@pytest.mark.parametrize(
    "changes, flag",
    [({"alpha": 1.5}, "--alpha"), ({"temperature": 0.0}, "--temperature"), ({"jsd_beta": 1.0}, "--jsd_beta")],
)
def test_参数取值不对(home, changes, flag):
    make_weights()
    with pytest.raises(UserError, match=flag):
        DistillationArguments(**changes)


@pytest.mark.parametrize(
    "changes", [{"student_num_layers": 3}, {"student_hidden_size": 48}, {"student_use_moe": 1}]
)
def test_预设与学生的尺寸都写了_报错(home, changes):
    make_weights(hidden_size=64)
    with pytest.raises(UserError, match=f"--{next(iter(changes))}.*--preset tiny"):
        choose_models(DistillationArguments(preset="tiny", **changes))
    args = DistillationArguments(preset="tiny")
    choose_models(args)
    assert args.width == 192


def test_健康的话():
    fine = {"step": 100, "divergence": 0.5, "ce": 1.0}
    assert distillation_health(fine) == []
    assert "不是一回事" in distillation_health({**fine, "divergence": 3.0})[0]
    assert "几乎是零" in distillation_health({**fine, "divergence": 1e-6})[0]
