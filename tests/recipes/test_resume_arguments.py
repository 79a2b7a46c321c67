"""续训时参数或文件变了：决定结果的拒绝，可以换的说出后果，其余无关；十个配方的每个参数都走一遍。"""

from __future__ import annotations

import importlib
import json
import re
import shutil

import pytest
import torch
from recipe_cases import CASES, run_recipe, saved, weights_file
from trainer_helpers import assert_same_weights, in_processes

from minimind.arguments import RESUME, declared
from minimind.errors import UserError
from minimind.trainer.archive import options_of
from minimind.trainer.resume import changes, check_arguments

pytestmark = pytest.mark.usefixtures("cache")
RECIPES = list(CASES)
# 不影响训练出的权重的，一个个写在这里：新加的参数没有写进来，就必须核对
HARMLESS = {
    "save_dir", "save_weight", "checkpoint_dir", "log_interval", "save_interval", "num_workers", "from_resume",
    "eval_interval", "keep_checkpoints", "sample_prompts", "watch", "tracker", "use_wandb", "wandb_project", "lora_name", "rollout_kind",
    "rollout_weights_dir", "trust_remote_code", "checkpoint_layers", "debug_mode", "debug_interval",
}  # fmt: skip
NOTED = {
    "epochs", "max_steps", "batch_size", "accumulation_steps", "learning_rate", "schedule", "warmup_ratio",
    "decay_ratio", "grad_clip", "device", "dtype", "val_max_rows", "critic_learning_rate", "rollout_url",
}  # fmt: skip
ROUNDING = {"use_compile", "rollout_slots", "rows_per_forward", "cache_reference"}
CONTENT = {
    "preset", "hidden_size", "num_hidden_layers", "use_moe", "arch", "tokenizer_path", "data_path", "on_bad_line",
    "val_path", "reward", "reward_model_path", "tools", "student_hidden_size", "student_num_layers", "student_use_moe",
    "from_student_weight", "teacher_hidden_size", "teacher_num_layers", "teacher_use_moe", "from_teacher_weight",
}  # fmt: skip
KINDS = {"harmless": HARMLESS, "noted": NOTED, "rounding": ROUNDING, "content": CONTENT}


