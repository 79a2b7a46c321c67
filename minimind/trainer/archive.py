"""存盘：写下哪些东西，最新的之外还留哪些：最近几次的（``--keep_checkpoints``），与验证成绩最好的（``{save_weight}_best``）。

都只是另一个名字的权重，与别的权重一样用：``--weight full_sft_best``、``--from_weight full_sft_step400``；留了续训存档的，
``--save_weight full_sft_step400 --from_resume 1`` 从那里接着训练，写到这个名字下，原来的不动。
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minimind.console import say
from minimind.runtime import checkpoint, distributed
from minimind.runtime.device import rng_state
from minimind.trainer import resume
from minimind.trainer.run import Run

# 验证的指标 → 越小越好为 1，越大越好为 −1；有前面的就看前面的
METRICS = {"val_loss": 1, "val_reward": -1}


class Archive:
    """把一次训练存盘：权重与旁注，续训存档。

    Attributes:
        state: 同 ``run.state``，其中 ``saved_step`` 是最近存过盘的那一步。
    """

    def __init__(self, run: Run):
        self.run, self.state = run, run.state

    def snapshot(self) -> dict[str, Any]:
        """权重与优化器之外、这一刻的全部：进度、本进程的随机数、配方状态；都是拷贝，此后怎么走都不变。"""
        run = self.run
        return {
            "step": run.state.step,
            "progress": asdict(run.state),
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
        run, args, recipe, progress = self.run, self.run.args, self.run.recipe, dict(snapshot["progress"])
        if args.keep_checkpoints > 1 and progress["step"] not in progress["kept"]:
            progress["kept"] = [*progress["kept"], progress["step"]]
        what = recipe.weights_of(run.model) if recipe.weights_of else run.model
        checkpoint.save_weights(what, recipe.weights, self.sidecar())
        checkpoint.lm_checkpoint(
            run.config,
            args.save_weight,
            model=run.model,
            optimizer=run.optimizer,
            epoch=progress["epoch"],
            step=progress["step"],
            wandb=run.journal.tracker,
            save_dir=args.checkpoint_dir,
            scaler=run.scaler,
            progress=progress,
            rng=rng,
            numerics=run.numerics,
            identity=resume.identity_of(recipe, run.data, run.tokenizer),
            vitals=snapshot["vitals"],
            val_identity=resume.val_identity(run.data),
            args=resume.options_of(args),
            lr_scales=dict(recipe.lr_scales),
            total_steps=run.state.total_steps,
            train_loss=run.state.train_loss,
            metrics=run.state.metrics,
            recipe_state=snapshot["recipe_state"],
        )
        if args.keep_checkpoints > 1:
            run.state.kept = keep_recent(run, progress["kept"])

    def sidecar(self) -> dict[str, Any]:
        """权重旁边的 JSON：聊天、服务、导出与下一阶段靠它认尺寸。"""
        run = self.run
        return {
            "config": checkpoint.config_dict(run.config),
            "tokenizer_hash": resume.tokenizer_hash(run.tokenizer),
            "recipe": run.recipe.name,
            "step": run.state.step,
            "epoch": run.state.epoch,
            "metrics": {"train_loss": run.state.train_loss, **run.state.metrics},
            "options": resume.public_options(run.args),
        }


def paths(run: Run, tag: str) -> list[tuple[Path, Path]]:
    """``(现在的文件, 留下来的名字)``：权重、旁注、续训存档；``tag`` 例如 ``step400``、``best``。"""
    weight = f"{run.args.save_weight}_{tag}"
    weights = run.recipe.weights.with_name(f"{checkpoint.file_stem(run.config, weight)}.pth")
    folder = run.args.checkpoint_dir
    saved = [checkpoint.resume_path(run.config, name, folder) for name in (run.args.save_weight, weight)]
    sidecars = checkpoint.sidecar_path(run.recipe.weights), checkpoint.sidecar_path(weights)
    # 先旁注后权重：权重在的，旁注一定在
    return [sidecars, (run.recipe.weights, weights), (saved[0], saved[1])]


def keep(run: Run, tag: str, resumable: bool) -> Path:
    """把刚存下的一份另存为 ``tag``，每个文件都是原子的；返回权重的位置。"""
    copies = paths(run, tag)
    for source, target in copies if resumable else copies[:2]:
        flag = "--save_dir" if source.parent == run.recipe.weights.parent else "--checkpoint_dir"
        with open(source, "rb") as stream:
            checkpoint.atomic_write(
                target, lambda file, stream=stream: shutil.copyfileobj(stream, file), flag
            )
    return copies[1][1]


def keep_recent(run: Run, kept: list[int]) -> list[int]:
    """留下 ``kept`` 里的最后一步（刚存下的），删掉多出来的；返回还在的步数，旧的在前。

    只删这次训练自己留下的：步数随续训存档走，别的训练留下的同名文件不动。续训存档最先删，权重随后，旁注最后。
    """
    keep(run, f"step{kept[-1]}", resumable=True)
    limit = run.args.keep_checkpoints
    for step in kept[:-limit]:
        for _, target in reversed(paths(run, f"step{step}")):
            with contextlib.suppress(FileNotFoundError):  # 删到一半被杀过
                target.unlink()
    return kept[-limit:]


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


def keep_best(run: Run, result: Mapping[str, float]) -> None:
    """验证成绩是至今最好的，就把这一步的权重另存为 ``{save_weight}_best``（留几份存档时连续训存档一起）。"""
    name = is_best(run.journal.log.evaluations, result)
    if name is not None and run.state.saved_step == run.state.step:
        path = keep(run, "best", resumable=run.args.keep_checkpoints > 1)
        say(f"至今最好的一次（{name} {result[name]:.4f}），另存为 {path.name}。")
