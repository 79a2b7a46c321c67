"""续训存档少了一块、空了一块、换了样子：动手之前就拒绝，说是哪一样；本来就可以没有的照样续，逐位相同。

每一例都从真的续训存档改起。
"""

from __future__ import annotations

import shutil

import pytest
import torch
from trainer_helpers import ToyRows, assert_same_weights, tiny_args, tiny_model, toy_recipe, toy_train

from minimind.errors import UserError
from minimind.runtime.checkpoint import load_file
from minimind.trainer.archive import contents_of
from minimind.trainer.loop import train
from minimind.trainer.recipe import Data, language_model_loss

# 22 行，每步 2 行，一轮 11 步：停在第 2 轮里
SETTINGS = {"epochs": 2, "save_interval": 0}
KINDS = {
    "muon": {},
    "adamw": {"optimizer": "adamw", "learning_rate": 1e-3},
    "float16": {"dtype": "float16", "learning_rate": 1e-3},
    "moe": {"model": {"use_moe": True, "n_routed_experts": 8, "num_experts_per_tok": 1}},
}


def no_signal(model, batch):
    """梯度恰好全是 0 的损失：每一步都跳过，优化器什么也没有留下。"""
    loss, metrics = language_model_loss(model, batch)
    return loss * 0.0, metrics


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """各种训练停在第 13 步的目录，用到才训练。"""
    done = {}

    def get(kind):
        if kind not in done:
            done[kind] = tmp_path_factory.mktemp(kind)
            toy_train(done[kind], **SETTINGS, **KINDS[kind], max_steps=13)
        return done[kind]

    return get


def archive(folder):
    (path,) = folder.glob("checkpoints/*_resume.pth")
    return path


def edit(folder, change):
    data = load_file(archive(folder))
    change(data)
    torch.save(data, archive(folder))


def go_on(folder, kind="muon", **changes):
    return toy_train(folder, **{**SETTINGS, **KINDS[kind], **changes}, from_resume=1, max_steps=15)


def state(part, index=None):
    """优化器 ``part``（只有一个时是空的）的状态，或其中第 ``index`` 个参数的。"""

    def get(data):
        found = data["optimizer"][part] if part else data["optimizer"]
        return found["state"] if index is None else found["state"][index]

    return get


MUON, ADAMW, ALONE = state("muon"), state("adamw"), state("")
MOMENTUM, SECOND = state("muon", 3), state("adamw", 1)

