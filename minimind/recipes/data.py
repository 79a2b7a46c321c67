"""配方的数据：没有 ``--data_path`` 时用什么，验证集从哪里来。"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from minimind.console import say
from minimind.dataset.packed import PackedDataset
from minimind.dataset.spec import parse_spec
from minimind.paths import resolve_path
from minimind.trainer.recipe import Data

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
    "lora_identity": ("lora_identity.jsonl",),
    "dpo": ("dpo.jsonl",),
    "reason": ("r1_mix_1024.jsonl",),
    "rl": ("rlaif-mini.jsonl", "rlaif.jsonl"),
    "agent": ("agent_rl.jsonl", "agent_rl_math.jsonl"),
}
# 填充超过这个比例就换更长的行
PADDING_LIMIT = 0.02
LONGER_ROWS = (2, 4, 8)


def training_files(
    kind: str, data_path: str | None, val_path: str | None, folder: str = "dataset"
) -> tuple[Path | str, Path | str | None]:
    """训练数据与验证数据；后者为 ``None`` 表示从训练文件里划。

    没给 ``--data_path`` 时先找使用者放在 ``dataset/`` 下的惯用文件，再没有就用内置的微世界，并说一声。

    Args:
        kind: 哪个阶段的数据，也是微世界里的文件名，例如 ``pretrain``、``sft``、``reason``。
        data_path, val_path: 命令行给的，可以没有。

    Raises:
        UserError: 给了路径，但那里没有能读的文件（说出有什么），或权重不对。
    """
    validation = named(val_path, "--val_path") if val_path else None
    if data_path:
        return named(data_path, "--data_path"), validation
    for name in USUAL_FILES.get(kind, ()):
        path = resolve_path(folder) / name
        if path.is_file():
            say(f"没有给 --data_path，用 {path}。")
            return path, validation
    from minimind.microworld import ensure_microworld  # 有数据的人不必载入它的三十个文件

    world = ensure_microworld()
    say(f"没有给 --data_path，dataset/ 下也没有惯用文件，用内置的微世界语料 {world}。")
    return world / f"{kind}.jsonl", validation or world / f"{kind}_heldout.jsonl"


def named(spec: str, flag: str) -> Path | str:
    """使用者写的数据：只是一个文件就换成它的路径，几个文件、文件夹与权重（:mod:`minimind.dataset.spec`）原样留着。"""
    parts = parse_spec(spec, flag)
    alone = len(parts) == 1 and len(parts[0].files) == 1
    return parts[0].files[0] if alone else spec


def open_datasets(cls: type, args: Any, tokenizer: Any, stage: str | None = None, **options: Any) -> Data:
    """按参数打开训练集与验证集；不验证（``--val_ratio 0``）或数据太少划不出时，验证集为 ``None``。

    打包的数据填充太多时换更长的行，``args.batch_size`` 随之变小，每批的位置数不变。

    Args:
        cls: :mod:`minimind.dataset.lm_dataset` 里的数据集类。
        stage: 哪个阶段的数据（见 :func:`training_files`），默认是 ``cls.kind``。
        options: 其余交给 ``cls`` 的参数。
    """
    data_path, val_path = training_files(stage or cls.kind, args.data_path, args.val_path)
    common = {"max_length": args.max_seq_len, "seed": args.seed, "on_bad_line": args.on_bad_line}
    common |= options
    whole = {} if val_path else {"split": "train", "val_ratio": args.val_ratio}
    train_ds = cls(data_path, tokenizer, **common, **whole)
    if issubclass(cls, PackedDataset):
        train_ds, longer = fill_rows(
            train_ds, args, lambda n: cls(data_path, tokenizer, row_length=n, **common, **whole)
        )
        common |= longer
    val_ds = None
    if val_path:
        val_ds = cls(val_path, tokenizer, **common)
    elif args.val_ratio:
        val_ds = cls(data_path, tokenizer, split="val", val_ratio=args.val_ratio, **common)
        val_ds = val_ds if len(val_ds) else None
    if words := train_ds.mixture_words():
        say(f"训练集{words}。")
    say_lost(train_ds, "训练集")
    if val_ds is not None:
        say_lost(val_ds, "验证集")
    return Data(train_ds, val_ds)


def say_lost(dataset: Any, name: str) -> None:
    """开训前的一行：丢弃与截断了多少；没有就不说。"""
    if lost := dataset.lost():
        say(f"{name} {dataset.cache.name}：{lost}；--max_seq_len 调大可以留下更多。")


def fill_rows(dataset: Any, args: Any, reopen: Callable[[int], Any]) -> tuple[Any, dict[str, int]]:
    """填充超过 2 % 就用更长的行重新拼：对话切不开，长度都略过半行时一行只装得下一段。

    行长乘 f、``args.batch_size`` 除以 f（要能整除，取填充够少的最小的 f），一批的位置数与单段的最大长度都不变。

    Args:
        reopen: 用给定的行长重新打开同一份数据。

    Returns:
        ``(数据集, 验证集也该用的选项)``。
    """
    best, factor = dataset, 1
    for candidate in LONGER_ROWS:
        enough = best.stats["padding_share"] <= PADDING_LIMIT
        # 行太少时，填充都在最后那一行，加长只会更多
        if enough or args.batch_size % candidate or len(dataset) < candidate * args.batch_size:
            continue
        longer = reopen(args.max_seq_len * candidate)
        if longer.stats["padding_share"] < best.stats["padding_share"]:
            best, factor = longer, candidate
    if factor == 1:
        return dataset, {}
    args.batch_size //= factor
    say(
        f"行长 {args.max_seq_len} 时填充占 {dataset.stats['padding_share']:.1%}；改为每行 {best.row_length}、"
        f"每批 {args.batch_size} 行，填充降到 {best.stats['padding_share']:.1%}，每批的位置数不变。"
    )
    return best, {"row_length": best.row_length}