def arguments(recipe: str) -> type:
    module = importlib.import_module(f"minimind.recipes.{recipe}")
    return next(
        v for k, v in vars(module).items() if k.endswith("Arguments") and v.__module__ == module.__name__
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_每个参数都声明了续训时怎么办_没声明的要核对(recipe):
    for field in declared(arguments(recipe)):
        want = next((kind for kind, names in KINDS.items() if field.name in names), "compared")
        assert field.metadata["resume"] == want, f"{recipe} --{field.name}"
        assert want in RESUME


@pytest.mark.parametrize("recipe", RECIPES)
def test_每个参数变了_按声明的拒绝或放行(recipe):
    cls = arguments(recipe)
    values = {f.name: f.default for f in declared(cls)}
    for field in declared(cls):
        now = object.__new__(cls)  # 不查取值：每个参数都换成同一个不可能的值
        vars(now).update({**values, field.name: "换了"})
        kind = field.metadata["resume"]
        found = changes(values, now)
        assert found == {kind: {field.name: (field.default, "换了")}}
        if kind == "compared":
            with pytest.raises(UserError, match=f"--{field.name} 存档里是 .*现在是 '换了'"):
                check_arguments(found, "x")
        else:
            check_arguments(found, "x")


def run(folder, recipe, world, log="log.txt", code=0, **changes) -> str:
    case, path = CASES[recipe], folder / log
    path.unlink(missing_ok=True)
    argv = case.argv(world, **changes)
    codes = in_processes(1, run_recipe, log=path, case=case, folder=folder, argv=argv)
    text = path.read_text()
    assert codes == [code], text[-3000:]
    return text


@pytest.fixture(scope="module")
def trained(base, world, tmp_path_factory, cache_folder):
    """各配方训练两步的目录，用到才训练。"""
    done = {}

    def get(recipe):
        if recipe not in done:
            done[recipe] = shutil.copytree(base, tmp_path_factory.mktemp("trained") / recipe)
            run(done[recipe], recipe, world, max_steps=2)
        return done[recipe]

    return get


REFUSED = [
    ("ppo", {"kl_coef": 0.5}),
    ("ppo", {"clip_epsilon": 0.1}),
    ("ppo", {"gamma": 0.9}),
    ("ppo", {"temperature": 0.7}),
    ("ppo", {"num_generations": 2}),
    ("grpo", {"reward": "length(1-9)"}),
    ("grpo", {"beta": 0.1}),
    ("spo", {"reward_high": 2}),
    ("dpo", {"beta": 0.3}),
    ("distillation", {"alpha": 0.9}),
    ("lora", {"lora_alpha": 4}),
    ("reason", {"tag_weight": 2}),
    ("full_sft", {"from_weight": "none"}),
]


@pytest.mark.parametrize(("recipe", "change"), REFUSED)
def test_决定结果的参数变了_拒绝并写出两边的值(tmp_path, trained, world, recipe, change):
    folder = shutil.copytree(trained(recipe), tmp_path / "run")
    text = run(folder, recipe, world, code=2, max_steps=3, from_resume=1, **change)
    ((name, value),) = change.items()
    where = "奖励" if name == "reward" else f"--{name}"
    assert re.search(rf"{where} 存档里是 .*、现在是 ", text) and str(value) in text
    assert "Traceback" not in text
    assert saved(folder, CASES[recipe])["step"] == 2


def test_奖励函数的文件改了_拒绝(tmp_path, trained, world):
    folder = shutil.copytree(trained("grpo"), tmp_path / "run")
    moved, other = tmp_path / "moved.py", tmp_path / "other.py"
    shutil.copy(world / "reward.py", moved)
    other.write_text((world / "reward.py").read_text().replace("% 7", "% 5"))
    options = {"max_steps": 3, "from_resume": 1}
    assert "奖励 存档里是" in run(folder, "grpo", world, code=2, reward=f"{other}:score", **options)
    run(folder, "grpo", world, reward=f"{moved}:score", **options)  # 只是换了地方


def test_教师的权重变了_拒绝(tmp_path, trained, world):
    folder = shutil.copytree(trained("distillation"), tmp_path / "run")
    path = folder / "out" / "teacher_128.pth"
    state = torch.load(path, weights_only=True)
    state["model.norm.weight"] = state["model.norm.weight"] * 1.5
    torch.save(state, path)
    text = run(folder, "distillation", world, code=2, max_steps=3, from_resume=1)
    assert "教师 存档里是" in text


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("ppo", {}),
        ("grpo", {"beta": 0.1}),
        ("spo", {"beta": 0.1}),
        ("dpo", {}),
        ("dpo", {"cache_reference": 0}),
    ],
)
def test_起点与存盘同名_续训逐位相同(tmp_path, base, world, recipe, options):
    """存盘改写了起点的文件；参考模型要仍是最初的那个。"""
    whole, parts = (shutil.copytree(base, tmp_path / name) for name in ("whole", "parts"))
    options = {**options, "save_weight": "full_sft", "from_weight": "full_sft", "learning_rate": 1e-2}
    case = CASES[recipe]
    run(whole, recipe, world, **options)
    steps = options | {"max_steps": 5, "save_interval": 2}
    path = parts / "log.txt"
    codes = in_processes(
        1, stop_after, step=3, log=path, case=case, folder=parts, argv=case.argv(world, **steps)
    )
    assert codes == [143], path.read_text()[-3000:]
    run(parts, recipe, world, from_resume=1, **steps)
    models = [
        torch.load(f / "checkpoints" / "full_sft_64_resume.pth", weights_only=True)["model"]
        for f in (whole, parts)
    ]
    assert_same_weights(*models)


