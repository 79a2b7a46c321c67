"""公共项目的参数：每个命令的每个名字都照它的意思收下，或用一句话说改用什么，没有收下而不起作用的。"""

from __future__ import annotations

import pytest
from command_classes import argument_classes

from minimind.arguments import build_parser, declared, parse_args
from minimind.errors import UserError
from minimind.model.model_minimind import _LAYOUT_DEFAULTS
from minimind.model_arguments import ARCHS
from minimind.public_flags import ACCEPTED, REFUSED, accepted

TRAIN = """save_dir save_weight epochs batch_size learning_rate device dtype num_workers accumulation_steps grad_clip
log_interval save_interval hidden_size num_hidden_layers use_moe max_seq_len data_path from_weight from_resume use_wandb
wandb_project use_compile"""
RL = """max_gen_len reward_model_path debug_mode debug_interval thinking_ratio rollout_engine sglang_base_url sglang_model_path
sglang_shared_path"""
OPEN = "load_from save_dir weight hidden_size num_hidden_layers use_moe device"
# 公共项目各脚本的全部参数（trainer/train_*.py、eval_llm.py、scripts/*.py 现在的与上一代的 spo、reason）
PUBLIC = {
    "pretrain": TRAIN,
    "sft": TRAIN,
    "lora": f"{TRAIN.replace('save_weight', '')} lora_name",
    "dpo": f"{TRAIN} beta",
    "reason": TRAIN,
    "distill": """save_dir save_weight epochs batch_size learning_rate device dtype num_workers accumulation_steps grad_clip
        log_interval save_interval max_seq_len data_path student_hidden_size student_num_layers teacher_hidden_size
        teacher_num_layers student_use_moe teacher_use_moe from_student_weight from_teacher_weight from_resume alpha
        temperature use_wandb wandb_project use_compile""",
    "ppo": f"""{TRAIN} {RL} critic_learning_rate clip_epsilon vf_coef kl_coef gamma lam cliprange_value ppo_update_iters
        early_stop_kl mini_batch_size debug_log_ratio update_old_actor_freq reasoning""",
    "grpo": f"{TRAIN} {RL} num_generations beta loss_type epsilon epsilon_high reasoning",
    "spo": f"{TRAIN} max_gen_len beta reasoning reward_model_path",
    "agent": f"{TRAIN} {RL} num_generations beta loss_type epsilon epsilon_high max_total_len",
    "chat": f"""{OPEN} lora_weight inference_rope_scaling max_new_tokens temperature top_p open_thinking historys show_speed""",
    "serve": f"{OPEN} lora_weight max_seq_len inference_rope_scaling",
    "eval tools": f"{OPEN} backend max_new_tokens temperature top_p show_speed api_base_url api_key api_model stream",
}  # fmt: skip
# 公共项目里合理的值，数与文字各不相同
VALUES = {
    "save_dir": "../out", "save_weight": "mine", "device": "cpu", "dtype": "bfloat16", "data_path": "x.jsonl", "use_wandb": "",
    "from_weight": "full_sft", "wandb_project": "P", "learning_rate": "3e-7", "grad_clip": "0.5", "hidden_size": "768", "use_moe": "1",
    "from_resume": "1", "use_compile": "1", "max_seq_len": "340", "reward_model_path": "../rm", "debug_mode": "",
    "debug_log_ratio": "", "thinking_ratio": "0.9", "rollout_engine": "sglang", "sglang_base_url": "http://localhost:7000",
    "sglang_model_path": "../model", "sglang_shared_path": "./ckpt", "lora_name": "lora_medical", "beta": "0.15",
    "from_student_weight": "none", "from_teacher_weight": "full_sft", "alpha": "0.5", "temperature": "1.5", "clip_epsilon": "0.3",
    "vf_coef": "0.4", "kl_coef": "0.03", "gamma": "0.9", "lam": "0.9", "cliprange_value": "0.3", "early_stop_kl": "0.25",
    "critic_learning_rate": "5e-7", "loss_type": "cispo", "epsilon": "0.1", "epsilon_high": "5.0", "reasoning": "1",
    "load_from": "model", "weight": "dpo", "lora_weight": "lora_identity", "inference_rope_scaling": "", "top_p": "0.95",
    "open_thinking": "1", "historys": "2", "show_speed": "0", "backend": "api", "api_base_url": "http://localhost:1/v1",
    "api_key": "sk-123", "api_model": "m", "student_use_moe": "1", "teacher_use_moe": "0", "student_hidden_size": "768",
    "teacher_hidden_size": "768", "max_total_len": "3000",
}  # fmt: skip
CASES = [(command, name) for command, names in PUBLIC.items() for name in names.split()]


@pytest.fixture(scope="module")
def commands() -> dict[str, type]:
    return argument_classes()


@pytest.mark.parametrize(("command", "name"), CASES)
def test_公共项目的每个参数都收下并起作用_或说出改用什么(commands, command, name):
    cls = commands[command]
    value = VALUES.get(name, "3")
    argv = [f"--{name}", *([value] if value else [])]
    names = {field.name for field in declared(cls)}
    if name not in names and name not in accepted(names):
        with pytest.raises(UserError, match=r"公共项目的参数，这里没有；修复办法：.") as caught:
            parse_args(cls, argv, prog=f"minimind {command}")
        assert str(caught.value).startswith(f"--{name}：")
        return
    after = parse_args(cls, argv)
    if name in names:
        got, want = getattr(after, name), value or "1"
        assert str(got) == want or float(got) == float(want)
    else:
        before = parse_args(cls, [])
        assert any(getattr(before, key) != getattr(after, key) for key in names)


