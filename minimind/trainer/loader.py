"""数据加载：各轮首尾相接的一个 DataLoader，轮与轮之间不停下来；每个微批次带着样本编号。"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from minimind.signals import SIGNALS
from minimind.trainer.sampler import SkipBatchSampler, epoch_order

Batch = dict[str, Any]


class _Numbered(Dataset):
    """给每个样本附上编号，出了问题才说得出是哪一个。"""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.dataset[index]


class _Collate:
    """拼批；没有分到样本的进程拿第 0 个样本凑数，权重记 0，照样参加前向反向与集合通信。"""

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Batch]):
        self.dataset, self.collate = dataset, collate

    def __call__(self, numbered: list[tuple[int, Any]]) -> tuple[list[int], Batch]:
        if not numbered:
            return [], self.collate([self.dataset[0]])
        return [index for index, _ in numbered], self.collate([item for _, item in numbered])


class _AllEpochs:
    """从（轮次，轮内样本数）处开始，依次给出本进程各轮的微批次。"""

    def __init__(
        self, size: int, seed: int, epochs: int, batch_size: int, rank: int, world_size: int, start: tuple
    ):
        self.size, self.seed, self.epochs, self.batch_size = size, seed, epochs, batch_size
        self.rank, self.world_size, self.start = rank, world_size, start

    def __iter__(self) -> Iterator[list[int]]:
        first_epoch, skip = self.start
        for epoch in range(first_epoch, self.epochs):
            yield from SkipBatchSampler(
                epoch_order(self.size, self.seed, epoch),
                self.batch_size,
                rank=self.rank,
                world_size=self.world_size,
                skip_samples=skip if epoch == first_epoch else 0,
            )


def _quiet_worker(_: int) -> None:
    """读数据的子进程不管退出信号：终端与作业系统发给整个进程组，它们先走了，主进程就走不完这一步；收尾由主进程管。"""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def training_batches(
    dataset: Any,
    collate: Callable[[list[Any]], Batch],
    *,
    seed: int,
    epochs: int,
    batch_size: int,
    rank: int,
    world_size: int,
    start: tuple[int, int],
    num_workers: int,
    pin_memory: bool,
) -> Iterator[tuple[list[int], Batch]]:
    """依次给出 ``(样本编号, 微批次)``；编号为空表示这是凑数的批，损失应乘 0。

    Args:
        start: ``(epoch, samples)``，从第几轮的第几个全局样本开始。
        num_workers: 子进程数；结果与它无关。
    """
    order = _AllEpochs(len(dataset), seed, epochs, batch_size, rank, world_size, start)
    return iter(
        DataLoader(
            _Numbered(dataset),
            batch_sampler=order,
            collate_fn=_Collate(dataset, collate),
            num_workers=num_workers,
            pin_memory=pin_memory,
            worker_init_fn=_quiet_worker if num_workers else None,
            # 自己的发生器：建迭代器要抽一个随机数，不能动用训练的随机数流，否则续训就不逐位一致
            generator=torch.Generator().manual_seed(seed),
        )
    )