def stop_after(step: int, **kwargs) -> None:
    """完成 ``step`` 步之后收到 SIGTERM。"""
    import os
    import signal

    from minimind.trainer import loop

    original = loop.update_weights

    def update_weights(run, *rest):
        if run.state.step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(run, *rest)

    loop.update_weights = update_weights
    run_recipe(**kwargs)


def test_换了价值网络的学习率_真的起作用_并说出后果(tmp_path, trained, world):
    folder = shutil.copytree(trained("ppo"), tmp_path / "run")
    text = run(folder, "ppo", world, max_steps=3, from_resume=1, critic_learning_rate=0.05)
    assert re.search(r"--critic_learning_rate 由 \S+ 改为 0.05", text)
    assert re.search(r"学习率（critic）从 \S+ 跳到 \S+", text)
    adamw = saved(folder, CASES["ppo"])["optimizer"]["adamw"]["param_groups"]
    assert {round(group["lr_scale"] * 0.06 / 64, 6) for group in adamw} == {round(0.06 / 64, 6), 0.05}


def test_只差舍入的参数变了_说一声(tmp_path, trained, world):
    folder = shutil.copytree(trained("grpo"), tmp_path / "run")
    text = run(folder, "grpo", world, max_steps=3, from_resume=1, rows_per_forward=3)
    assert "--rows_per_forward 由 16 改为 3" in text and "舍入不同" in text


def test_训练完再加一轮_说出学习率跳到多少(tmp_path, base, world):
    folder = shutil.copytree(base, tmp_path / "run")
    options = {"max_steps": 0, "batch_size": 8, "eval_interval": 0, "save_interval": 0, "log_interval": 1}
    run(folder, "full_sft", world, epochs=2, **options)
    last = saved(folder, CASES["full_sft"])
    text = run(folder, "full_sft", world, epochs=3, from_resume=1, **options)
    assert "--epochs 由 2 改为 3" in text
    jump = re.search(r"学习率从 (\S+) 跳到 (\S+?)。", text)
    assert float(jump[1]) == pytest.approx(last["progress"]["lr"], rel=0.01)
    assert float(jump[2]) > 1.5 * float(jump[1])
    lines = [json.loads(line) for line in (folder / "out/logs/full_sft_64.jsonl").read_text().splitlines()]
    rates = {line["step"]: line["lr"] for line in lines if "lr" in line}
    assert float(jump[2]) == pytest.approx(rates[last["step"] + 1], rel=0.01)


def test_权重旁边记着全部参数_没有绝对路径(tmp_path, trained, world):
    folder, case = trained("grpo"), CASES["grpo"]
    options = json.loads(weights_file(folder, case).with_suffix(".json").read_text())["options"]
    assert set(options) == {field.name for field in declared(arguments("grpo"))}
    assert options["epsilon"] == 0.2 and options["learning_rate"] == 0.06 / 64
    assert options["data_path"] == "rl.jsonl"
    assert saved(folder, case)["args"].keys() == options.keys()


def test_参数的值就是命令行上的(base):
    cls = arguments("pretrain")
    assert options_of(cls(epochs=3))["epochs"] == 3


@pytest.mark.parametrize(("recipe", "options"), [("ppo", {}), ("grpo", {"beta": 0.1}), ("dpo", {})])
def test_参考模型的文件换了_拒绝(tmp_path, base, world, recipe, options):
    """起点与存盘不同名：文件不会被存盘改写，内容变了就是换过。"""
    folder = shutil.copytree(base, tmp_path / "run")
    run(folder, recipe, world, max_steps=2, **options)
    path = folder / "out" / "full_sft_64.pth"
    state = torch.load(path, weights_only=True)
    torch.save({**state, "model.norm.weight": state["model.norm.weight"] * 1.5}, path)
    assert "参考模型" in run(folder, recipe, world, code=2, max_steps=3, from_resume=1, **options)
