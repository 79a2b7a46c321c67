"""权重文件里是不是真的权重：一扇门，凡从磁盘来的权重都过这里，坏的在装进模型之前就说。"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minimind.errors import UserError

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_plain(state: Any, where: Path) -> None:
    """``state`` 是普通的权重字典：键是文字，值是浮点张量，每个数都有限。

    Raises:
        UserError: 指出文件、键、看到什么。
    """
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError("里面不是普通的权重字典", where=str(where), fix="续训存档请用 --from_resume 1 读取")
    for key, value in state.items():
        if not isinstance(key, str):
            raise UserError(
                f"有一个键是 {key!r}（{type(key).__name__}）",
                where=str(where),
                expected="键都是参数名，例如 model.norm.weight",
                fix="这不是模型的 state_dict()，换一个文件",
            )
        if value.dtype not in DTYPES:
            raise UserError(
                f"{key} {tuple(value.shape)} 的类型是 {_name(value.dtype)}",
                where=str(where),
                expected="、".join(map(_name, DTYPES)),
                fix="量化过的权重要先还原成浮点；推理时量化用 --quantize int8",
            )
        if not torch.isfinite(value).all():
            bad = value[~torch.isfinite(value)]
            raise UserError(
                f"{key} {tuple(value.shape)} 里有 {bad.numel():,} 个数是 NaN 或无穷",
                where=str(where),
                expected="每个数都有限",
                fix="训练已经发散，或文件坏了：换一份权重，或减小 --learning_rate 重新训练",
            )


def check_tied(model: nn.Module, state: Mapping[str, Tensor], where: Path) -> None:
    """模型共享的两份权重，文件里若都有就必须相等：绑上会丢掉一份。

    Raises:
        UserError: 指出文件、两个键。
    """
    for head, embedding in getattr(model, "tied_keys", {}).items():
        if head not in state or embedding not in state or torch.equal(state[head], state[embedding]):
            continue
        raise UserError(
            f"{head} {tuple(state[head].shape)} 与 {embedding} {tuple(state[embedding].shape)} 不相等",
            where=str(where),
            expected="两者相同（tie_word_embeddings=true：输出头与词嵌入是同一份权重）",
            fix=f"这份权重没有共享：先运行 minimind import {where}，它从内容认出来，旁注里写上 tie_word_embeddings=false",
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
