"""``--draft`` 写的是什么 → 谁来猜后面的词元。"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from minimind.console import say
from minimind.errors import UserError
from minimind.inference.decoder import fuses
from minimind.inference.draft_model import DraftModel
from minimind.inference.int8 import Int8Linear, quantize_int8
from minimind.inference.loading import Loaded
from minimind.inference.shared import SharedModel
from minimind.inference.speculative import Drafter, PromptLookup, check_verifies
from minimind.model import count_parameters
from minimind.model.presets import PRESETS
from minimind.paths import resolve_path
from minimind.runtime.checkpoint import parse_stem
from minimind.runtime.weights import find_weights, open_weights, tokenizer_beside, weights_file
from minimind.tokenizer import tokenizer_fingerprint


def choose_drafter(
    draft: str, loaded: Loaded, weight: str, save_dir: str | Path
) -> Callable[[], Drafter] | None:
    """造猜的人的函数：引擎重建时要一个新的，几个引擎各要一个；不猜是 ``None``。

    Args:
        draft: ``auto``、``none``、``prompt``、尺寸的名字，或 ``.pth`` 路径。
        loaded: 大的那个。
        weight, save_dir: 写尺寸时用哪份权重：同名的。

    Raises:
        UserError: 写明要猜而这种模型不会核对；没有这份小权重，或它的分词器与大的不同。
    """
    if draft == "auto":  # 卡上的一步录成了图，核对还没有录，所以不是默认
        on_cpu = next(loaded.model.parameters()).device.type == "cpu"
        draft = "prompt" if on_cpu and fuses(loaded.model) else "none"
    if draft == "none":
        return None
    check_verifies(loaded.model)
    if draft == "prompt":
        return PromptLookup
    small = _open_small(_small_path(draft, weight, save_dir), loaded)
    return lambda: DraftModel(small)


def _small_path(draft: str, weight: str, save_dir: str | Path) -> Path:
    """小权重的文件。"""
    if draft.endswith(".pth"):
        return weights_file(draft)
    if draft not in PRESETS:
        raise UserError(
            f"不认识 {draft!r}",
            where="--draft",
            expected=f"auto、none、prompt，尺寸（{'、'.join(PRESETS)}），或 .pth 的路径",
            fix="改成其中一个",
        )
    name = parse_stem(weights_file(weight))[0] if weight.endswith(".pth") else weight
    sizes = PRESETS[draft]
    path = find_weights(name, save_dir, sizes["hidden_size"], bool(sizes.get("use_moe")))
    if path is None:
        raise UserError(
            f"没有 {draft} 尺寸的 {name} 权重",
            where=f"--draft {draft}",
            expected=f"{resolve_path(save_dir)} 里有 {name}_{sizes['hidden_size']}.pth",
            fix=f"先练一个（各训练命令加 --preset {draft}），写出 .pth 的路径，或改用 --draft prompt",
        )
    return path


def _open_small(path: Path, loaded: Loaded) -> SharedModel:
    """打开小权重，与大的同一设备、同一精度。"""
    model, tokenizer, _ = open_weights(path, None, tokenizer_beside(path))
    same = tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(loaded.tokenizer)
    sizes = model.config.vocab_size, loaded.model.config.vocab_size
    if not same or sizes[0] != sizes[1]:
        told = f"词表 {sizes[0]} 与 {sizes[1]}" if sizes[0] != sizes[1] else "指纹不同"
        raise UserError(
            f"小权重与 {loaded.source} 的分词器不同（{told}），猜的词元对不上",
            where=f"--draft {path}",
            expected="用同一个分词器训练的权重",
            fix="换一份权重，或改用 --draft prompt",
        )
    first = next(loaded.model.parameters())
    model.to(first.device, first.dtype).eval().requires_grad_(False)
    if any(isinstance(one, Int8Linear) for one in loaded.model.modules()):
        quantize_int8(model)
    say(f"猜后面几个词元：{path}，{count_parameters(model) / 1e6:.2f}M 参数。")
    return SharedModel(model)
