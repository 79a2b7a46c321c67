"""续训存档是完整的吗：别的程序写的、别的版本写的、被改过的、少了一块的，动手之前就说，不等还原到一半，更不悄悄从头积累动量。

三道：该有的部分都在、类型对、彼此说得通（:func:`check_whole`）；优化器、缩放器、体征的状态装得进现在的（:func:`check_fits`）；
存盘时记下的清单一样不少（:func:`check_contents`，清单见 :func:`minimind.trainer.archive.contents_of`）。

清单是必要的：一个参数没有动量可以是对的（前向没有用到它，或至今的每一步都没有梯度、都跳过了），只有存盘的那一刻知道。从前的存档没有清单，
分得清的才拒绝。
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minimind.errors import UserError
from minimind.runtime.device import DTYPES
from minimind.trainer.archive import LISTED, contents_of
from minimind.trainer.optim import MOMENTS, OptimizerPair
from minimind.trainer.progress import TrainState
from minimind.trainer.vital_signs import VitalSigns

AGAIN = "去掉 --from_resume 重新训练"
WHOLE = f"换一份完整的续训存档（如 --keep_checkpoints 留下的），或{AGAIN}"
# 存档里一定有的，各是什么类型
PARTS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("config", "args", "identity", "progress", "model", "optimizer"), Mapping),
    **dict.fromkeys(("metrics", "recipe_state"), Mapping),
    "rng": list,
    "lr_scales": (Mapping, type(None)),
    "scaler": (Mapping, type(None)),
    **dict.fromkeys(("total_steps", "world_size"), int),
    "train_loss": float,
}
# 后来才有的，有就是这个类型
OPTIONAL = {"numerics": Mapping, "vitals": Mapping, "contents": Mapping}
# 核对只看存档里有的键（参数会越来越多），所以从头一版就有的这几个必须在：空的就什么也没有核对
ALWAYS = {
    "config": ("hidden_size", "num_hidden_layers", "vocab_size"),
    "args": ("epochs", "max_steps", "batch_size", "accumulation_steps", "learning_rate", "optimizer", "seed"),
    "identity": ("配方", "训练行数", "数据指纹", "行长", "分词器指纹"),
}
COUNTS = ("epoch", "samples", "step")


def check_whole(saved: Mapping[str, Any], where: str) -> None:
    """不看现在的模型就能说的全部。

    Raises:
        UserError: 缺一样，类型不对，或互相说不通。
    """
    for name, kind in {**PARTS, **{n: kind for n, kind in OPTIONAL.items() if n in saved}}.items():
        if name not in saved:
            raise UserError(f"续训存档里没有 {name}", where=where, fix=AGAIN)
        if not isinstance(saved[name], kind):
            raise UserError(f"续训存档里的 {name} 是 {type(saved[name]).__name__}", where=where, fix=AGAIN)
    for name, keys in ALWAYS.items():
        if missing := [key for key in keys if key not in saved[name]]:
            raise UserError(
                f"续训存档的 {name} 里没有 {'、'.join(missing)}",
                where=where,
                expected=f"至少有 {'、'.join(keys)}：要与现在的核对",
                fix=WHOLE,
            )
    check_progress(saved, where)
    check_rng(saved, where)
    numerics = saved.get("numerics", {"device": "cpu", "dtype": "float32"})
    if not isinstance(numerics.get("device"), str) or numerics.get("dtype") not in DTYPES:
        raise UserError(
            f"续训存档的 numerics 是 {dict(numerics)}",
            where=where,
            expected=f"device 是设备，dtype 是 {'、'.join(DTYPES)} 之一：续训沿用这个精度",
            fix=WHOLE,
        )


def check_progress(saved: Mapping[str, Any], where: str) -> None:
    """走到哪里：类型对；轮次、样本位置与步数说得通。"""
    progress, rows = saved["progress"], saved["identity"]["训练行数"]
    kinds = {"kept": list, "interval": Mapping, **dict.fromkeys((*COUNTS, "nonfinite_in_row"), int)}
    own = [field.name for field in fields(TrainState)]
    fits = set(COUNTS) <= set(progress) <= set(own) and all(
        isinstance(value, kinds.get(name, (int, float))) and (not isinstance(value, int) or value >= 0)
        for name, value in progress.items()
    )
    if not fits:
        raise UserError(
            f"续训存档里的 progress 是 {progress}",
            where=where,
            expected=f"有 epoch、samples、step（都不小于 0），没有 {'、'.join(sorted(own))} 之外的",
            fix=AGAIN,
        )
    epoch, samples, step = (progress[name] for name in COUNTS)
    used = epoch * rows + samples if isinstance(rows, int) else -1
    coherent = used >= 0 and samples < max(rows, 1) and step <= used and bool(step) == bool(used)
    if not coherent:
        raise UserError(
            f"续训存档里的 progress 说不通：第 {epoch} 轮（从 0 数）用了 {samples} 个样本，共 {step} 步",
            where=where,
            expected=f"samples 小于训练的 {rows} 行，一步至少用一个样本",
            fix=WHOLE,
        )


def check_contents(saved: Mapping[str, Any], where: str) -> None:
    """与存盘时的清单一样：不少，不多；张量的形状与精度、整数没有变。

    Raises:
        UserError: 指出是哪一样（存档里的路径）。
    """
    if (listed := saved.get("contents")) is None:
        return
    found = contents_of({name: saved.get(name) for name in LISTED})
    lost = [path for path in listed if path not in found]
    extra = [path for path in found if path not in listed]
    changed = [path for path in listed if path in found and found[path] != listed[path]]
    if lost or extra or changed:
        kinds = (("少了", lost), ("多了", extra), ("变了样子的有", changed))
        what = "，".join(f"{word} {len(paths)} 样（如 {paths[0]}）" for word, paths in kinds if paths)
        part = (lost or extra or changed)[0].partition("/")[0]
        was = f"，{changed[0]} 是 {listed[changed[0]]}，不是 {found[changed[0]]}" if changed else ""
        raise UserError(
            f"存档里的 {part} 与存盘时的对不上：{what}",
            where=where,
            expected=f"与存盘时的清单相同，共 {len(listed)} 样{was}",
            fix=WHOLE,
        )


def check_rng(saved: Mapping[str, Any], where: str) -> None:
    """每个进程一份随机数状态，都装得进各自的发生器；不动正在用的。"""
    states, world, device = saved["rng"], saved["world_size"], (saved.get("numerics") or {}).get("device")
    if world < 1 or len(states) != world:
        raise UserError(
            f"续训存档里有 {len(states)} 份随机数状态（rng），进程数（world_size）是 {world}",
            where=where,
            expected="每个进程一份",
            fix=WHOLE,
        )
    for rank, state in enumerate(states):
        try:
            torch.Generator().set_state(state["torch"])
            kind, keys, *rest = state["numpy"]
            np.random.RandomState().set_state((kind, keys.numpy().astype(np.uint32), *rest))
            version, internal, gauss = state["python"]
            random.Random().setstate((version, tuple(internal), gauss))
            if device in ("cuda", "npu", "mps") and not isinstance(state[device], Tensor):
                raise TypeError(f"{device} 的是 {type(state[device]).__name__}")
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}：{error}".splitlines()[0][:120]
            raise UserError(
                f"续训存档里进程 {rank} 的随机数状态（rng）装不回去（{reason}）",
                where=where,
                expected="torch、numpy、python 各一份" + (f"，另有 {device}" if device != "cpu" else ""),
                fix=WHOLE,
            ) from error


def check_fits(saved: Mapping[str, Any], model: nn.Module, optimizer: Any, where: str) -> None:
    """还原之前：存档里的状态装得进现在的优化器、缩放器、体征，也与清单相同。

    Raises:
        UserError: 指出是哪一样。
    """
    check_optimizer(saved, model, optimizer, where)
    check_scaler(saved, where)
    check_contents(saved, where)
    own = VitalSigns(model).state_dict()
    for name, value in own.items() if "vitals" in saved else ():
        there = saved["vitals"].get(name)
        if type(there) is not type(value) or getattr(there, "shape", None) != getattr(value, "shape", None):
            found = tuple(there.shape) if isinstance(there, Tensor) else type(there).__name__
            raise UserError(
                f"存档里的 vitals/{name} 是 {found}", where=where, expected="与现在的参数一一对应", fix=WHOLE
            )


def check_optimizer(saved: Mapping[str, Any], model: nn.Module, optimizer: Any, where: str) -> None:
    """优化器的状态：逐组对得上，每一份动量齐全、与参数同形、都是有限数；该有的没有被清空。

    torch 的 ``load_state_dict`` 只核对组数与组的大小，缺的悄悄从零开始。

    Raises:
        UserError: 指出是哪个参数的哪一样。
    """

    def refuse(what: str, expected: str) -> UserError:
        found = f"存档里的 optimizer 与现在的对不上：{what}"
        return UserError(found, where=where, expected=expected, fix=WHOLE)

    names = {id(p): name for name, p in model.named_parameters()}
    pair, emptied = isinstance(optimizer, OptimizerPair), []
    for part, one in (optimizer.optimizers if pair else {"": optimizer}).items():
        state = saved["optimizer"].get(part) if pair else saved["optimizer"]
        if not isinstance(state, Mapping) or not isinstance(state.get("state"), Mapping):
            raise refuse(f"没有 {part or '参数'} 的 state", "这个版本存下的状态")
        groups, mine = grouping(state), grouping(one.state_dict())
        if groups != mine:
            raise refuse(f"{part} 的参数组是 {str(groups)[:60]}", f"与现在的相同：{str(mine)[:60]}")
        params = [p for group in one.param_groups for p in group["params"]]
        if unknown := [index for index in state["state"] if index not in range(len(params))]:
            raise refuse(f"{part} 有第 {unknown[0]} 个参数的状态", f"只有 {len(params)} 个参数")
        for index, entry in state["state"].items():
            check_moments(names[id(params[index])], params[index], entry, type(one), refuse)
        if not state["state"]:
            emptied.append(part or str(saved["args"]["optimizer"]))
    # 没有清单的都是 Muon 与 AdamW 存下的：走过一步，各组就都有动量；一步也没走成的，重新训练不损失什么
    if emptied and saved["progress"]["step"] and "contents" not in saved:
        what = f"走了 {saved['progress']['step']} 步，而 {'、'.join(emptied)} 的状态是空的"
        raise refuse(what, "走过的每个参数一份动量")


def grouping(state: Mapping[str, Any]) -> list[Any]:
    """各组是哪几个参数（第几个）；不像参数组的是 None。"""
    groups = state.get("param_groups")
    return [
        group.get("params") if isinstance(group, Mapping) else None
        for group in (groups if isinstance(groups, list) else ())
    ]


def check_moments(
    name: str, param: Tensor, entry: Any, kind: type, refuse: Callable[[str, str], UserError]
) -> None:
    """一个参数的动量；``kind`` 是优化器，:data:`MOMENTS` 里没有的不知道该有什么，只靠清单。"""
    if (wanted := MOMENTS.get(kind)) is None:
        return
    if not isinstance(entry, Mapping) or set(entry) != set(wanted):
        found = "、".join(map(str, entry)) if isinstance(entry, Mapping) else type(entry).__name__
        raise refuse(f"{name} 有的是 {found or '空的'}", "、".join(wanted))
    for key, value in entry.items():
        value = torch.tensor(float(value)) if isinstance(value, int | float) else value
        shape = () if key == "step" else tuple(param.shape)
        if not isinstance(value, Tensor) or tuple(value.shape) != shape or not value.is_floating_point():
            found = (
                f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            )
            raise refuse(f"{name} 的 {key} 是 {found}", f"浮点数，形状 {shape}")
        if not torch.isfinite(value).all() or (key in ("step", "exp_avg_sq") and (value < 0).any()):
            raise refuse(f"{name} 的 {key} 里有 NaN、无穷或负数", "每个数都有限，平方的平均不小于 0")


def check_scaler(saved: Mapping[str, Any], where: str) -> None:
    """float16 训练的存档里有梯度缩放器的状态，倍数是正的有限数。"""
    scaler = saved["scaler"]
    if (saved.get("numerics") or {}).get("dtype") != "float16" and not scaler:
        return
    scale = (scaler or {}).get("scale")
    if not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise UserError(
            f"续训存档里梯度缩放器（scaler）的倍数是 {scale}",
            where=where,
            expected="float16 训练的有一个大于 0 的数",
            fix=WHOLE,
        )
