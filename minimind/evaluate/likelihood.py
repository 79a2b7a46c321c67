"""给定题干，各个选项的对数似然。一道题排成一行：题干只算一遍，选项像树枝一样从它末尾分出去。

::

    前缀 │ 题 题 题 题 │ 甲1 甲2 │ 乙1 乙2 乙3 │ 丙1
                            └ 看得见前缀、题干与自己这一枝，看不见别的枝；位置都从题干之后数起

四个选项分开算要把题干重复四遍，排成树只算一遍；少样本的前缀整组共用，只算一次，存下它的 K、V。
每个选项的最后一个 token 不必输入：它由前一个位置预测。所以单个 token 的选项（A、B、C、D）不占位置。
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minimind.errors import UserError
from minimind.inference.generate import context_length
from minimind.inference.kv_cache import StaticKVCache


@dataclass(frozen=True)
class ChoiceRow:
    """一道题的 token。

    Args:
        prefix: 整组共用的前缀（少样本示例），可以为空。
        stem: 题干，至少一个 token。
        choices: 各选项，每个至少一个 token。
    """

    prefix: tuple[int, ...]
    stem: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]

    @property
    def width(self) -> int:
        """排成树占多少个位置，不含前缀。"""
        return len(self.stem) + sum(len(choice) - 1 for choice in self.choices)

    @property
    def longest(self) -> int:
        """最长的一枝从头到尾有多少个 token。"""
        return len(self.prefix) + len(self.stem) + max(map(len, self.choices))


class SharedPrefix:
    """前缀的 K、V，各行共用：每层把它接在本次的 K、V 前面，不写回去。"""

    def __init__(self, cache: StaticKVCache, length: int):
        self.cache, self.length = cache, length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        stored = (self.cache.keys[layer_idx], self.cache.values[layer_idx])
        k, v = (
            torch.cat([old[:, :, : self.length].expand(len(new), -1, -1, -1), new], dim=2)
            for old, new in zip(stored, (key, value))
        )
        return k, v


@torch.inference_mode()
def choice_logprobs(
    model: torch.nn.Module,
    rows: Sequence[ChoiceRow],
    *,
    max_tokens: int = 0,
    advance: Callable[[int], None] = lambda count: None,
) -> list[list[float]]:
    """每道题各选项的对数似然之和（自然对数）。

    Args:
        model: 因果语言模型，在目标设备上、eval 状态。
        max_tokens: 一批最多多少个位置（含补齐，不含前缀）；0 由设备定。CPU 上小批更快：长短混在一起要补齐，26M 单线程
            1,024、4,096 分别是每秒 1,460、995 个 token。
        advance: 每做完一批调用一次，给出这批的 :attr:`ChoiceRow.width` 之和。按位置数走进度，剩余时间才准：短题先做，
            按题数估会一路变长。

    Raises:
        UserError: 有一道题长过模型的上下文。
    """
    limit = context_length(model)
    on_cpu = next(model.parameters()).device.type == "cpu"
    max_tokens = max_tokens or (1024 if on_cpu else 16384)
    if rows and (longest := max(row.longest for row in rows)) > limit:
        raise UserError(
            f"最长的一道题有 {longest} 个 token，模型的上下文只有 {limit} 个",
            fix="减少 --shots，或用 --max_length 丢掉放不下的示例",
        )
    # 整棵树放不进上下文的题，一枝一枝地算
    trees, owners = [], []
    for index, row in enumerate(rows):
        whole = len(row.prefix) + row.width <= limit
        parts = [row] if whole else [ChoiceRow(row.prefix, row.stem, (choice,)) for choice in row.choices]
        trees += parts
        owners += [index] * len(parts)
    groups: dict[tuple[int, ...], list[int]] = {}
    for tree, row in enumerate(trees):
        groups.setdefault(row.prefix, []).append(tree)
    scores: list[list[float]] = [[] for _ in trees]
    for prefix, members in groups.items():
        members.sort(key=lambda tree: trees[tree].width)
        shared = _read_prefix(model, prefix)
        for batch in _batches(members, trees, max_tokens):
            for tree, values in zip(batch, _score(model, [trees[tree] for tree in batch], shared)):
                scores[tree] = values
            advance(sum(trees[tree].width for tree in batch))
    results: list[list[float]] = [[] for _ in rows]
    for owner, values in zip(owners, scores):
        results[owner] += values
    return results


def _batches(order: Sequence[int], rows: Sequence[ChoiceRow], max_tokens: int) -> list[list[int]]:
    """``order`` 已按宽度排好，切成补齐后不超过 ``max_tokens`` 个位置的批。"""
    batches: list[list[int]] = []
    for index in order:
        if batches and rows[index].width * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _read_prefix(model: torch.nn.Module, prefix: tuple[int, ...]) -> SharedPrefix | None:
    """算好前缀；不是 MiniMind 结构时返回 ``None``，前缀逐行重算（别家的缓存类各有各的规矩）。"""
    if not prefix or model.config.model_type != "minimind":
        return None
    cache = StaticKVCache.for_model(model, 1, len(prefix))
    ids = torch.tensor([prefix], device=next(model.parameters()).device)
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return SharedPrefix(cache, len(prefix))


def _score(model: torch.nn.Module, rows: list[ChoiceRow], shared: SharedPrefix | None) -> list[list[float]]:
    """一批题。"""
    parameter = next(model.parameters())
    device, past = parameter.device, shared.length if shared else 0
    stems = [row.stem if shared else row.prefix + row.stem for row in rows]
    width = max(len(stem) + row.width - len(row.stem) for stem, row in zip(stems, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    positions = torch.zeros(len(rows), width, dtype=torch.long)
    branch = torch.full((len(rows), width), -1)  # 题干 0，第 i 个选项 i+1，补齐 -1
    asked: list[tuple[int, int, int]] = []  # (行, 位置, 要预测的 token)，按题、按选项的次序
    sizes: list[list[int]] = []
    for r, (row, stem) in enumerate(zip(rows, stems)):
        ids[r, : len(stem)] = torch.tensor(stem)
        positions[r] = torch.arange(past, past + width)
        branch[r, : len(stem)] = 0
        at = len(stem)
        for number, choice in enumerate(row.choices, start=1):
            body = choice[:-1]
            ids[r, at : at + len(body)] = torch.tensor(body, dtype=torch.long)
            positions[r, at : at + len(body)] = past + len(stem) + torch.arange(len(body))
            branch[r, at : at + len(body)] = number
            where = [len(stem) - 1, *range(at, at + len(body))]
            asked += [(r, place, token) for place, token in zip(where, choice)]
            at += len(body)
        sizes.append([len(choice) for choice in row.choices])
    mask = None
    if int(branch.max()) > 0 or shared is None:
        mask = _tree_mask(branch, positions, past).to(device)
    r, place, tokens = torch.tensor(asked, device=device).t()
    logits = _logits_at(model, ids.to(device), positions.to(device), mask, shared, r, place)
    logp = torch.log_softmax(logits.float(), dim=-1).gather(1, tokens[:, None])[:, 0].tolist()
    values = iter(logp)
    return [[sum(next(values) for _ in range(size)) for size in each] for each in sizes]


def _tree_mask(branch: Tensor, positions: Tensor, past: int) -> Tensor:
    """``[B, 1, T, past + T]`` bool：看得见前缀、题干里不在自己后面的、自己这一枝里不在自己后面的。

    补齐的位置也看得见题干（注意力不会没有东西可看），它们的输出没有人用。
    """
    earlier = positions[:, :, None] >= positions[:, None, :]
    related = (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
    visible = earlier & related
    if past:
        visible = torch.cat([visible.new_ones(*visible.shape[:2], past), visible], dim=-1)
    return visible.unsqueeze(1)


def _logits_at(
    model: torch.nn.Module,
    ids: Tensor,
    positions: Tensor,
    mask: Tensor | None,
    shared: SharedPrefix | None,
    rows: Tensor,
    places: Tensor,
) -> Tensor:
    """只在被问到的位置上算输出头，``[问题数, V]``。"""
    options: dict[str, Any] = {"input_ids": ids, "position_ids": positions}
    if model.config.model_type != "minimind":
        options["attention_mask"] = torch.zeros(mask.shape, dtype=model.dtype, device=ids.device).masked_fill(
            ~mask, torch.finfo(model.dtype).min
        )
        return model(**options, use_cache=False).logits[rows, places]
    wanted = torch.zeros_like(ids, dtype=torch.bool)
    wanted[rows, places] = True
    # 同一个位置会被几个选项的第一个 token 问到：输出头只算一次，再按次序取出
    order = wanted.flatten().cumsum(0).view_as(ids) - 1
    if shared is not None:
        options |= {"past_key_values": shared, "use_cache": True}
    return model(**options, attention_mask=mask, logits_to_keep=wanted).logits[order[rows, places]]
