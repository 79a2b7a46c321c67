"""续训：什么必须与存档相同，什么由存档还原，可以换的换了又怎样。每个参数声明自己属于哪一类（:data:`minimind.arguments.RESUME`），没有声明的一律要相同。

被杀之后续训与没中断过逐位相同，靠的是“结果依赖的一切，要么在存档里，要么与存档核对过”。参数按值核对；文件（数据、教师、
奖励）按内容核对，写进存档的 ``identity``（:mod:`minimind.trainer.archive`）；参考模型是训练开始时的权重，那个文件可能就是这次训练正在
改写的，所以它整个放进存档（:class:`minimind.trainer.reference.StartingPoint`）。
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from minimind.arguments import declared
from minimind.console import say
from minimind.errors import UserError
from minimind.runtime import checkpoint, distributed
from minimind.runtime.shapes import check_plain
from minimind.trainer.archive import val_identity
from minimind.trainer.intact import AGAIN, WHOLE, check_fits, check_whole
from minimind.trainer.progress import Progress
from minimind.trainer.recipe import Data, Recipe

# 配置里与数学无关的键；首尾的记号随分词器，分词器另外核对
IGNORED_CONFIG = (
    *("dtype", "torch_dtype", "architectures", "_name_or_path", "flash_attn", "use_cache"),
    *("bos_token_id", "eos_token_id"),
)
SAME = "用与存档相同的参数，或去掉 --from_resume 重新训练"
# 学习率变化超过这个比例就叫“跳”
JUMP = 0.05
# 哪一类里的哪些参数变了：{类: {参数: (存档里的值, 现在的值)}}
Changes = dict[str, dict[str, tuple[Any, Any]]]


# ---------------------------------------------------------------- 参数


def changes(saved: Mapping[str, Any], args: Any) -> Changes:
    """值与存档不同的参数，按声明的类分开；存档里没有的（后来才有的参数）不算。"""
    found: Changes = {}
    for field in declared(type(args)):
        now = getattr(args, field.name)
        if field.name in saved and saved[field.name] != now:
            found.setdefault(field.metadata["resume"], {})[field.name] = saved[field.name], now
    return found


def check_arguments(found: Changes, where: str) -> None:
    """决定结果的参数必须与存档相同。

    Raises:
        UserError: 有不同，逐项写出两边的值。
    """
    pairs = found.get("compared", {})
    old, new = ({f"--{name}": pair[side] for name, pair in pairs.items()} for side in (0, 1))
    checkpoint.check_same_config(old, new, where, SAME)


def say_changes(saved: dict[str, Any], found: Changes, recipe: Recipe, data: Data, state: Progress) -> None:
    """可以换的参数换了：说出由什么换成什么，以及它的后果（学习率跳到多少、总步数、每步的行数）。"""
    world_size, noted = distributed.world_size(), found.get("noted", {})
    for name, (old, new) in noted.items():
        say(f"注意：--{name} 由 {old} 改为 {new}，续训按新的来。")
    for name, (old, new) in found.get("rounding", {}).items():
        say(f"注意：--{name} 由 {old} 改为 {new}：算的是同一件事，舍入不同，续训与没中断时不再逐位相同。")
    if saved["world_size"] != world_size:
        say(f"注意：进程数由 {saved['world_size']} 变为 {world_size}，从同一个样本接着训练。")
    if saved.get("val_identity") != val_identity(data):
        say("注意：验证集与存档的不同，前后的验证损失不能相比。")
    if noted or saved["world_size"] != world_size:
        for effect in effects(saved, recipe, state):
            say(f"注意：{effect}。")


def effects(saved: dict[str, Any], recipe: Recipe, state: Progress) -> list[str]:
    """换了参数的后果，各一句话。"""
    sentences = []
    if saved["total_steps"] != state.total_steps:
        sentences.append(f"总步数由 {saved['total_steps']:,} 变为 {state.total_steps:,}")
    before = saved["args"]["batch_size"] * saved["args"]["accumulation_steps"] * saved["world_size"]
    after = state.global_batch * state.accumulation
    if before != after:
        sentences.append(f"每步由 {before} 行变为 {after} 行")
    if state.step and state.step < state.total_steps:
        last, following = state.lr, state.learning_rate(state.window_size()[1])
        pairs = {"": (1.0, 1.0)}
        for prefix, scale in recipe.lr_scales.items():
            pairs[f"（{prefix.rstrip('.')}）"] = ((saved["lr_scales"] or {}).get(prefix, 1.0), scale)
        for name, (before, after) in pairs.items():
            a, b = last * before, following * after
            verb = "跳到" if abs(a - b) > JUMP * max(a, b) else "接着走到"
            sentences.append(f"学习率{name}从 {a:.2e} {verb} {b:.2e}")
    return sentences


# ---------------------------------------------------------------- 存档


def load(args: Any, model: nn.Module, identity: dict[str, Any]) -> dict[str, Any]:
    """读续训存档并核对，发给各进程（它只在主进程的磁盘上有）；没有存档是空的，有则另带着 ``where``：读自哪个文件。

    Raises:
        UserError: 存档不全，或结构、决定结果的参数、各种文件的内容与存档的不同。
    """

    def read() -> dict[str, Any]:
        weight, folder = args.save_weight, args.checkpoint_dir
        path = checkpoint.resume_path(model.config, weight, folder)
        saved = checkpoint.lm_checkpoint(model.config, weight, save_dir=folder)
        if saved is None:
            say(f"没有续训存档 {path}，从头开始。")
            return {}
        check_whole(saved, str(path))
        config = {k: v for k, v in checkpoint.config_dict(model.config).items() if k not in IGNORED_CONFIG}
        check_arguments(changes(saved["args"], args), str(path))
        checkpoint.check_same_config(saved["config"], config, str(path), SAME)
        checkpoint.check_same_config(saved["identity"], identity, str(path), SAME)
        check_plain(saved["model"], f"{path} 的 model", WHOLE)
        checkpoint.check_state(model, saved["model"], path, AGAIN)
        return {**saved, "where": str(path)}

    return distributed.broadcast_state(distributed.on_main(read), next(model.parameters()).device)


@contextlib.contextmanager
def _fitting(name: str, where: str) -> Iterator[None]:
    """还原存档里的一样；它缺一块、多一块、类型不对，就说是哪一样。"""
    try:
        yield
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}：{error}".splitlines()[0][:120]
        raise UserError(
            f"存档里的 {name} 与现在的对不上（{reason}）",
            where=where,
            expected="这个配方、这个版本存下的续训存档",
            fix=WHOLE,
        ) from error


def restore(
    saved: dict[str, Any], model: nn.Module, optimizer: Any, scaler: Any, state: Progress, recipe: Recipe
) -> None:
    """权重、优化器、缩放器与配方自己的状态还原成存档里的；``state`` 建立时已经读过进度。"""
    where = saved["where"]
    check_fits(saved, model, optimizer, where)
    model.load_state_dict(saved["model"])
    options = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    with _fitting("optimizer", where):
        optimizer.load_state_dict(saved["optimizer"])
    # 存档里只取动量；各组的设置（学习率的倍数、迭代的精度）以现在的参数为准，该相同的前面已经核对过
    for group, option in zip(optimizer.param_groups, options):
        group.update(option)
    if saved["scaler"] and scaler.is_enabled():
        with _fitting("scaler", where):
            scaler.load_state_dict(saved["scaler"])
    state.train_loss, state.metrics = saved["train_loss"], saved["metrics"]
    for name, part in recipe.extra_state.items():
        with _fitting(f"recipe_state 的 {name}", where):
            part.load_state_dict(saved["recipe_state"][name])
    say(f"读入续训存档：已完成 {state.step} 步（{state.epoch} 轮又 {state.samples} 个样本）。")
