"""要导出的东西：一份本项目的权重，连同配置、分词器与旁注。"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minimind.errors import UserError
from minimind.inference.loading import load_for_inference, stop_ids
from minimind.model import MiniMindConfig
from minimind.runtime.checkpoint import read_sidecar, read_state

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class Source:
    """打开的权重。

    Args:
        state: fp32 状态字典；词嵌入与输出头共享时没有 ``lm_head.weight``。
        dtype: 权重文件自己的精度，``--dtype auto`` 用它。
        sidecar: 训练时写的旁注，没有时为空字典。
        plain: 真为只会续写的预训练权重。
        stop_ids: 生成时遇到就停的 token。
    """

    config: MiniMindConfig
    state: dict[str, Tensor]
    tokenizer: Any
    path: Path
    dtype: torch.dtype
    sidecar: dict[str, Any]
    plain: bool
    stop_ids: list[int]


def open_source(
    name: str,
    save_dir: str = "out",
    lora_weight: str = "None",
    tokenizer_path: str | None = None,
    inference_rope_scaling: bool = False,
    **sizes: Any,
) -> Source:
    """按名字（``full_sft``）或文件（``out/full_sft_512.pth``）打开权重；给了 LoRA 就先合并进去。

    Args:
        sizes: ``hidden_size``、``num_hidden_layers``、``use_moe``、``arch``；没有旁注的权重要用。

    Raises:
        UserError: 没有这份权重，或尺寸不符。
    """
    loaded = load_for_inference(
        save_dir=save_dir,
        weight=name,
        lora_weight=lora_weight,
        tokenizer_path=tokenizer_path,
        inference_rope_scaling=inference_rope_scaling,
        device="cpu",
        dtype="float32",
        **sizes,
    )
    config = loaded.model.config
    state = {key: value.detach() for key, value in loaded.model.state_dict().items()}
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    stored = read_state(loaded.source)
    dtype = next(value.dtype for value in stored.values() if value.is_floating_point())
    return Source(
        config=config,
        state=state,
        tokenizer=loaded.tokenizer,
        path=loaded.source,
        dtype=dtype,
        sidecar=read_sidecar(loaded.source) or {},
        plain=loaded.plain,
        stop_ids=sorted(stop_ids(loaded.model, loaded.tokenizer)),
    )


def cast(state: dict[str, Tensor], dtype: torch.dtype, where: str) -> dict[str, Tensor]:
    """整份转成 ``dtype``；转不下（fp16 最大 65504）或本来就坏了的值是错误，不悄悄写成 inf。

    Raises:
        UserError: 指出是哪个键、最大的绝对值是多少。
    """
    result = {}
    for key, value in state.items():
        result[key] = value.to(dtype).contiguous()
        if not torch.isfinite(result[key]).all():
            broken = not torch.isfinite(value).all()
            what = "有 NaN 或 inf" if broken else f"最大的绝对值 {value.abs().max():.4g} 超出 {dtype} 的范围"
            fix = (
                "训练已经发散，换一份权重"
                if broken
                else "换 --dtype bfloat16 或 float32（GGUF 换 --type f32）"
            )
            raise UserError(f"{key} {what}", where=where, fix=fix)
    return result
