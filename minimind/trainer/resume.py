"""续训：什么必须与存档相同，什么由存档还原，可以换的换了又怎样。每个参数声明自己属于哪一类（:data:`minimind.arguments.RESUME`），没有声明的一律要相同。

被杀之后续训与没中断过逐位相同，靠的是“结果依赖的一切，要么在存档里，要么与存档核对过”。参数按值核对；文件（数据、教师、
奖励）按内容核对，写进存档的 ``identity``；参考模型是训练开始时的权重，那个文件可能就是这次训练正在改写的，所以它整个
放进存档（:class:`StartingPoint`）。
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minimind.arguments import declared
from minimind.console import say
from minimind.errors import UserError
from minimind.runtime import checkpoint, distributed
from minimind.tokenizer import tokenizer_fingerprint
from minimind.trainer.progress import Progress
from minimind.trainer.recipe import Data, Recipe

# 配置里与数学无关的键
IGNORED_CONFIG = ("dtype", "torch_dtype", "architectures", "_name_or_path", "flash_attn", "use_cache")
SAME = "用与存档相同的参数，或去掉 --from_resume 重新训练"
# 学习率变化超过这个比例就叫“跳”
JUMP = 0.05


# ---------------------------------------------------------------- 参数


def options_of(args: Any) -> dict[str, Any]:
    """声明过的全部参数与它们的值（没写明的已经填上）。"""
    return {field.name: getattr(args, field.name) for field in declared(type(args))}


def public_options(args: Any) -> dict[str, Any]:
    """同上，写进旁注：随权重走，所以绝对路径只留末尾的名字。"""

    def shown(field: Any, value: Any) -> Any:
        if field.metadata["text"] not in ("path", "paths") or value is None:
            return value
        parts = [Path(part.strip()) for part in value.split(",")]  # --reward 可以有几项
        return ",".join(part.name if part.is_absolute() else str(part) for part in parts)

    return {field.name: shown(field, getattr(args, field.name)) for field in declared(type(args))}


def changed(saved: Mapping[str, Any], args: Any, kind: str) -> list[str]:
    """``kind`` 一类的参数里，值与存档不同的。"""
    fields = [field for field in declared(type(args)) if field.metadata["resume"] == kind]
    return [f.name for f in fields if f.name in saved and saved[f.name] != getattr(args, f.name)]


def check_arguments(saved: Mapping[str, Any], args: Any, where: str) -> None:
    """决定结果的参数必须与存档相同。

    Raises:
        UserError: 有不同，逐项写出两边的值。
    """
    names = changed(saved, args, "compared")
    old, new = ({f"--{name}": value[name] for name in names} for value in (saved, options_of(args)))
    checkpoint.check_same_config(old, new, where, SAME)


def say_changes(saved: dict[str, Any], args: Any, recipe: Recipe, data: Data, state: Progress) -> None:
    """可以换的参数换了：说出由什么换成什么，以及它的后果（学习率跳到多少、总步数、每步的行数）。"""
    old, world_size = saved["args"], distributed.world_size()
    noted = changed(old, args, "noted")
    for name in noted:
        say(f"注意：--{name} 由 {old[name]} 改为 {getattr(args, name)}，续训按新的来。")
    for name in changed(old, args, "rounding"):
        say(
            f"注意：--{name} 由 {old[name]} 改为 {getattr(args, name)}：算的是同一件事，舍入不同，"
            "续训与没中断时不再逐位相同。"
        )
    if saved["world_size"] != world_size:
        say(f"注意：进程数由 {saved['world_size']} 变为 {world_size}，从同一个样本接着训练。")
    if saved.get("val_identity") != val_identity(data):
        say("注意：验证集与存档的不同，前后的验证损失不能相比。")
    if noted or saved["world_size"] != world_size:
        for effect in effects(saved, args, recipe, state):
            say(f"注意：{effect}。")


def effects(saved: dict[str, Any], args: Any, recipe: Recipe, state: Progress) -> list[str]:
    """换了参数的后果，各一句话。"""
    sentences = []
    if saved["total_steps"] != state.total_steps:
        sentences.append(f"总步数由 {saved['total_steps']:,} 变为 {state.total_steps:,}")
    before = saved["args"]["batch_size"] * saved["args"]["accumulation_steps"] * saved["world_size"]
    after = state.global_batch * args.accumulation_steps
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


def tokenizer_hash(tokenizer: Any) -> str | None:
    """分词器的指纹；没有分词器时为 None。"""
    return None if tokenizer is None else tokenizer_fingerprint(tokenizer)


def identity_of(recipe: Recipe, data: Data, tokenizer: Any) -> dict[str, Any]:
    """结果所依赖的各种文件的身份：数据、分词器，配方另外用到的（教师、奖励）；只看内容。"""
    return {
        "配方": recipe.name,
        "训练行数": len(data.train),
        "数据指纹": getattr(data.train, "fingerprint", None),
        "行长": getattr(data.train, "row_length", None),
        "分词器指纹": tokenizer_hash(tokenizer),
        **recipe.identity,
    }


def val_identity(data: Data) -> str | int | None:
    """验证集的身份；换了它不影响训练，只是前后不能相比。"""
    return None if data.val is None else getattr(data.val, "fingerprint", len(data.val))


def load(args: Any, model: nn.Module, identity: dict[str, Any]) -> dict[str, Any]:
    """读续训存档并核对，发给各进程（它只在主进程的磁盘上有）；没有存档是空的。

    Raises:
        UserError: 存档不全，或结构、决定结果的参数、各种文件的内容与存档的不同。
    """

    def read() -> dict[str, Any]:
        path = checkpoint.resume_path(model.config, args.save_weight, args.checkpoint_dir)
        saved = checkpoint.lm_checkpoint(model.config, args.save_weight, save_dir=args.checkpoint_dir)
        if saved is None:
            say(f"没有续训存档 {path}，从头开始。")
            return {}
        for key in ("config", "args", "identity", "progress", "rng", "total_steps"):
            if key not in saved:
                raise UserError(f"续训存档里没有 {key}", where=str(path), fix="去掉 --from_resume 重新训练")
        config = {k: v for k, v in checkpoint.config_dict(model.config).items() if k not in IGNORED_CONFIG}
        check_arguments(saved["args"], args, str(path))
        checkpoint.check_same_config(saved["config"], config, str(path), SAME)
        checkpoint.check_same_config(saved["identity"], identity, str(path), SAME)
        return saved

    return distributed.broadcast_state(distributed.on_main(read), next(model.parameters()).device)


def restore(
    saved: dict[str, Any], model: nn.Module, optimizer: Any, scaler: Any, state: Progress, recipe: Recipe
) -> None:
    """权重、优化器、缩放器与配方自己的状态还原成存档里的；``state`` 建立时已经读过进度。"""
    model.load_state_dict(saved["model"])
    options = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    optimizer.load_state_dict(saved["optimizer"])
    # 存档里只取动量；各组的设置（学习率的倍数、迭代的精度）以现在的参数为准，该相同的前面已经核对过
    for group, option in zip(optimizer.param_groups, options):
        group.update(option)
    if saved["scaler"] and scaler.is_enabled():
        scaler.load_state_dict(saved["scaler"])
    state.train_loss, state.metrics = saved["train_loss"], saved["metrics"]
    for name, part in recipe.extra_state.items():
        part.load_state_dict(saved["recipe_state"][name])
    say(f"读入续训存档：已完成 {state.step} 步（{state.epoch} 轮又 {state.samples} 个样本）。")


# ---------------------------------------------------------------- 文件的内容


def content_hash(path: Path) -> str:
    """文件、或目录里全部文件（隐藏的除外）的内容指纹，与放在哪里无关。"""
    digest = hashlib.blake2b(digest_size=12)
    found = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    names = {p.relative_to(path) if path.is_dir() else Path(): p for p in found}
    for name, file in sorted(names.items()):
        if any(part.startswith(".") or part == "__pycache__" for part in name.parts):
            continue
        digest.update(f"{name.as_posix()}\0".encode())
        with open(file, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


# ---------------------------------------------------------------- 起点


class StartingPoint:
    """训练开始时的权重，参考模型由它来；整个放进续训存档（``extra_state``）。

    只记下文件的名字不够：``from_weight`` 与 ``save_weight`` 同名时，那个文件一存盘就被改写了。

    Args:
        args: 需要 ``from_resume from_weight save_weight checkpoint_dir``。
        model: 刚由 ``from_weight`` 打开的模型；续训时就地换成存档里的起点，由它得出的一切（参考模型、价值网络的初值、
            参考概率的缓存键）于是与当初一样。随后训练循环再装入存档里训练到一半的权重。
    """

    def __init__(self, args: Any, model: nn.Module):
        saved = None
        if args.from_resume:
            saved = distributed.broadcast_state(
                distributed.on_main(lambda: self._saved(args, model)), model.device
            )
        if saved is not None:
            self._check_same(saved, args, model)
            model.load_state_dict(saved)
        self.state = {name: exact_half(value) for name, value in model.state_dict().items()}

    @staticmethod
    def _saved(args: Any, model: Any) -> dict[str, Tensor] | None:
        data = checkpoint.lm_checkpoint(model.config, args.save_weight, save_dir=args.checkpoint_dir)
        own = model.state_dict()
        found = ((data or {}).get("recipe_state") or {}).get("start")
        fits = found and {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in own.items()}
        return found if fits else None  # 结构不同的随后由训练循环逐项指出

    @staticmethod
    def _check_same(saved: dict[str, Tensor], args: Any, model: Any) -> None:
        """存盘改写不到的起点文件若换了内容，多半是拿错了：说出来，不悄悄用旧的。

        Raises:
            UserError: ``from_weight`` 的内容与存档里的起点不同。
        """
        own = model.state_dict()
        if args.from_weight in ("none", args.save_weight):
            return
        if any(not torch.equal(own[key].cpu(), value.to(own[key].dtype)) for key, value in saved.items()):
            raise UserError(
                "起点的权重（参考模型由它来）与存档里的不同：文件后来换过",
                where=f"--from_weight {args.from_weight}",
                expected="与开始训练时同一份权重",
                fix="放回原来的权重，或去掉 --from_resume 重新训练",
            )

    def state_dict(self) -> dict[str, Tensor]:
        return self.state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """建立时已经读过。"""


def exact_half(value: Tensor) -> Tensor:
    """内存里的一份拷贝；转 fp16 一位不丢的（由 ``.pth`` 读来的都是）存 fp16，省一半。"""
    half = value.detach().half()
    exact = value.is_floating_point() and torch.equal(half.to(value.dtype), value)
    return (half if exact else value.detach()).cpu().clone()
