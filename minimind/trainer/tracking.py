"""``--tracker`` 的记录工具：swanlab、wandb、tensorboard，没有网络也能用；JSON 行总是另写，见 :mod:`minimind.trainer.journal`。"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from minimind.console import say
from minimind.errors import UserError


class Tracker:
    """记录工具的统一外表：``log``、``id``、``finish``；swanlab 与 wandb 的接口几乎相同。"""

    def __init__(self, module: Any, run: Any):
        self.module, self.run = module, run
        self.id = getattr(run, "id", None) or getattr(getattr(run, "public", None), "run_id", None)

    def log(self, values: dict[str, float], step: int) -> None:
        self.module.log(values, step=step)

    def finish(self) -> None:
        self.module.finish()


class TensorBoardTracker:
    """同一副外表，写成 tensorboard 的文件；它没有续得上的编号。"""

    id = None

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
) -> Tracker | TensorBoardTracker:
    """打开 ``--tracker`` 指定的记录工具，返回值有 ``id``、``log(数, 步)`` 与 ``finish()``。

    没有登录（没有对应的 API key）时写到本地，不要求联网，也不停下来问。

    Args:
        run_id: 续训时上一次运行的编号，接在同一条曲线后面。

    Raises:
        UserError: 没装对应的包。
    """
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"没有安装 {name}", where=f"--tracker {name}", fix=f"pip install {name}，或去掉这个参数"
        ) from error
    if name == "tensorboard":
        return TensorBoardTracker(folder / "tensorboard" / run_name)
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
    return Tracker(module, run)
