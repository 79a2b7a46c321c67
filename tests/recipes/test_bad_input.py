"""坏输入：每个配方都用一句中文说清什么错了、在哪里、怎么修，退出码 2，不打印调用栈，也不留下权重。"""

from __future__ import annotations

import json
import os
import shutil

import pytest
from recipe_cases import CASES
from transformers import LlamaConfig, LlamaForCausalLM

from minimind.tokenizer import load_tokenizer

CONVERSATIONS = ("full_sft", "lora", "reason", "distillation")
RL_RECIPES = ("ppo", "grpo", "spo")
LONG = "很长的问题" * 200


def chat(question: str = "问", answer: str = "答") -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write(folder, records) -> str:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return str(path)


def refuse(recipe: str, world, capsys, **changes) -> str:
    """运行一次，必须以退出码 2 和恰好一句“错误：…”结束；返回这一句。"""
    case = CASES[recipe]
    assert case.main()(case.argv(world, **{"val_path": None, "max_steps": 2, **changes})) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("错误：")]
    assert len(error) == 1 and "修复办法" in error[0]
    return error[0]


# ---------------------------------------------------------------- 权重与数据文件


@pytest.mark.parametrize("recipe", [name for name in CASES if name != "pretrain"])
def test_没有起点权重_说出得到它的命令(home, world, capsys, recipe):
    shutil.rmtree(home / "out")
    message = refuse(recipe, world, capsys)
    assert "没有" in message and "python trainer/train_" in message
    assert not (home / "out").exists()


@pytest.mark.parametrize("recipe", CASES)
def test_数据文件不存在(home, world, capsys, recipe):
    assert "nope.jsonl" in refuse(recipe, world, capsys, data_path="nope.jsonl")


@pytest.mark.parametrize("recipe", CASES)
def test_数据文件是空的(home, world, capsys, recipe):
    path = write(home, [])
    assert path in refuse(recipe, world, capsys, data_path=path)


@pytest.mark.parametrize("recipe", CASES)
def test_别种数据_指出行号与字段(home, world, capsys, recipe):
    wrong = {"text": "一段文字"} if recipe != "pretrain" else {"conversations": chat()}
    path = write(home, [wrong])
    message = refuse(recipe, world, capsys, data_path=path)
    assert f"{path}:1" in message and "缺少字段" in message and "换用对应的训练命令" in message


@pytest.mark.parametrize("flag", ["data_path", "val_path"])
@pytest.mark.parametrize("recipe", ["pretrain", "dpo", "grpo"])
def test_数据是文件夹_用其中的数据文件_没有就说出来(home, world, capsys, recipe, flag):
    folder = home / "文件夹"
    folder.mkdir()
    message = refuse(recipe, world, capsys, **{flag: folder})
    assert f"--{flag} {folder}" in message and "里面没有 .jsonl 文件" in message
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        (folder / name).write_text("{}\n")
    assert f"{folder / 'a.jsonl'}:1 字段" in refuse(recipe, world, capsys, **{flag: folder})
    (folder / "data.jsonl").write_text("{}\n")
    assert "同一目录里有 data.jsonl" in refuse(recipe, world, capsys, **{flag: folder / "dta.jsonl"})


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x1f\x8b\x08\x00", "gzip 压缩文件"),
        (b"PK\x03\x04rest", "zip 压缩文件"),
        (bytes(range(256)), "这像是二进制文件"),
        (b'{"text": "\\ud800"}\n', "字段 text：第 1 个字符 \\ud800 是孤立的代理符"),
    ],
)
def test_数据文件不是文本_说出是什么(home, world, capsys, data, words):
    path = home / "data.jsonl"
    path.write_bytes(data)
    message = refuse("pretrain", world, capsys, data_path=path)
    assert words in message and f"{path}:1" in message


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="超级用户什么都读得了")
def test_数据文件没有权限读(home, world, capsys):
    path = home / "data.jsonl"
    path.write_text("{}\n")
    path.chmod(0)
    assert "没有权限读" in refuse("pretrain", world, capsys, data_path=path)


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("tokenizer_path", "nope", "分词器文件夹不存在"),
        ("tokenizer_path", "out/full_sft_64.pth", "是文件，不是文件夹"),
        ("tokenizer_path", "out", "里没有 tokenizer.json"),
        ("from_weight", "out/full_sft_64.pth", "写成 --save_dir out --from_weight full_sft"),
        ("from_weight", "full_sft_64.pth", "写成 --from_weight full_sft"),
        ("from_weight", "nope", "没有权重文件"),
    ],
)
def test_权重与分词器的写法不对_说出那里有什么(home, world, capsys, flag, value, words):
    assert words in refuse("full_sft", world, capsys, **{flag: value})


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("reward_model_path", "out/full_sft_64.pth", "是文件，不是文件夹"),
        ("reward_model_path", "out", "config.json"),
        ("reward", "nope.py:f", "nope.py"),
    ],
)
def test_奖励的路径不对_说出那里有什么(home, world, capsys, flag, value, words):
    changes = {"reward": None} if flag == "reward_model_path" else {}
    assert words in refuse("grpo", world, capsys, **changes, **{flag: value})


