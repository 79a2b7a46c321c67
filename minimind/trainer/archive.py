"""存盘：写下哪些东西、凭什么认出是同一次训练；最新的之外还留哪些：最近几次的（``--keep_checkpoints``），与验证成绩最好的（``{save_weight}_best``）。

留下的都只是另一个名字的权重，与别的权重一样用：``--weight full_sft_best``、``--from_weight full_sft_step400``；留了续训存档的，
``--save_weight full_sft_step400 --from_resume 1`` 从那里接着训练，写到这个名字下，原来的不动。读回来见 :mod:`minimind.trainer.resume`。
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import Field, asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from minimind.arguments import declared
from minimind.console import say
from minimind.errors import UserError
from minimind.runtime import checkpoint, distributed
from minimind.runtime.device import rng_state
from minimind.tokenizer import tokenizer_fingerprint
from minimind.trainer.progress import TrainState
from minimind.trainer.recipe import Data, Recipe, Run
from minimind.trainer.tally import Update, account

# 清单里列着的：少了一块，训练还走得下去，只是不再是同一次训练
LISTED = ("optimizer", "scaler", "progress", "rng", "recipe_state")
# 验证的指标 → 越小越好为 1，越大越好为 −1；有前面的就看前面的
METRICS = {"val_loss": 1, "val_reward": -1}


class Archive:
    """把一次训练存盘：权重与旁注，续训存档。

    Attributes:
        state: 同 ``run.state``，其中 ``saved_step`` 是最近存过盘的那一步。
    """

    def __init__(self, run: Run):
        args = run.args
        self.run, self.state = run, run.state
        self.weight, self.folder, self.limit = args.save_weight, args.checkpoint_dir, args.keep_checkpoints
        self.fields, self.options = declared(type(args)), options_of(args)
        distributed.on_main(self.check_places)

    def check_places(self) -> None:
        """要写的三个文件那里没有同名的文件夹：等到第一次存盘才发现就晚了。"""
        weights, folder = self.run.recipe.weights, self.folder
        resume = checkpoint.resume_path(self.run.config, self.weight, folder)
        for path, flag in (
            (weights, "--save_dir"),
            (weights.with_suffix(".json"), "--save_dir"),
            (resume, "--checkpoint_dir"),
        ):
            if path.is_dir():
                raise UserError(
                    "这里是一个文件夹，存不了文件",
                    where=str(path),
                    fix=f"把它移走，或换 {flag}、--save_weight",
                )

    def snapshot(self, unread: Iterable[Update] = ()) -> dict[str, Any]:
        """权重与优化器之外、这一刻的全部：进度、本进程的随机数、配方状态；都是拷贝，此后怎么走都不变。

        Args:
            unread: 已经走了、数还没有读的更新；写盘时才读，并进进度。
        """
        run = self.run
        return {
            "step": run.state.step,
            "progress": asdict(run.state),
            "unread": [*unread],
            "rng": rng_state(run.device),
            "vitals": run.vitals.state_dict(),
            "recipe_state": {name: part.state_dict() for name, part in run.recipe.extra_state.items()},
        }

    def save(self) -> None:
        """存权重与续训存档；多进程时只有主进程写，写不成则一起停。"""
        snapshot = self.snapshot()
        rng = distributed.gather_objects(snapshot["rng"])
        distributed.on_main(lambda: self.write(snapshot, rng))
        self.run.state.saved_step = self.run.state.step

    def write(self, snapshot: dict[str, Any], rng: list[dict[str, Any]]) -> None:
        """把此刻的权重、优化器与 ``snapshot`` 写盘；``rng`` 是各进程的随机数状态。"""
        run, recipe, reached = self.run, self.run.recipe, TrainState(**snapshot["progress"])
        for update in snapshot["unread"]:
            account(reached, update)
        progress = asdict(reached)
        if self.limit > 1 and progress["step"] not in progress["kept"]:
            progress["kept"] = [*progress["kept"], progress["step"]]
        what = recipe.weights_of(run.model) if recipe.weights_of else run.model
        checkpoint.save_weights(what, recipe.weights, self.sidecar())
        listed = {
            "optimizer": run.optimizer.state_dict(),
            "scaler": run.scaler.state_dict(),
            "progress": progress,
            "rng": rng,
            "recipe_state": snapshot["recipe_state"],
        }
        checkpoint.lm_checkpoint(
            run.config,
            self.weight,
            model=run.model,
            optimizer=run.optimizer,
            epoch=progress["epoch"],
            step=progress["step"],
            wandb=run.journal.tracker,
            save_dir=self.folder,
            scaler=run.scaler,
            progress=progress,
            rng=rng,
            numerics=run.numerics,
            identity=identity_of(recipe, run.data, run.tokenizer),
            vitals=snapshot["vitals"],
            val_identity=val_identity(run.data),
            args=self.options,
            lr_scales=dict(recipe.lr_scales),
            total_steps=run.state.total_steps,
            train_loss=run.state.train_loss,
            metrics=run.state.metrics,
            recipe_state=snapshot["recipe_state"],
            contents=contents_of(listed),
        )
        if self.limit > 1:
            run.state.kept = self.keep_recent(progress["kept"])

    def sidecar(self) -> dict[str, Any]:
        """权重旁边的 JSON：聊天、服务、导出与下一阶段靠它认尺寸。"""
        run = self.run
        return {
            "config": checkpoint.config_dict(run.config),
            "tokenizer_hash": tokenizer_hash(run.tokenizer),
            "recipe": run.recipe.name,
            "step": run.state.step,
            "epoch": run.state.epoch,
            "metrics": {"train_loss": run.state.train_loss, **run.state.metrics},
            "options": public_options(self.fields, self.options),
        }

    def paths(self, tag: str) -> list[tuple[Path, Path]]:
        """``(现在的文件, 留下来的名字)``：权重、旁注、续训存档；``tag`` 例如 ``step400``、``best``。"""
        config, now = self.run.config, self.run.recipe.weights
        weight = f"{self.weight}_{tag}"
        kept = now.with_name(f"{checkpoint.file_stem(config, weight)}.pth")
        saved = [checkpoint.resume_path(config, name, self.folder) for name in (self.weight, weight)]
        # 先旁注后权重：权重在的，旁注一定在
        sidecars = checkpoint.sidecar_path(now), checkpoint.sidecar_path(kept)
        return [sidecars, (now, kept), (saved[0], saved[1])]

    def keep(self, tag: str, resumable: bool) -> Path:
        """把刚存下的一份另存为 ``tag``，每个文件都是原子的；返回权重的位置。"""
        copies = self.paths(tag)
        for source, target in copies if resumable else copies[:2]:
            flag = "--save_dir" if source.parent == self.run.recipe.weights.parent else "--checkpoint_dir"
            with open(source, "rb") as stream:
                checkpoint.atomic_write(
                    target, lambda file, stream=stream: shutil.copyfileobj(stream, file), flag
                )
        return copies[1][1]

    def keep_recent(self, kept: list[int]) -> list[int]:
        """留下 ``kept`` 里的最后一步（刚存下的），删掉多出来的；返回还在的步数，旧的在前。

        只删这次训练自己留下的：步数随续训存档走，别的训练留下的同名文件不动。续训存档最先删，权重随后，旁注最后。
        """
        self.keep(f"step{kept[-1]}", resumable=True)
        for step in kept[: -self.limit]:
            for _, target in reversed(self.paths(f"step{step}")):
                with contextlib.suppress(FileNotFoundError):  # 删到一半被杀过
                    target.unlink()
        return kept[-self.limit :]

    def keep_best(self, result: Mapping[str, float]) -> None:
        """验证成绩是至今最好的，就把这一步的权重另存为 ``{save_weight}_best``（留几份存档时连续训存档一起）。"""
        name = is_best(self.run.journal.log.evaluations, result)
        if name is not None and self.state.saved_step == self.state.step:
            path = self.keep("best", resumable=self.limit > 1)
            say(f"至今最好的一次（{name} {result[name]:.4f}），另存为 {path.name}。")


def is_best(evaluations: Iterable[Mapping[str, Any]], result: Mapping[str, float]) -> str | None:
    """``result`` 是不是这次训练至今最好的验证成绩；是则返回看的是哪个指标。

    Args:
        evaluations: 以前各次验证的日志行。
    """
    name = next((name for name in METRICS if name in result), None)
    if name is None or result[name] != result[name]:
        return None
    earlier = [METRICS[name] * record[name] for record in evaluations if record.get(name) is not None]
    return name if all(METRICS[name] * result[name] < value for value in earlier) else None


# ---------------------------------------------------------------- 认出是同一次训练


def contents_of(parts: Mapping[str, Any]) -> dict[str, str]:
    """清单：每一样东西在存档里的路径，与它的样子（张量的精度与形状、列表的长度，整数就是它自己，别的是类型）。"""
    found: dict[str, str] = {}

    def walk(path: str, value: Any) -> None:
        if isinstance(value, Tensor):
            found[path] = f"{value.dtype} {tuple(value.shape)}"
        elif isinstance(value, Mapping):
            for key, inner in value.items():
                walk(f"{path}/{key}", inner)
        elif isinstance(value, list | tuple):
            if any(isinstance(inner, Tensor | Mapping | list | tuple) for inner in value):
                for index, inner in enumerate(value):
                    walk(f"{path}/{index}", inner)
            else:
                found[path] = f"{type(value).__name__} {len(value)}"
        else:
            found[path] = str(value) if isinstance(value, int) else type(value).__name__

    for name, value in parts.items():
        walk(name, value)
    return found


def options_of(args: Any) -> dict[str, Any]:
    """声明过的全部参数与它们的值（没写明的已经填上）。"""
    return {field.name: getattr(args, field.name) for field in declared(type(args))}


def public_options(fields: Iterable[Field], options: Mapping[str, Any]) -> dict[str, Any]:
    """写进旁注的那一份：随权重走，所以绝对路径只留末尾的名字。"""

    def shown(field: Field) -> Any:
        value = options[field.name]
        if field.metadata["text"] not in ("path", "paths") or value is None:
            return value
        parts = [Path(part.strip()) for part in value.split(",")]  # --reward 可以有几项
        return ",".join(part.name if part.is_absolute() else str(part) for part in parts)

    return {field.name: shown(field) for field in fields}


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


def check_same_everywhere(identity: dict[str, Any], model: nn.Module, data: Data) -> None:
    """各机器各读各的数据文件：不是同一份，就会各训各的，或者步数不同而互相干等。

    Raises:
        UserError: 有进程的数据、分词器或模型与主进程的不同；指出是哪个进程。
    """
    mine = {**identity, "模型": checkpoint.config_dict(model.config), "验证集": val_identity(data)}

    def compare(everyone: list[dict[str, Any]]) -> None:
        for rank, other in enumerate(everyone):
            different = [key for key in mine if mine[key] != other[key]]
            if different:
                what = "，".join(f"{key} {other[key]!r}（主进程 {mine[key]!r}）" for key in different)
                raise UserError(
                    f"与主进程的不同：{what}",
                    where=f"进程 {rank}/{len(everyone)}",
                    expected="每台机器上的数据文件、分词器与参数都相同",
                    fix="把同一份文件放到每台机器上，或用 --data_path、--val_path 明确指出",
                )

    everyone = distributed.gather_objects(mine)
    distributed.on_main(lambda: compare(everyone))
