"""命令行参数：每个命令的每个参数都有取值范围，乱写的值得到一句说清的话，不认识的参数得到建议。"""

from __future__ import annotations

import dataclasses
import math
import typing

import pytest
from command_classes import argument_classes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minimind import arguments, cli
from minimind.arguments import Arguments, arg, check_value, convert, declared, flag_of, parse_args
from minimind.demo.arguments import SIZES
from minimind.errors import UserError
from minimind.model import PRESETS

WILD = (
    "-1", "0", "-0.0", "0.0", "1", "2", "1.5", "-1e-3", "5", "1e309", "inf", "-inf", "nan", "NaN", str(10**12), "9" * 5000,
    "", " ", "a/b", "..", "../x", "a\\b", "\0", "a\0b", "x" * 5000, "名" * 300, "**", "[", "\udcff", "\n", "１２", "٣",
    "True", "no", "None", "null", "none", "0x10", "1_0", "1e1", "3.0", "out/pretrain_512.pth", "http://", "cuda:²", "{}",
)  # fmt: skip


@pytest.fixture(scope="module")
def commands() -> dict[str, type]:
    return argument_classes()


def kind_of(cls: type, name: str) -> type:
    return arguments._base_type(typing.get_type_hints(cls)[name])


def test_每个命令都用声明式的参数(commands):
    assert set(commands) == set(cli.COMMANDS)
    assert all(issubclass(cls, Arguments) for cls in commands.values())


def test_每个参数都声明了取值范围(commands):
    """新添的参数没有范围，这里按名字报出来。"""
    missing = []
    for command, cls in commands.items():
        for field in declared(cls):
            rules, kind = field.metadata, kind_of(cls, field.name)
            if kind is bool or rules["choices"]:
                continue
            known = rules["range"].complete if kind in (int, float) else rules["text"] or rules["pattern"]
            if not known:
                missing.append(f"{command} {flag_of(field)}")
    assert not missing, f"没有写范围：{missing}"


def test_默认值都在自己的范围里(commands):
    for cls in commands.values():
        for field in declared(cls):
            values = field.default if isinstance(field.default, tuple) else (field.default,)
            for value in values:
                if value is not None and not (field.metadata["metavar"] and value == ""):
                    check_value(field, value)


def read(field: dataclasses.Field, kind: type, text: str):
    """照命令行的次序：先转换，再查范围。"""
    value = convert(field, kind, text)
    check_value(field, value)
    return value


def assert_sensible(field: dataclasses.Field, kind: type, text: str) -> None:
    """要么是一句点名的话，要么是说得通的值。"""
    flag, rules = flag_of(field), field.metadata
    try:
        value = read(field, kind, text)
    except UserError as error:
        message = str(error)
        assert message.startswith(f"{flag}：") and "期望：" in message and "修复办法：" in message
        assert "\n" not in message and "\0" not in message and len(message) < 600
        message.encode("utf-8")  # 打印得出来
        return
    if rules["choices"]:
        assert value in rules["choices"]
    elif kind in (int, float):
        assert text.isascii() and type(value) is kind and math.isfinite(value) and abs(value) < 2**63
        assert value == float(text) and math.copysign(1, value) == (-1 if value < 0 else 1)
    else:
        assert "\0" not in value and (value.strip() or rules["text"] == "any")
        if rules["text"] == "name":
            assert (
                not set(value) & set("/\\*?[\n") and len(value.encode()) <= 200 and value not in (".", "..")
            )


def test_乱写的值要么是一句话要么说得通(commands):
    for cls in commands.values():
        for field in declared(cls):
            kind = kind_of(cls, field.name)
            if kind is not bool:
                for text in WILD:
                    assert_sensible(field, str if typing.get_origin(kind) else kind, text)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_随便抽的命令参数与值_整条命令行也不出调用栈(commands, data, tmp_path):
    command = data.draw(st.sampled_from(sorted(commands)))
    cls = commands[command]
    field = data.draw(st.sampled_from(declared(cls)))
    wild = st.one_of(
        st.sampled_from(WILD), st.text(max_size=20), st.floats().map(repr), st.integers().map(str)
    )
    words = [f"--{field.name}", data.draw(wild)] if not field.metadata["metavar"] else [data.draw(wild)]
    if data.draw(st.booleans()) and len(words) == 2:
        words = ["=".join(words)]
    required = [
        f for f in declared(cls) if f.metadata["metavar"] and f.default in ("", ()) and f is not field
    ]
    try:
        args = parse_args(cls, [*words, *("x" for _ in required)], prog=f"minimind {command}")
    except UserError as error:
        assert "\n" not in str(error)
    except SystemExit as error:
        assert words[0] in ("-h", "--help") and error.code == 0
    else:
        assert isinstance(args, cls)