# ---------------------------------------------------------------- 取值的边上


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("pretrain", {"max_seq_len": 2, "batch_size": 65536, "seed": 2**63 - 1}),
        ("pretrain", {"hidden_size": 16, "num_hidden_layers": 1, "learning_rate": 0, "log_interval": 0}),
        ("full_sft", {"warmup_ratio": 1, "decay_ratio": 1, "grad_clip": 0, "weight_decay": 100}),
        ("full_sft", {"muon_momentum": 0, "adam_beta2": 0, "val_max_rows": 0, "save_interval": 0}),
        ("lora", {"lora_rank": 16384, "lora_alpha": 1e9, "learning_rate": 0}),
        ("dpo", {"beta": 1000, "label_smoothing": 0.499, "sft_coef": 1000}),
        ("distillation", {"alpha": 1, "temperature": 100, "on_policy": 1, "max_gen_len": 1}),
        ("reason", {"tag_weight": 1000, "embed_lr_scale": 0}),
        ("ppo", {"gamma": 0, "lam": 0, "vf_coef": 0, "kl_coef": 0, "target_kl": 0, "minibatches": 16}),
        ("ppo", {"critic_learning_rate": 0, "clip_epsilon": 1e-9, "value_clip": 1e9, "max_gen_len": 1}),
        (
            "grpo",
            {"num_generations": 2, "epsilon": 0.999, "epsilon_high": 100, "beta": 1000, "temperature": 100},
        ),
        ("grpo", {"temperature": 1e-6, "rollout_slots": 1, "rows_per_forward": 1}),
        ("spo", {"offline_samples": 1, "num_generations": 3, "reward_low": -1e9, "reward_high": 1e9}),
    ],
)
def test_范围边上的值真的训练得起来(home, world, capsys, recipe, changes):
    """或者一句话说清为什么不行；总之没有调用栈。"""
    case = CASES[recipe]
    code = case.main()(case.argv(world, **{"max_steps": 2, **changes}))
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("错误：")]
    assert code == 0 or (code == 2 and len(error) == 1)


# ---------------------------------------------------------------- 偏好


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"chosen": [], "rejected": []}, "chosen"),
        ({"chosen": chat(), "rejected": []}, "rejected"),
        ({"chosen": chat(), "rejected": chat(answer="")}, "rejected[1].content"),
        ({"chosen": chat(), "rejected": chat()}, "完全相同"),
        ({"chosen": chat(), "rejected": chat("换了提问", "别的")}, "两边的提问相同"),
        ({"chosen": chat(), "rejected": chat()[:1]}, "以 assistant 的回答结尾"),
        ({"chosen": chat()}, "rejected"),
    ],
)
def test_偏好不成对_指出是哪一行(home, world, capsys, record, words):
    path = write(home, [{"chosen": chat(answer="好"), "rejected": chat(answer="坏")}, record])
    message = refuse("dpo", world, capsys, data_path=path)
    assert f"{path}:2" in message and words in message


def test_截断后看不出分歧的偏好(home, world, capsys):
    pair = {"chosen": chat(LONG, "好"), "rejected": chat(LONG, "坏")}
    message = refuse("dpo", world, capsys, data_path=write(home, [pair] * 3))
    assert "没有可用的样本" in message and "--max_seq_len" in message


# ---------------------------------------------------------------- 过长


@pytest.mark.parametrize("recipe", CONVERSATIONS)
def test_目标全被截掉(home, world, capsys, recipe):
    path = write(home, [{"conversations": chat(LONG)}] * 3)
    message = refuse(recipe, world, capsys, data_path=path)
    assert path in message and "没有可用的样本" in message and "--max_seq_len" in message


@pytest.mark.parametrize("recipe", RL_RECIPES)
def test_提示比上限长_说出多长才放得下(home, world, capsys, recipe):
    path = write(home, [{"conversations": chat(LONG)}] * 3)
    message = refuse(recipe, world, capsys, data_path=path)
    assert path in message and "都超过 160 个 token" in message and "--max_seq_len" in message


@pytest.mark.parametrize("recipe", RL_RECIPES)
def test_只有几个提示过长_丢弃并说出几个(home, world, capsys, recipe):
    path = write(
        home, [{"conversations": chat(LONG)}] * 2 + [{"conversations": chat(f"第{i}问")} for i in range(6)]
    )
    case = CASES[recipe]
    assert case.main()(case.argv(world, val_path=None, data_path=path, max_steps=1, val_ratio=0)) == 0
    assert "丢弃 2 个超过 160 个 token 的提示" in capsys.readouterr().err


# ---------------------------------------------------------------- 奖励


