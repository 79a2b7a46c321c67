"""十个配方共同的开头与入口：命令行、进程组、起点的模型，训练与验证的数据从哪里来。"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minimind.arguments import parse_args
from minimind.console import say
from minimind.dataset.packed import PackedDataset
from minimind.dataset.spec import parse_spec
from minimind.errors import guard
from minimind.model import MiniMindLM
from minimind.paths import resolve_path
from minimind.runtime.checkpoint import weights_path
from minimind.runtime.distributed import broadcast_object, on_main, shutdown_distributed
from minimind.runtime.weights import init_model, tokenizer_beside
from minimind.trainer.recipe import Data
from minimind.trainer.setup import model_config, start_run

# 填充超过这个比例就换更长的行
PADDING_LIMIT = 0.02
LONGER_ROWS = (2, 4, 8)


def entry(arguments: type, run: Callable[[Any], Any]) -> Callable[..., int]:
    """配方的 ``main(argv=None) -> 退出码``：解析参数，运行，不论怎么结束都解散进程组。

    Args:
        arguments: 参数的 dataclass。
        run: 收下它的函数。
    """

    @guard
    def main(argv: list[str] | None = None) -> None:
        """命令行入口。"""
        args = parse_args(arguments, argv)
        try:
            with contextlib.ExitStack() as stack:
                if args.watch:
                    from minimind.watch.beside import page_beside  # 不开页面的不必载入它

                    stack.enter_context(page_beside(args.save_dir))
                run(args)
        except BaseException as error:
            shutdown_distributed(error)
            raise
        shutdown_distributed()

    return main


def open_model(args: Any) -> tuple[MiniMindLM, Any]:
    """建进程组、选设备、设种子，再按参数打开起点的模型。

    Returns:
        ``(model, tokenizer)``，模型是 fp32，已在它的设备上（``model.device``）。
    """
    device = start_run(args)
    config = model_config(args)
    if args.from_weight != "none" and not args.tokenizer_path:
        start = weights_path(config, args.from_weight, args.save_dir)
        args.tokenizer_path = broadcast_object(on_main(lambda: tokenizer_beside(start)))
    model, tokenizer = init_model(config, args.from_weight, args.tokenizer_path, args.save_dir, device)
    args.arch = model.config.arch  # 没写的由起点定下，记进旁注
    model.config.record_trained_length(args.trained_length(model.config.trained_length))
    return model, tokenizer


def training_files(
    kind: str, data_path: str | None, val_path: str | None, folder: str = "dataset", arch: str = "v2"
) -> tuple[Path | str, Path | str | None]:
    """训练数据与验证数据；后者为 ``None`` 表示从训练文件里划。

    没给 ``--data_path`` 时先找使用者放在 ``dataset/`` 下的惯用文件，再没有就用内置的微世界，并说一声。

    Args:
        kind: 哪个阶段的数据，也是微世界里的文件名，例如 ``pretrain``、``sft``、``reason``。
        data_path, val_path: 命令行给的，可以没有。
        arch: 模型的布局；两代的惯用文件都有时，用同一代的。

    Raises:
        UserError: 给了路径，但那里没有能读的文件（说出有什么），或权重不对。
    """
    validation = named(val_path, "--val_path") if val_path else None
    if data_path:
        return named(data_path, "--data_path"), validation
    from minimind.dataset.published import usual_files

    for name in usual_files(kind, arch):
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
        cls: 数据集类，见 :mod:`minimind.dataset`。
        stage: 哪个阶段的数据（见 :func:`training_files`），默认是 ``cls.kind``。
        options: 其余交给 ``cls`` 的参数。
    """
    data_path, val_path = training_files(
        stage or cls.kind, args.data_path, args.val_path, arch=args.arch or "v2"
    )
    common = {"max_length": args.max_seq_len, "seed": args.seed, "on_bad_line": args.on_bad_line}
    common |= options
    whole = {} if val_path else {"split": "train", "val_ratio": args.val_ratio}
    train_ds = cls(data_path, tokenizer, **common, **whole)
    if issubclass(cls, PackedDataset):
        train_ds, factor = fill_rows(
            train_ds, args.batch_size, lambda n: cls(data_path, tokenizer, row_length=n, **common, **whole)
        )
        if factor > 1:
            args.batch_size //= factor
            common["row_length"] = train_ds.row_length
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


def fill_rows(dataset: Any, batch_size: int, reopen: Callable[[int], Any]) -> tuple[Any, int]:
    """填充超过 2 % 就用更长的行重新拼：对话切不开，长度都略过半行时一行只装得下一段。

    行长乘 f、批大小除以 f（要能整除，取填充够少的最小的 f），一批的位置数与单段的最大长度都不变。

    Args:
        reopen: 用给定的行长重新打开同一份数据。

    Returns:
        ``(数据集, f)``；不换时 f 是 1。
    """
    best, factor = dataset, 1
    for candidate in LONGER_ROWS:
        enough = best.stats["padding_share"] <= PADDING_LIMIT
        # 行太少时，填充都在最后那一行，加长只会更多
        if enough or batch_size % candidate or len(dataset) < candidate * batch_size:
            continue
        longer = reopen(dataset.row_length * candidate)
        if longer.stats["padding_share"] < best.stats["padding_share"]:
            best, factor = longer, candidate
    if factor > 1:
        say(
            f"行长 {dataset.row_length} 时填充占 {dataset.stats['padding_share']:.1%}；改为每行 {best.row_length}、"
            f"每批 {batch_size // factor} 行，填充降到 {best.stats['padding_share']:.1%}，每批的位置数不变。"
        )
    return best, factor
