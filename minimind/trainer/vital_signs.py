"""体征：训练最常见的几种“没有在学”，每种一句话，说出可能的原因与该试什么。

损失停在 ln V、有的参数梯度恰好是 0、动得太小存不下来、学习率是 0、整步没有梯度。判断是纯函数，由一行日志与几个
统计量得出；:class:`VitalSigns` 只管攒统计量、记住说过什么：同一种毛病说一次，好了又犯才再说。
统计量留在设备上，记录时才读，不给每一步添同步；它们只看不改，权重与没有体征时逐位相同。
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

LN_V_MARGIN = 0.01  # 高于 ln V 减这么多就算没学到：正常的训练头十步就低出不止一点
FIRST_STEP = 10  # 至少走过这么多步才看损失
# 连续这么多次更新梯度恰好是 0 才算毛病：从零初始化的写回投影、LoRA 的 B 让上游头一步没有梯度；
# 专家则可能碰巧几步没分到词元
ZERO_UPDATES, ZERO_UPDATES_EXPERT = 3, 10
SAMPLES = 64  # 每个张量抽看这么多个元素
STUCK_SHARE = 1e-3  # 抽看的元素里变了的不到这么多，就算存成 fp16 后没有变

EXPERT = re.compile(r"\.experts\.\d+\.")
PART = re.compile(r"(?:.*\.)?(layers\.\d+\.(?:mlp\.(?:shared_)?experts\.\d+|mlp\.gate|\w+))\.")


# ---------------------------------------------------------------- 判断


def part_of(name: str) -> str:
    """参数属于哪一部分：``layers.3.mlp``、``layers.3.mlp.experts.1``、``embed_tokens``、``lm_head``、``norm``……"""
    found = PART.match(name)
    prefix = "critic." if name.startswith("critic.") else ""
    if found:
        return prefix + found[1]
    return prefix + name.removeprefix(prefix).removeprefix("actor.").removeprefix("model.").rsplit(".", 1)[0]


def zero_parts(streaks: Mapping[str, float], updates: float) -> list[str]:
    """梯度一直恰好是 0 的部分。

    Args:
        streaks: 参数名 → 到现在连续多少次更新梯度恰好是 0。
        updates: 这个区间里有过多少次更新；整个区间都是 0 才算。

    Returns:
        一个部分的参数全是 0 就写部分的名字，否则逐个写参数的名字。
    """

    def zero(name: str) -> bool:
        least = ZERO_UPDATES_EXPERT if EXPERT.search(name) else ZERO_UPDATES
        return streaks[name] >= max(updates, least)

    parts: dict[str, list[str]] = {}
    for name in streaks:
        parts.setdefault(part_of(name), []).append(name)
    found = []
    for part, names in parts.items():
        sick = [name for name in names if zero(name)]
        found += [part] if len(sick) == len(names) else sick
    return found


def learned_nothing(
    record: Mapping[str, Any], cross_entropy: bool, vocab_size: int, warm: bool
) -> str | None:
    """损失还在 ln V（瞎猜）：看记下的 ``ce``，没有时 ``cross_entropy`` 的配方看损失；``warm`` 表示整个区间都在预热之后。"""
    ce = record.get("ce", record["loss"] if cross_entropy else math.nan)
    if not warm or record["step"] < FIRST_STEP or not ce > math.log(vocab_size) - LN_V_MARGIN:
        return None
    return (
        f"预热过后损失仍是 {ce:.4f}，不低于瞎猜的 ln {vocab_size} = {math.log(vocab_size):.4f}，模型什么也没学到："
        "看看学习率是不是太小或太大、数据与分词器是否相配；用了 --use_compile 就先去掉再试"
    )


def no_gradient(parts: Sequence[str], updates: float) -> str | None:
    """有的部分梯度恰好是 0。"""
    if not parts:
        return None
    names = "、".join(parts[:6]) + (f" 等 {len(parts)} 处" if len(parts) > 6 else "")
    return (
        f"{names} 的梯度在这一段的 {updates:.0f} 次更新里恰好都是 0，这些参数不会再学：前向有没有用到它们、"
        "有没有被 detach 或 no_grad 隔断；专家一直分不到词元时加大负载均衡系数，用了 --use_compile 就先去掉再试"
    )


def nothing_moved(share: float, lr: float) -> str | None:
    """动得太小：``share`` 是抽看的元素里存成 fp16 后变了的比例。"""
    if lr <= 0 or not share < STUCK_SHARE:
        return None
    return (
        f"这一段的更新太小：权重存成 fp16 后几乎没有变（抽看的元素变了 {share:.2%}，学习率 {lr:.1e}）："
        "加大 --learning_rate，或检查梯度是否太小"
    )


def no_learning_rate(record: Mapping[str, Any], group_lrs: Iterable[float]) -> str | None:
    """学习率是 0。"""
    if record["lr"] > 0 and max(group_lrs, default=0.0) > 0:
        return None
    return "学习率是 0，权重不会动：检查 --learning_rate 与日程（--schedule、--warmup_ratio、--decay_ratio）"


def empty_updates(record: Mapping[str, Any], updates: float) -> str | None:
    """有的更新整个没有梯度，已经跳过。"""
    empty = record.get("zero_grad_steps", 0)
    if not empty:
        return None
    return (
        f"这一段的 {updates:.0f} 次更新里有 {empty} 次全部参数的梯度恰好是 0，已跳过（权重、动量都没有动）："
        "强化学习里是优势全为 0（全组同分），别处要查损失是否与参数断开"
    )


# ---------------------------------------------------------------- 攒


class VitalSigns:
    """一次训练的体征；状态随续训存档。

    Args:
        model: 没有包装的模型；只看 ``requires_grad`` 的参数，冻结的没有梯度不是毛病。
        saved: :meth:`state_dict` 的结果；旧存档没有。
    """

    def __init__(self, model: nn.Module, saved: Mapping[str, Any] | None = None):
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names, self.params = [name for name, _ in named], [p for _, p in named]
        device = self.params[0].device
        saved = saved or {}
        self.streaks = saved.get("streaks", torch.zeros(len(named))).to(device)
        self.snapshot = saved.get("snapshot", self._sample())
        self.said: set[str] = set(saved.get("said", ()))

    def state_dict(self) -> dict[str, Any]:
        """此刻的状态：张量都是整个换新、从不就地改的，所以不必拷贝，也不为它与设备同步。"""
        return {"streaks": self.streaks, "snapshot": self.snapshot, "said": sorted(self.said)}

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """全部梯度的 2-范数（0 维）；顺便记下哪些参数的梯度恰好是 0。不与主机同步。"""
        present = [i for i, p in enumerate(self.params) if p.grad is not None]
        if not present:
            return torch.zeros((), device=self.streaks.device)
        norms = torch.stack(torch._foreach_norm([self.params[i].grad for i in present]))
        total = torch.linalg.vector_norm(norms)
        zero = torch.ones_like(self.streaks, dtype=torch.bool)
        all_present = len(present) == len(zero)
        zero[slice(None) if all_present else torch.tensor(present).to(zero.device, non_blocking=True)] = (
            norms == 0
        )
        longer = torch.where(zero, self.streaks + 1, 0.0)
        # 整步没有梯度的更新会被跳过，另有一句，不算到各部分头上
        self.streaks = torch.where(total == 0, self.streaks, longer)
        return total

    def examine(
        self,
        record: Mapping[str, Any],
        *,
        cross_entropy: bool,
        vocab_size: int,
        warm: bool,
        updates: float,
        group_lrs: Iterable[float],
    ) -> list[str]:
        """一行日志之后：新发现的毛病，各一句。

        Args:
            record: 这一行日志。
            cross_entropy: 损失就是每个目标词元的交叉熵。
            vocab_size: 词表大小。
            warm: 整个区间都在预热之后。
            updates: 区间里正常的更新次数。
            group_lrs: 各参数组的学习率。
        """
        before, self.snapshot = self.snapshot, self._sample()
        stepped = updates - record.get("zero_grad_steps", 0)  # 真走了的更新
        found = {
            "学习率": no_learning_rate(record, group_lrs),
            "空更新": empty_updates(record, updates),
            "损失": learned_nothing(record, cross_entropy, vocab_size, warm),
        }
        if stepped > 0:
            streaks = dict(zip(self.names, self.streaks.tolist()))
            found["梯度"] = no_gradient(zero_parts(streaks, stepped), stepped)
            found["不动"] = nothing_moved(changed_share(before, self.snapshot), record["lr"])
        fresh = [sentence for kind, sentence in found.items() if sentence and kind not in self.said]
        for kind, sentence in found.items():
            (self.said.add if sentence else self.said.discard)(kind)
        return fresh

    @torch.no_grad()
    def _sample(self) -> Tensor:
        """每个参数均匀抽 ``SAMPLES`` 个元素，存成 fp16 的样子；``[n]``，在 CPU 上。"""
        flat = (p.detach().reshape(-1) for p in self.params)
        return torch.cat([x[:: max(1, len(x) // SAMPLES)][:SAMPLES].half() for x in flat]).cpu()


def changed_share(before: Tensor, after: Tensor) -> float:
    """逐元素比较，变了的比例。"""
    return float((before != after).float().mean())