BAD_REWARDS = {
    "raises": "raise ValueError('看不懂')",
    "divides": "return 1 / 0",
    "nan": "return float('nan')",
    "none": "pass",
    "text": "return '好'",
}


@pytest.fixture(scope="module")
def bad_rewards(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "bad.py"
    path.write_text("".join(f"def {name}(p, r, ref):\n    {body}\n" for name, body in BAD_REWARDS.items()))
    return path


@pytest.mark.parametrize(
    ("recipe", "name", "words"),
    [
        *[(recipe, "raises", "ValueError 看不懂") for recipe in RL_RECIPES],
        *[(recipe, "nan", "返回 nan") for recipe in RL_RECIPES],
        ("grpo", "divides", "ZeroDivisionError"),
        ("grpo", "none", "忘了 return"),
        ("grpo", "text", "让它返回一个 float"),
    ],
)
def test_奖励出错_指出样本(home, world, bad_rewards, capsys, recipe, name, words):
    path = write(home, [{"conversations": chat(f"第{i}问")} for i in range(6)])
    message = refuse(recipe, world, capsys, data_path=path, val_ratio=0, reward=f"{bad_rewards}:{name}")
    assert words in message and f"{path}:" in message
    assert "'第" in message and "回答" in message  # 提示与回答的开头
    assert not list((home / "out").glob(f"{CASES[recipe].weight}_*"))


@pytest.mark.parametrize("recipe", RL_RECIPES)
def test_验证时奖励出错_指出验证文件里的样本(home, world, capsys, recipe):
    reward = home / "picky.py"
    reward.write_text("def score(p, r, ref):\n    return 1.0 if p.startswith('训练') else None\n")
    train = write(home, [{"conversations": chat(f"训练{i}")} for i in range(4)])
    val = home / "val.jsonl"
    val.write_text(json.dumps({"conversations": chat("留出")}, ensure_ascii=False) + "\n", encoding="utf-8")
    message = refuse(recipe, world, capsys, data_path=train, val_path=val, reward=f"{reward}:score")
    assert f"{val}:1" in message and "'留出'" in message


@pytest.mark.parametrize("recipe", RL_RECIPES)
def test_没有参考答案也没有奖励模型(home, world, capsys, recipe):
    path = write(home, [{"conversations": chat(f"第{i}问", "")} for i in range(6)])
    message = refuse(recipe, world, capsys, data_path=path, reward=None)
    assert f"{path}:" in message and "没有参考答案" in message and "--reward_model_path" in message


@pytest.mark.parametrize("recipe", RL_RECIPES)
def test_奖励模型是语言模型(home, world, capsys, recipe, tmp_path):
    folder = tmp_path / "causal"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=6400, **sizes)).save_pretrained(folder)
    load_tokenizer().save_pretrained(folder)
    message = refuse(recipe, world, capsys, reward=None, reward_model_path=folder)
    assert "这不是奖励模型" in message and "LlamaForCausalLM" in message and str(folder) in message


@pytest.mark.parametrize("recipe", RL_RECIPES)
def test_奖励模型目录不存在(home, world, capsys, recipe):
    message = refuse(recipe, world, capsys, reward=None, reward_model_path="no_such_model")
    assert "目录不存在" in message and "no_such_model" in message


@pytest.mark.parametrize("recipe", RL_RECIPES)
def test_奖励的写法不对(home, world, capsys, recipe):
    assert "没有这条奖励 'exakt:1'" in refuse(recipe, world, capsys, reward="exakt:1")


def test_SPO_不知道奖励的范围(home, world, capsys):
    message = refuse("spo", world, capsys, reward_low=None, reward_high=None)
    assert "--reward_low 0 --reward_high 1" in message


def test_GRPO_一题只答一次没有得比(home, world, capsys):
    case = CASES["grpo"]
    assert case.main()(case.argv(world, num_generations=1)) == 2
    assert "--num_generations" in capsys.readouterr().err


# ---------------------------------------------------------------- 教师


@pytest.mark.parametrize(
    ("sidecar", "words"),
    [({"config": {"vocab_size": 5000}}, "词表大小 5000 与 6400"), ({"tokenizer_hash": "别的"}, "词表一样大，但分词器不同")],
)  # fmt: skip
def test_教师的词表不同(home, world, capsys, sidecar, words):
    path = home / "out" / "teacher_128.json"
    known = json.loads(path.read_text())
    known["config"] |= sidecar.get("config", {})
    path.write_text(json.dumps({**known, **{k: v for k, v in sidecar.items() if k != "config"}}))
    message = refuse("distillation", world, capsys)
    assert words in message and "teacher_128.pth" in message


def test_没有这个教师(home, world, capsys):
    message = refuse("distillation", world, capsys, from_teacher_weight="nobody")
    assert "没有教师的权重 nobody" in message and "python trainer/train_pretrain.py" in message
