"""配方的数据：没有 ``--data_path`` 时用什么，验证集从哪里来。"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minimind.console import say
from minimind.dataset.microworld import ensure_microworld
from minimind.errors import UserError
from minimind.paths import resolve_path

# 公共项目发布过的文件名，排在前面的优先（它各版本的默认训练文件）
USUAL_FILES = {
    "pretrain": ("pretrain_hq.jsonl", "pretrain_t2t_mini.jsonl", "pretrain_t2t.jsonl"),
    "sft": (
        "sft_mini_512.jsonl",
        "sft_512.jsonl",
        "sft_1024.jsonl",
        "sft_2048.jsonl",
        "sft_t2t_mini.jsonl",
        "sft_t2t.jsonl",
    ),
}


def training_files(
    kind: str, data_path: str | None, val_path: str | None, folder: str = "dataset"
) -> tuple[Path, Path | None]:
    """训练文件与验证文件；后者为 ``None`` 表示从训练文件里划。

    没给 ``--data_path`` 时先找使用者放在 ``dataset/`` 下的惯用文件，再没有就用内置的微世界，并说一声。

    Args:
        kind: 数据的种类，也是微世界里的文件名，例如 ``pretrain``、``sft``。
        data_path, val_path: 命令行给的，可以没有。

    Raises:
        UserError: 给了路径但文件不存在。
    """
    for flag, path in (("--data_path", data_path), ("--val_path", val_path)):
        if path and not resolve_path(path).is_file():
            raise UserError(
                "数据文件不存在",
                where=f"{flag} {resolve_path(path)}",
                expected="一个 jsonl 文件",
                fix="检查路径，或去掉这个参数用内置的微世界语料",
            )
    validation = resolve_path(val_path) if val_path else None
    if data_path:
        return resolve_path(data_path), validation
    for name in USUAL_FILES.get(kind, ()):
        path = resolve_path(folder) / name
        if path.is_file():
            say(f"没有给 --data_path，用 {path}。")
            return path, validation
    world = ensure_microworld()
    say(f"没有给 --data_path，dataset/ 下也没有惯用文件，用内置的微世界语料 {world}。")
    return world / f"{kind}.jsonl", validation or world / f"{kind}_heldout.jsonl"


def open_datasets(cls: type, args: Any, tokenizer: Any) -> tuple[Any, Any]:
    """按参数打开 ``(训练集, 验证集)``；不验证（``--val_ratio 0``）或数据太少划不出时，验证集为 ``None``。

    Args:
        cls: :mod:`minimind.dataset.lm_dataset` 里的数据集类。
    """
    data_path, val_path = training_files(cls.kind, args.data_path, args.val_path)
    common = {"max_length": args.max_seq_len, "seed": args.seed, "on_bad_line": args.on_bad_line}
    if val_path:
        return cls(data_path, tokenizer, **common), cls(val_path, tokenizer, **common)
    train_ds = cls(data_path, tokenizer, split="train", val_ratio=args.val_ratio, **common)
    if not args.val_ratio:
        return train_ds, None
    val_ds = cls(data_path, tokenizer, split="val", val_ratio=args.val_ratio, **common)
    return train_ds, val_ds if len(val_ds) else None
