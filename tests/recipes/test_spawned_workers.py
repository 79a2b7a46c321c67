"""读数据的子进程可以是另起的（macOS、Windows 只有这一种）：九个配方的数据集与拼批都送得进去，批与主进程里的逐位相同。"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from recipe_cases import CASES
from torch.utils.data import DataLoader, Dataset

from minimind.trainer.loader import _Collate, _Numbered, _quiet_worker

BATCHES = 3


class Opened(Exception):
    """配方把数据交给训练循环的那一刻：``(数据集, 拼批)``。"""


class AllRecipes(Dataset):
    """九个配方的数据集合成一个，编号是 ``(配方, 样本)``；一次启动就都试到。"""

    def __init__(self, datasets: dict[str, Any]):
        self.datasets = datasets

    def __len__(self) -> int:
        return sum(map(len, self.datasets.values()))

    def __getitem__(self, index: tuple[str, int]) -> tuple[str, Any]:
        return index[0], self.datasets[index[0]][index[1]]


class CollateAll:
    def __init__(self, collates: dict[str, Any]):
        self.collates = collates

    def __call__(self, items: list[tuple[str, Any]]) -> tuple[str, Any]:
        return items[0][0], self.collates[items[0][0]]([item for _, item in items])


def open_recipe(name: str, world, monkeypatch) -> tuple[Any, Any]:
    """照命令行走到训练循环之前。"""

    def stop(args, recipe, model, tokenizer, data):
        raise Opened(data.train, recipe.collate)

    home = "rl" if name in ("ppo", "grpo", "spo") else name
    monkeypatch.setattr(importlib.import_module(f"minimind.recipes.{home}"), "train", stop)
    case = CASES[name]
    try:
        case.main()(case.argv(world))
    except Opened as opened:
        return opened.args
    raise AssertionError(f"{name} 没有走到训练循环")


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_另起的子进程给出同样的批(home, world, monkeypatch):
    opened = {name: open_recipe(name, world, monkeypatch) for name in CASES}
    datasets = {name: _Numbered(dataset) for name, (dataset, _) in opened.items()}
    collates = {name: _Collate(*pair) for name, pair in opened.items()}
    order = [
        [(name, index % len(datasets[name])) for index in (2 * k, 2 * k + 1)]
        for name in CASES
        for k in range(BATCHES)
    ]

    def batches(num_workers: int) -> list[tuple[str, Any]]:
        spawned = {"multiprocessing_context": "spawn", "worker_init_fn": _quiet_worker} if num_workers else {}
        loader = DataLoader(
            AllRecipes(datasets),
            batch_sampler=order,
            collate_fn=CollateAll(collates),
            num_workers=num_workers,
            **spawned,
        )
        return list(loader)

    here, spawned = batches(0), batches(2)
    assert [name for name, _ in here] == [name for name in CASES for _ in range(BATCHES)]
    for (name, (numbers, batch)), (_, other) in zip(here, spawned, strict=True):
        assert same((numbers, batch), other), name
    reason = next(batch for name, (_, batch) in here if name == "reason")
    assert {1.0, 10.0} <= set(reason["loss_weights"].unique().tolist())