@pytest.mark.parametrize(
    ("command", "argv", "expected"),
    [
        ("ppo", "--cliprange_value 0.3", {"value_clip": 0.3}),
        ("ppo", "--cliprange-value=0.3", {"value_clip": 0.3}),
        ("ppo", "--ppo_update_iters 4", {"ppo_epochs": 4}),
        ("ppo", "--early_stop_kl 0.25", {"target_kl": 0.25}),
        # 一步采样 2 × 64 × 1 = 128 条，每个小批 2 条
        ("ppo", "--mini_batch_size 2", {"minibatches": 64}),
        ("ppo", "--mini_batch_size 3 --batch_size 2 --accumulation_steps 4", {"minibatches": 3}),
        ("ppo", "--mini_batch_size 500", {"minibatches": 1}),
        ("grpo", "--rollout_engine torch", {"rollout_url": None, "rollout_kind": "auto"}),
        (
            "grpo",
            "--rollout_engine sglang",
            {"rollout_url": "http://localhost:8998", "rollout_kind": "sglang"},
        ),
        (
            "grpo",
            "--rollout_engine sglang --sglang_base_url http://gpu:1",
            {"rollout_url": "http://gpu:1", "rollout_kind": "sglang"},
        ),
        ("spo", "--sglang_base_url http://gpu:1", {"rollout_url": "http://gpu:1", "rollout_kind": "sglang"}),
        ("ppo", "--sglang_shared_path ./ckpt", {"rollout_weights_dir": "./ckpt"}),
        ("serve", "--max_seq_len 4096", {"max_length": 4096}),
        ("pretrain", "--max_seq_len 340", {"max_seq_len": 340}),
        (
            "agent",
            "--max_total_len 3000 --thinking_ratio 0.1 --debug_mode --debug_interval 5 --loss_type cispo",
            {"max_total_len": 3000, "thinking_ratio": 0.1, "debug_mode": 1, "debug_interval": 5},
        ),
        ("ppo", "--value_clip 0.3 --cliprange_value 0.3", {"value_clip": 0.3}),
    ],
)
def test_公共项目的叫法是什么意思(commands, command, argv, expected):
    args = parse_args(commands[command], argv.split())
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("command", "argv", "words"),
    [
        (
            "ppo",
            "--value_clip 0.1 --cliprange_value 0.3",
            "--cliprange_value 0.3：与 --value_clip 0.1 说的不一样",
        ),
        ("ppo", "--minibatches 4 --mini_batch_size 2", "--mini_batch_size 2：与 --minibatches 4"),
        ("ppo", "--cliprange_value -1", "^--cliprange_value：值是 -1.0；期望：大于 0"),
        ("ppo", "--mini_batch_size 0", "^--mini_batch_size：值是 0；期望：1 到 65536"),
        ("ppo", "--mini_batch_size two", "^--mini_batch_size：值是 'two'；期望：整数"),
        ("ppo", "--mini_batch_size", "^--mini_batch_size：没有给值"),
        ("grpo", "--rollout_engine vllm", "^--rollout_engine：值是 'vllm'；期望：torch、sglang"),
        (
            "grpo",
            "--rollout_engine torch --sglang_base_url http://gpu:1",
            "在本进程里采样，却又给了采样服务的网址",
        ),
        ("grpo", "--rollout_engine sglang --rollout_kind vllm", "与 --rollout_kind vllm 说的不一样"),
        ("grpo", "--sglang_base_url localhost:8998", "^--sglang_base_url：不是网址"),
        ("grpo", "--thinking-ratio 0.9", "^--thinking-ratio：.*改用 --reasoning 1"),
        ("pretrain", "--ddp", "torchrun"),
        # 这个命令用不上的叫法，不收也不当作公共的
        ("pretrain", "--cliprange_value 0.3", "^--cliprange_value：没有这个参数"),
        ("grpo", "--mini_batch_size 2", "^--mini_batch_size：没有这个参数"),
        ("pretrain", "--thinking_ratio 0.9", "^--thinking_ratio：没有这个参数"),
        ("pretrain", "--batchsize 4", "是不是 --batch_size？"),
    ],
)
def test_说不通的公共叫法得到一句话(commands, command, argv, words):
    with pytest.raises(UserError, match=words):
        parse_args(commands[command], argv.split(), prog=f"minimind {command}")


def test_一个名字只在一张表里_都有命令用得上(commands):
    assert not set(ACCEPTED) & set(REFUSED)
    fields = [{field.name for field in declared(cls)} for cls in commands.values()]
    for name in ACCEPTED:
        assert any(name in accepted(names) for names in fields), name
    for name, (on, _) in REFUSED.items():
        assert any(on in names and name not in names for names in fields), name


def test_说明里写着公共项目的叫法(commands):
    text = build_parser(commands["ppo"]).format_help()
    for name in accepted({field.name for field in declared(commands["ppo"])}):
        assert f"--{name} " in text
    assert "公共项目" not in build_parser(commands["pretrain"]).format_help()


def test_参数多的命令分组列出_自己的在前(commands):
    for command, cls in commands.items():
        fields = [field for field in declared(cls) if not field.metadata["metavar"]]
        if len(fields) > 10:
            loose = [field.name for field in fields if not field.metadata["group"]]
            assert not loose, f"{command} 没有分组：{loose}"
    text = build_parser(commands["grpo"]).format_help()
    heads = [line[:-1] for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert heads == ["选项", "GRPO", "采样", "奖励", "模型", "数据", "训练量", "优化", "设备", "存档与日志"]
    assert "--batch-size" not in text  # 两种写法都收，只列一种


def test_布局的名字就是模型有的():
    assert tuple(_LAYOUT_DEFAULTS) == ARCHS