REFUSED = [
    ("pretrain", "num_workers", "-1"), ("pretrain", "adam_beta2", "1.5"), ("pretrain", "hidden_size", "0"),
    ("pretrain", "hidden_size", "100"), ("pretrain", "seed", "-1"), ("pretrain", "max_seq_len", "40000"),
    ("pretrain", "num_hidden_layers", "0"), ("pretrain", "muon_momentum", "1.5"), ("pretrain", "learning_rate", "inf"),
    ("pretrain", "learning_rate", "nan"), ("pretrain", "epochs", "0"), ("pretrain", "batch_size", "0"),
    ("pretrain", "save_weight", "a/b"), ("pretrain", "device", "gpu"), ("pretrain", "preset", "huge"),
    ("pretrain", "val_ratio", "1"), ("pretrain", "use_moe", "True"), ("pretrain", "data_path", ""),
    ("sft", "from_weight", "out/pretrain_512.pth"), ("lora", "lora_rank", "0"), ("lora", "lora_alpha", "inf"),
    ("lora", "lora_name", "../x"), ("dpo", "label_smoothing", "0.5"), ("dpo", "beta", "0"),
    ("distill", "alpha", "1.1"), ("distill", "jsd_beta", "1"), ("distill", "student_hidden_size", "0"),
    ("distill", "teacher_num_layers", "-1"), ("reason", "tag_weight", "-1"), ("ppo", "lam", "5"),
    ("ppo", "gamma", "-0.1"), ("ppo", "minibatches", "0"), ("grpo", "epsilon", "-1"), ("grpo", "epsilon_high", "nan"),
    ("grpo", "num_generations", "1"), ("spo", "offline_samples", "-1"), ("spo", "reward_low", "inf"),
    ("grpo", "temperature", "0"), ("grpo", "rollout_url", "127.0.0.1:8000"), ("demo", "scale", "0"),
    ("demo", "stages", "pretrian"), ("demo", "preset", "big"), ("demo", "seed", "-1"), ("chat", "top_p", "0"),
    ("chat", "min_p", "1"), ("chat", "max_new_tokens", "0"), ("chat", "historys", "-2"), ("chat", "tool_rounds", "0"),
    ("chat", "weight", "out/full_sft"), ("chat", "prompt", " "), ("serve", "port", "70000"), ("serve", "max_slots", "0"),
    ("serve", "request_seconds", "-1"), ("serve", "host", "http://x"), ("serve", "max_queue", "-1"),
    ("eval choice", "limit", "-1"), ("eval choice", "scoring", "words"), ("eval gsm", "shots", "1"),
    ("eval bpb", "max_length", "1"), ("eval bpb", "max_length", "1000000000"), ("eval world", "batch_size", "0"), ("eval tools", "max_length", "-1"),
    ("data make-microworld", "scale", "nan"), ("tokenizer train", "vocab_size", "0"),
    ("watch", "port", "70000"), ("watch", "host", "http://x"), ("watch", "save_dir", " "), ("pretrain", "watch", "2"), ("pretrain", "sample_prompts", ""),
    ("report", "weight", "a/b"), ("export lora", "hidden_size", "0"), ("export merge", "save_weight", "a/b"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "name", "value"), REFUSED)
def test_没有意义的值都不收(commands, tmp_path, monkeypatch, command, name, value):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"--{name}"):
        parse_args(commands[command], [f"--{name}={value}"])


@pytest.mark.parametrize(
    ("command", "argv", "words"),
    [
        ("pretrain", "--schedule wsd --warmup_ratio 0.5 --decay_ratio 0.6", "合起来是 1.1"),
        ("grpo", "--max_seq_len 32768", "合起来是 32896"),
        ("ppo", "--batch_size 1 --accumulation_steps 2 --minibatches 3", "一步采样的 2 条"),
        ("spo", "--reward_low 1 --reward_high 0", "低的在前"),
        ("eval choice", "--shots 2", "--dev_path"),
    ],
)
def test_参数之间也要说得通(commands, command, argv, words):
    with pytest.raises(UserError, match=words):
        parse_args(commands[command], argv.split())


