"""训练记录：JSON 行总是写；swanlab、wandb、tensorboard 按 ``--tracker`` 另写一份，没有网络也能用。"""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minimind.console import say
from minimind.errors import UserError
from minimind.paths import resolve_path
from minimind.runtime.checkpoint import atomic_write
from minimind.runtime.distributed import on_main
from minimind.trainer.progress import Progress
from minimind.trainer.recipe import Recipe


def is_evaluation(record: Mapping[str, Any]) -> bool:
    """日志里验证的那一行：没有训练的 ``loss``，也不是样例。"""
    return "loss" not in record and "samples" not in record


class RunLog:
    """``out/logs/{name}.jsonl``：每行一个 JSON 对象，都有 ``step``。

    重新训练时从空文件开始；续训时删去超过续训点的行再接着写，所以被杀过多少次，记录都和没被杀过一样。

    Args:
        path: 文件位置。
        keep_until: 续训点的步数；``None`` 表示重新训练。
    """

    def __init__(self, path: Path, keep_until: int | None = None):
        self.path = path
        kept = [] if keep_until is None else self._lines_until(keep_until)
        self.evaluations = [record for record in kept if is_evaluation(record)]
        # 样例写在验证的那一行之前：停在两行之间的，续训会补上验证，样例也重来
        kept = [
            record for record in kept if "samples" not in record or record["step"] in self.evaluated_steps
        ]
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
        atomic_write(path, lambda file: file.write(text.encode()))

    @property
    def evaluated_steps(self) -> set[int]:
        """已经验证过的步。"""
        return {record["step"] for record in self.evaluations}

    def _lines_until(self, step: int) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # 被杀时写了一半的末行
                continue
            if record.get("step", 0) <= step:
                kept.append(record)
        return kept

    def write(self, record: dict[str, Any]) -> None:
        """追加一行；NaN 与无穷写成 null，保证是合法 JSON。"""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        if is_evaluation(clean):
            self.evaluations.append(clean)
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(clean, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(
                f"写训练记录失败（{error.strerror}）",
                where=str(self.path),
                fix="腾出磁盘空间或换 --save_dir 后加 --from_resume 1 继续",
            ) from error


def write_card(log_path: Path, card: dict[str, Any]) -> None:
    """日志旁边的卡片 ``{name}.card.json``：配方、总步数之类，日志的行里没有的；看训练的页面靠它知道还剩多少。"""
    text = json.dumps(card, ensure_ascii=False, indent=1) + "\n"
    atomic_write(log_path.with_suffix(".card.json"), lambda file: file.write(text.encode()))


class Tracker:
    """记录工具的统一外表：``log``、``id``、``finish``。基类什么也不做。"""

    id: str | None = None

    def log(self, values: dict[str, float], step: int) -> None:
        pass

    def finish(self) -> None:
        pass


class _RunTracker(Tracker):
    """swanlab 与 wandb 的接口几乎相同。"""

    def __init__(self, module: Any, run: Any):
        self.module, self.run = module, run
        self.id = getattr(run, "id", None) or getattr(getattr(run, "public", None), "run_id", None)

    def log(self, values: dict[str, float], step: int) -> None:
        self.module.log(values, step=step)

    def finish(self) -> None:
        self.module.finish()


class _TensorBoardTracker(Tracker):
    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder))

    def log(self, values: dict[str, float], step: int) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def finish(self) -> None:
        self.writer.close()


def _logged_in(name: str) -> bool:
    """有 API key，或用 ``wandb login`` / ``swanlab login`` 登录过。"""
    if os.environ.get(f"{name.upper()}_API_KEY"):
        return True
    saved = {"wandb": [".netrc", "_netrc"], "swanlab": [".swanlab/.netrc"]}[name]
    files = [Path.home() / file for file in saved]
    return any(file.is_file() and name in file.read_text(errors="ignore") for file in files)


def start_tracker(
    name: str, *, project: str, run_name: str, folder: Path, config: dict[str, Any], run_id: str | None = None
) -> Tracker:
    """打开 ``--tracker`` 指定的记录工具。

    没有登录（没有对应的 API key）时写到本地，不要求联网，也不停下来问。

    Args:
        run_id: 续训时上一次运行的编号，接在同一条曲线后面。

    Raises:
        UserError: 没装对应的包。
    """
    if name == "none":
        return Tracker()
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"没有安装 {name}", where=f"--tracker {name}", fix=f"pip install {name}，或去掉这个参数"
        ) from error
    if name == "tensorboard":
        return _TensorBoardTracker(folder / "tensorboard" / run_name)
    folder.mkdir(parents=True, exist_ok=True)
    common = {"project": project, "config": config, "id": run_id, "resume": "allow" if run_id else None}
    if name == "wandb":
        mode = os.environ.get("WANDB_MODE") or ("online" if _logged_in(name) else "offline")
        run = module.init(name=run_name, dir=str(folder), mode=mode, **common)
    else:
        mode = os.environ.get("SWANLAB_MODE") or ("cloud" if _logged_in(name) else "local")
        run = module.init(experiment_name=run_name, logdir=str(folder / "swanlab"), mode=mode, **common)
    if mode in ("offline", "local"):
        say(f"{name} 没有登录，记录写在本地：{folder}")
    return _RunTracker(module, run)


@dataclass
class Journal:
    """一次训练的 JSON 行日志与记录工具；``log`` 与 ``tracker`` 只在主进程上有。"""

    path: Path
    log: RunLog | None
    tracker: Tracker | None
    told_total: bool = False

    @classmethod
    def open(cls, args: Any, recipe: Recipe, state: Progress, saved: dict[str, Any]) -> Journal:
        """重新训练时从空的开始，续训时接在存档那一步之后。"""
        folder, name = resolve_path(args.save_dir) / "logs", recipe.weights.stem
        path = folder / f"{name}.jsonl"

        def open_both() -> tuple[RunLog, Tracker]:
            log = RunLog(path, state.step if saved else None)
            tracker = start_tracker(
                "swanlab" if args.use_wandb and args.tracker == "none" else args.tracker,
                project=args.wandb_project,
                run_name=name,
                folder=folder,
                config={k: v for k, v in vars(args).items() if not k.startswith("_")},
                run_id=saved.get("wandb_id"),
            )
            return log, tracker

        return cls(path, *(on_main(open_both) or (None, None)))

    def write(self, record: dict[str, Any], step: int) -> None:
        """主进程写一行 JSON；其中的数也交给记录工具。"""
        if self.log is not None:
            self.log.write(record)
            numbers = {k: v for k, v in record.items() if isinstance(v, (int, float))}
            values = {k: v for k, v in numbers.items() if k != "step" and math.isfinite(v)}
            if values:  # 样例的行里没有数
                self.tracker.log(values, step)

    def close(self) -> None:
        if self.tracker is not None:
            self.tracker.finish()
