"""内存不够时说清该动哪个参数：设备报的只有“还差多少”，使用者要的是下一条命令。"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from minimind.errors import UserError

T = TypeVar("T")
# torch.OutOfMemoryError 之外的：NPU、MPS 与 CPU 的分配器只抛 RuntimeError，认它们的话
SAYINGS = ("out of memory", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """是不是设备或主机的内存不够。"""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in SAYINGS)


def remedies(args: Any) -> str:
    """按代价从小到大的办法，各带现在的值；已经到头的不提。

    Args:
        args: :class:`minimind.trainer.train_args.TrainArguments` 或其子类。
    """
    ways = []
    if args.batch_size > 1:
        half = args.batch_size // 2
        more = -(-args.batch_size * args.accumulation_steps // half)
        ways.append(
            f"--batch_size {half} --accumulation_steps {more}"
            f"（现在 {args.batch_size} 与 {args.accumulation_steps}；每步的样本不少，只是分几次算）"
        )
    rows = getattr(args, "rows_per_forward", 1)
    if rows > 1:
        ways.append(f"--rows_per_forward {rows // 2}（现在 {rows}；打分与更新时一次少算几条）")
    if args.checkpoint_layers != "all":
        ways.append(
            f"--checkpoint_layers all（现在 {args.checkpoint_layers}；结果不变，多花至多三分之一的时间）"
        )
    if args.max_seq_len > 64:
        ways.append(
            f"--max_seq_len {args.max_seq_len // 2}（现在 {args.max_seq_len}；长文会切开或截短，要从头训练）"
        )
    return "；或 ".join(ways) or "换小一号的 --preset，或内存大的设备"


def explain_out_of_memory(train: Callable[..., T]) -> Callable[..., T]:
    """包住 ``train(args, …)``：内存不够变成一句说得出办法的 :class:`UserError`。"""

    @functools.wraps(train)
    def wrapped(args: Any, *rest: Any, **named: Any) -> T:
        try:
            return train(args, *rest, **named)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise UserError(
                f"内存不够：{first}",
                where="训练",
                fix=f"{remedies(args)}。此前的存档没有动，前几样换好后加 --from_resume 1 接着训练",
            ) from error

    return wrapped