ACCEPTED = [
    ("pretrain", "hidden_size", "64", 64), ("pretrain", "learning_rate", "0", 0.0), ("pretrain", "grad_clip", "-0.0", 0.0),
    ("pretrain", "use_moe", "1", 1), ("pretrain", "device", "CUDA:1", "CUDA:1"), ("ppo", "lam", "1", 1.0),
    ("pretrain", "val_ratio", "0", 0.0), ("chat", "temperature", "0", 0.0), ("chat", "lora_weight", "a,out/lora/b_512.pth",
    "a,out/lora/b_512.pth"), ("pretrain", "save_weight", "我的模型", "我的模型"), ("pretrain", "max_seq_len", "32768", 32768),
    ("tokenizer train", "exclude_tags", "", ""), ("spo", "reward_low", "-1.5", -1.5), ("pretrain", "learning_rate", "1e-3", 1e-3),
]  # fmt: skip


@pytest.mark.parametrize(("command", "name", "value", "expected"), ACCEPTED)
def test_有意义的边界照收(commands, command, name, value, expected):
    assert getattr(parse_args(commands[command], [f"--{name}", value]), name) == expected


@pytest.mark.parametrize(
    ("command", "argv", "words"),
    [
        ("pretrain", "--batch_szie 4", r"--batch_szie：没有这个参数；是不是 --batch_size？"),
        ("pretrain", "--batch_szie=4", r"是不是 --batch_size？"),
        ("pretrain", "--lr 1e-3", r"--lr：没有这个参数；是不是 --learning_rate？"),
        ("demo", "--lr 1e-3", r"是不是 --pretrain_lr？"),
        ("pretrain", "-hidden_size 64", r"-hidden_size：没有这个参数；是不是 --hidden_size？"),
        ("pretrain", "--gradient-accumulation-steps 2", r"是不是 --accumulation_steps？"),
        ("chat", "--max_length 5", r"是不是 --max_new_tokens？"),
        ("serve", "--model x", r"是不是 --weight？"),
        ("pretrain", "--zzzzzz 1", r"--zzzzzz：没有这个参数；修复办法：用 .*--help"),
        ("pretrain", "--foo 1 --batch_szie 2", r"--foo、--batch_szie（是不是 --batch_size）：没有这个参数"),
        ("pretrain", "data.jsonl", r"多出来的 'data.jsonl'"),
        ("pretrain", "--epochs", r"--epochs：没有给值"),
        ("pretrain", "--epochs --max_steps 1", r"--epochs：没有给值"),
        ("pretrain", "--epochs abc", r"--epochs：值是 'abc'；期望：整数"),
        ("pretrain", "--epochs 1e1", r"改成 10"),
        ("pretrain", "--epochs １２", r"改成 12"),
        ("pretrain", "--learning_rate abc", r"--learning_rate：值是 'abc'；期望：数"),
        ("pretrain", "--learning_rate -1e-3", r"--learning_rate：值是 -0.001；期望：0 到 1"),
        ("pretrain", "--use_moe true", r"--use_moe：值是 'true'；期望：0、1；修复办法：改成 1"),
        ("pretrain", "--optimizer Adam", r"期望：muon、adamw；修复办法：改成 adamw"),
        ("pretrain", "--from_weight out/pretrain_512.pth", r"写成 --save_dir out --from_weight pretrain"),
        ("export hf", "full_sft", r"少了位置参数 目录"),
        ("export hf", "a b --force=1", r"--force：这个开关不带值"),
        ("tokenizer eval", "", r"少了位置参数 文件"),
        ("data download", "--lsit", r"是不是 --list？"),
    ],
)
def test_写错的命令行得到一句中文(commands, command, argv, words):
    with pytest.raises(UserError, match=words) as caught:
        parse_args(commands[command], argv.split(), prog=f"minimind {command}")
    for english in ("argument", "invalid", "unrecognized", "expected", "required"):
        assert english not in str(caught.value)


def test_说明里写着默认值与范围(commands):
    text = " ".join(arguments.build_parser(commands["ppo"]).format_help().split())
    assert "GAE 的 lambda（默认 0.95；0 到 1）" in text
    assert "（默认 1；1 到 1024）" in text


def test_从代码里建的参数也查():
    @dataclasses.dataclass
    class Two(Arguments):
        share: float = arg(0.5, "比例", low=0, high=1)

    assert Two(share=1).share == 1
    with pytest.raises(UserError, match="--share：值是 2；期望：0 到 1"):
        Two(share=2)


def test_演示的尺寸就是预设的():
    assert tuple(PRESETS) == SIZES
