"""最新的存档之外还留哪些：最近几次的（``--keep_checkpoints``），与验证成绩最好的（``{save_weight}_best``）。

都只是另一个名字的权重，与别的权重一样用：``--weight full_sft_best``、``--from_weight full_sft_step400``；留了续训存档的，
``--save_weight full_sft_step400 --from_resume 1`` 从那里接着训练，写到这个名字下，原来的不动。
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minimind.console import say
from minimind.runtime import checkpoint

if TYPE_CHECKING:
    from minimind.trainer.run import Run

# 验证的指标 → 越小越好为 1，越大越好为 −1；有前面的就看前面的
METRICS = {"val_loss": 1, "val_reward": -1}


def paths(run: Run, tag: str) -> list[tuple[Path, Path]]:
    """``(现在的文件, 留下来的名字)``：权重、旁注、续训存档；``tag`` 例如 ``step400``、``best``。"""
    weight = f"{run.args.save_weight}_{tag}"
    weights = run.recipe.weights.with_name(f"{checkpoint.file_stem(run.config, weight)}.pth")
    folder = run.args.checkpoint_dir
    resume = [checkpoint.resume_path(run.config, name, folder) for name in (run.args.save_weight, weight)]
    sidecars = checkpoint.sidecar_path(run.recipe.weights), checkpoint.sidecar_path(weights)
    # 先旁注后权重：权重在的，旁注一定在
    return [sidecars, (run.recipe.weights, weights), (resume[0], resume[1])]


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