DAMAGED = {
    "muon": {
        "Muon 的状态空了": (lambda d: MUON(d).clear(), r"少了 14 样（如 optimizer/muon/state/0/momentum_buffer）"),
        "AdamW 的状态空了": (lambda d: ADAMW(d).clear(), r"少了 \d+ 样（如 optimizer/adamw/state/0/step）"),
        "两个都空了": (lambda d: (MUON(d).clear(), ADAMW(d).clear()), "少了 .*optimizer/muon/state/0"),
        "少一个参数的": (lambda d: MUON(d).pop(3), r"少了 1 样（如 optimizer/muon/state/3/momentum_buffer）"),
        "多一个参数的": (lambda d: MUON(d).update({99: MOMENTUM(d)}), "第 99 个参数的状态；期望：只有 14 个"),
        "一个参数的空了": (lambda d: MOMENTUM(d).clear(), r"layers\.\d\.\S+ 有的是 空的；期望：momentum_buffer"),
        "少一项": (lambda d: SECOND(d).pop("exp_avg_sq"), r"有的是 step、exp_avg；期望：step、exp_avg、exp_avg_sq"),
        "形状不对": (
            lambda d: MOMENTUM(d).update(momentum_buffer=MOMENTUM(d)["momentum_buffer"][:-1]),
            r"layers\.\d\.\S+ 的 momentum_buffer 是 torch.float32 \(63, 64\)；期望：浮点数，形状 \(64, 64\)",
        ),
        "能广播的形状": (lambda d: SECOND(d).update(exp_avg=torch.zeros(1)), r"exp_avg 是 torch.float32 \(1,\)"),
        "整数": (lambda d: SECOND(d).update(exp_avg=SECOND(d)["exp_avg"].long()), "exp_avg 是 torch.int64"),
        "不是张量": (lambda d: SECOND(d).update(exp_avg="x"), "exp_avg 是 str"),
        "精度变了": (
            lambda d: SECOND(d).update(exp_avg=SECOND(d)["exp_avg"].half()),
            r"变了样子的有 1 样（如 optimizer/adamw/state/1/exp_avg）.*torch.float32 \(64,\)，不是 torch.float16",
        ),
        "动量是 NaN": (lambda d: MOMENTUM(d)["momentum_buffer"].mul_(float("nan")), "momentum_buffer 里有 NaN"),
        "平方的平均是负的": (lambda d: SECOND(d)["exp_avg_sq"].sub_(1), "exp_avg_sq 里有 .*负数"),
        "步数是负的": (lambda d: SECOND(d)["step"].sub_(99), "step 里有 .*负数"),
        "state 没了": (lambda d: d["optimizer"]["muon"].pop("state"), "没有 muon 的 state"),
        "一个优化器没了": (lambda d: d["optimizer"].pop("adamw"), "没有 adamw 的 state"),
        "优化器不是字典": (lambda d: d["optimizer"].update(muon=None), "没有 muon 的 state"),
        "参数换了次序": (
            lambda d: d["optimizer"]["muon"]["param_groups"][0]["params"].reverse(),
            "muon 的参数组是 .*期望：与现在的相同",
        ),
        "少一组": (lambda d: d["optimizer"]["adamw"]["param_groups"].pop(), "adamw 的参数组是"),
        "参数组不是一组": (lambda d: d["optimizer"]["muon"].update(param_groups=[3]), "muon 的参数组是 .None."),
        "随机数空了": (lambda d: d["rng"].clear(), r"有 0 份随机数状态（rng），进程数（world_size）是 1"),
        "一份随机数空了": (lambda d: d["rng"][0].clear(), "进程 0 的随机数状态（rng）装不回去（KeyError：'torch'）"),
        "少 numpy 的": (lambda d: d["rng"][0].pop("numpy"), "KeyError：'numpy'"),
        "torch 的短了": (lambda d: d["rng"][0].update(torch=d["rng"][0]["torch"][:9]), "随机数状态（rng）装不回去"),
        "python 的短了": (lambda d: d["rng"][0]["python"][1].pop(), "随机数状态（rng）装不回去"),
        "说在显卡上却没有它的": (lambda d: d["numerics"].update(device="cuda"), "KeyError：'cuda'.*另有 cuda"),
        "进程数不对": (lambda d: d.update(world_size=2), r"有 1 份随机数状态.*是 2"),
        "样本位置没了": (lambda d: d["progress"].pop("samples"), "progress"),
        "样本位置归零": (lambda d: d["progress"].update(samples=0), r"变了样子的有 1 样（如 progress/samples）.*progress/samples 是 4，不是 0"),
        "整个回到开头": (lambda d: d["progress"].update(epoch=0, samples=0), "说不通.*至少用一个样本"),
        "样本位置出界": (lambda d: d["progress"].update(samples=22), "说不通.*samples 小于训练的 22 行"),
        "轮次变了": (lambda d: d["progress"].update(epoch=2), r"变了样子的有 1 样（如 progress/epoch）.*是 1，不是 2"),
        "步数变了": (lambda d: d["progress"].update(step=11), r"（如 progress/step）.*是 13，不是 11"),
        "步数多过样本": (lambda d: d["progress"].update(step=27), "说不通.*共 27 步"),
        "步数是字": (lambda d: d["progress"].update(step="13"), "progress 是"),
        "区间不是字典": (lambda d: d["progress"].update(interval=None), "progress 是"),
        "参数空了": (lambda d: d["args"].clear(), "args 里没有 epochs、max_steps、batch_size"),
        "少一个参数": (lambda d: d["args"].pop("seed"), "args 里没有 seed"),
        "结构空了": (lambda d: d["config"].clear(), "config 里没有 hidden_size"),
        "权重不是张量": (lambda d: d["model"].update({"model.norm.weight": 3}), "model：里面不是普通的权重字典"),
        "身份空了": (lambda d: d["identity"].clear(), "identity 里没有 配方、训练行数"),
        "数据指纹没了": (lambda d: d["identity"].pop("数据指纹"), "identity 里没有 数据指纹"),
        "精度空了": (lambda d: d["numerics"].clear(), "numerics 是 {}；期望：device 是设备，dtype 是"),
        "精度不认识": (lambda d: d["numerics"].update(dtype="int8"), "numerics 是 .*'dtype': 'int8'"),
        "体征空了": (lambda d: d["vitals"].clear(), "vitals/streaks 是 NoneType"),
        "体征短了": (lambda d: d["vitals"].update(streaks=torch.zeros(3)), r"vitals/streaks 是 \(3,\)"),
        "清单不是字典": (lambda d: d.update(contents=3), "contents 是 int"),
    },
    "adamw": {
        "状态空了": (lambda d: ALONE(d).clear(), r"少了 \d+ 样（如 optimizer/state/0/step）"),
        "少一个参数的": (lambda d: ALONE(d).pop(0), r"少了 3 样（如 optimizer/state/0/step）"),
    },
    "float16": {
        "缩放器空了": (lambda d: d["scaler"].clear(), "scaler）的倍数是 None"),
        "没有缩放器": (lambda d: d.update(scaler=None), "scaler）的倍数是 None"),
        "倍数是 0": (lambda d: d["scaler"].update(scale=0.0), "scaler）的倍数是 0.0"),
        "少一项": (lambda d: d["scaler"].pop("_growth_tracker"), "少了 1 样（如 scaler/_growth_tracker）"),
    },
    "moe": {
        "少一个专家的": (lambda d: MUON(d).popitem(), r"少了 1 样（如 optimizer/muon/state/\d+/momentum_buffer）"),
    },
}  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in DAMAGED for name in DAMAGED[kind]])
def test_少了空了换了样子_拒绝并说是哪一样_什么也不动(stopped, tmp_path, kind, name):
    change, words = DAMAGED[kind][name]
    folder = shutil.copytree(stopped(kind), tmp_path / "run")
    edit(folder, change)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=words) as caught:
        go_on(folder, kind)
    assert str(archive(folder)) in caught.value.where
    assert "重新训练" in caught.value.fix
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def without_contents(data):
    """从前的存档：没有清单，也还没有体征与验证集的身份。"""
    for name in ("contents", "vitals", "val_identity"):
        data.pop(name)


EMPTIED = {
    ("muon", "muon"): lambda d: MUON(d).clear(),
    ("muon", "adamw"): lambda d: ADAMW(d).clear(),
    ("muon", "muon、adamw"): lambda d: (MUON(d).clear(), ADAMW(d).clear()),
    ("adamw", "adamw"): lambda d: ALONE(d).clear(),
}


@pytest.mark.parametrize(("kind", "emptied"), EMPTIED)
def test_从前的没有清单的存档_整个优化器空了也拒绝(stopped, tmp_path, kind, emptied):
    folder = shutil.copytree(stopped(kind), tmp_path / "run")
    edit(folder, without_contents)
    edit(folder, EMPTIED[kind, emptied])
    with pytest.raises(UserError, match=f"走了 13 步，而 {emptied} 的状态是空的"):
        go_on(folder, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_没有改过的存档与从前的没有清单的存档_续出来逐位相同(stopped, tmp_path, kind):
    new, old = (shutil.copytree(stopped(kind), tmp_path / name) for name in ("new", "old"))
    edit(old, without_contents)
    for folder in (new, old):
        assert go_on(folder, kind).step == 15
    assert_same_weights(load_file(archive(new))["model"], load_file(archive(old))["model"])


def train_with_unused(folder, **changes):
    """模型里有一层前向没有用到：它从来没有梯度，也就没有动量。"""
    model = tiny_model()
    model.unused = torch.nn.Linear(64, 64)
    args = tiny_args(folder, **SETTINGS, schedule="wsd", warmup_ratio=0.0, decay_ratio=0.0, **changes)
    return train(args, toy_recipe(), model, None, Data(ToyRows()))


def test_有的参数从来没有梯度_没有动量_新旧存档都照样续(tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    train_with_unused(whole, max_steps=4)
    train_with_unused(part, max_steps=2)
    saved = load_file(archive(part))["optimizer"]["muon"]
    assert len(saved["state"]) == sum(len(group["params"]) for group in saved["param_groups"]) - 1 > 0
    old = shutil.copytree(part, tmp_path / "old")
    edit(old, without_contents)
    for folder in (part, old):
        train_with_unused(folder, max_steps=4, from_resume=1)
        assert_same_weights(load_file(archive(folder))["model"], load_file(archive(whole))["model"])


def test_一步也没有走成_优化器是空的_照样续(tmp_path):
    """强化学习头几步全组同分：步数走了，权重与动量都没有动。"""
    settings = {**SETTINGS, "schedule": "wsd", "warmup_ratio": 0.0, "decay_ratio": 0.0}
    toy_train(tmp_path / "whole", **settings, loss=no_signal, max_steps=2)
    part = shutil.copytree(tmp_path / "whole", tmp_path / "part")
    saved = load_file(archive(part))
    assert saved["step"] == 2 and not saved["optimizer"]["muon"]["state"]
    assert toy_train(part, **settings, max_steps=4, from_resume=1).step == 4
    assert load_file(archive(part))["optimizer"]["muon"]["state"]


def test_换了批大小再续_位置与总步数仍说得通(stopped, tmp_path):
    """存盘时的参数与那时的总步数配套；换过批大小、又换过轮数的存档照样续。"""
    folder = shutil.copytree(stopped("muon"), tmp_path / "run")
    toy_train(folder, epochs=3, batch_size=3, accumulation_steps=2, from_resume=1, max_steps=14)
    toy_train(folder, epochs=3, batch_size=1, from_resume=1, max_steps=16)
    assert toy_train(folder, epochs=4, batch_size=4, from_resume=1).step > 16


def test_清单_路径与样子_空的不占地方():
    parts = {
        "a": {"x": torch.zeros(2, 3), "空": {}},
        "b": [{"y": torch.zeros((), dtype=torch.float64)}, [1, 2, 3], "字"],
        "c": 3,
    }
    assert contents_of(parts) == {
        "a/x": "torch.float32 (2, 3)",
        "b/0/y": "torch.float64 ()",
        "b/1": "list 3",
        "b/2": "str",
        "c": "3",
    }
