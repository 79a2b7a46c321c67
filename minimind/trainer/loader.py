"""数据的顺序与加载。顺序只由（种子，轮次）决定，与进程数无关，续训时直接跳到第 k 个样本；各轮首尾相接成一个 DataLoader，
轮与轮之间不停下来，每个微批次带着样本编号。
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from minimind.runtime.distributed import rank, world_size
from minimind.signals import SIGNALS
from minimind.trainer.recipe import Batch


def epoch_order(size: int, seed: int, epoch: int) -> torch.Tensor:
    """第 ``epoch`` 轮的样本顺序 ``[size]``：全体样本的一个排列，各进程算出来都一样。"""
    # torch 的发生器只看种子的低 32 位；NumPy 的把两个数一起散列，不会撞
    generator = np.random.default_rng([seed % 2**64, epoch])
    return torch.from_numpy(generator.permutation(size))


class SkipBatchSampler(Sampler):
    """把样本序列切成微批次，跳过已用过的，给出属于本进程的那一份。

    全局微批次是连续的 ``batch_size × world_size`` 个样本，第 r 个进程取其中第 r、r+W、r+2W… 个。
    最后一个全局微批次可能不满，此时各进程分到的个数至多差一，可能为空列表——所有进程的微批次数总是相同，
    谁也不会少参加一次集合通信。

    已用过的样本按*全局样本数*记，所以换了进程数、批大小照样一个不漏、一个不重。

    Args:
        sampler: 样本下标的序列（切片即可跳过，O(1)）或任意可迭代对象（逐个跳过）；各进程须传同一个。
        batch_size: 每个进程每个微批次的样本数。
        skip_batches: 跳过多少个全局微批次（``skip_samples`` 未给时用）。
        rank, world_size: 本进程序号与进程数。
        skip_samples: 跳过多少个全局样本。
    """

    def __init__(
        self,
        sampler: Sequence[int] | Iterable[int],
        batch_size: int,
        skip_batches: int = 0,
        *,
        rank: int = 0,
        world_size: int = 1,
        skip_samples: int | None = None,
    ):
        self.sampler, self.batch_size, self.rank, self.world_size = sampler, batch_size, rank, world_size
        self.global_batch = batch_size * world_size
        self.skip_samples = skip_batches * self.global_batch if skip_samples is None else skip_samples

    def __iter__(self) -> Iterator[list[int]]:
        if isinstance(self.sampler, (Sequence, torch.Tensor)):
            size = len(self.sampler)
            for start in range(self.skip_samples, size, self.global_batch):
                mine = self.sampler[
                    start + self.rank : min(start + self.global_batch, size) : self.world_size
                ]
                yield mine.tolist() if isinstance(mine, torch.Tensor) else list(mine)
            return
        rest = islice(iter(self.sampler), self.skip_samples, None)
        while chunk := list(islice(rest, self.global_batch)):
            yield chunk[self.rank :: self.world_size]

    def __len__(self) -> int:
        left = max(0, len(self.sampler) - self.skip_samples)  # type: ignore[arg-type]
        return -(-left // self.global_batch)


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


def _quiet_worker(_: int) -> None:
    """读数据的子进程不管退出信号：终端与作业系统发给整个进程组，它们先走了，主进程就走不完这一步；收尾由主进程管。"""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def batch_order(
    size: int, *, seed: int, epochs: int, batch_size: int, start: tuple[int, int]
) -> Iterator[list[int]]:
    """本进程的微批次，各是样本编号的列表：从（轮次，轮内样本数）``start`` 起，一轮接一轮。"""
    first, skip = start
    for epoch in range(first, epochs):
        yield from SkipBatchSampler(
            epoch_order(size, seed, epoch),
            batch_size,
            rank=rank(),
            world_size=world_size(),
            skip_samples=skip if epoch == first else 0,
        )


def training_batches(
    dataset: Any,
    collate: Callable[[list[Any]], Batch],
    *,
    seed: int,
    epochs: int,
    batch_size: int,
    device: torch.device,
    start: tuple[int, int] = (0, 0),
    num_workers: int | None = None,
) -> Iterator[tuple[list[int], Batch]]:
    """依次给出 ``(样本编号, 微批次)``；编号为空表示这是凑数的批，损失应乘 0。

    Args:
        device: 批最后要去的设备，这里只据它定怎么取；给出的批都在内存里。
        start: ``(epoch, samples)``，从第几轮的第几个全局样本开始。
        num_workers: 子进程数；结果与它无关。
    """
    if num_workers is None:  # 卡上训练一步只有几十毫秒，取数要放到子进程里；CPU 上子进程只会抢算力
        num_workers = 0 if device.type == "cpu" else 2
    return iter(
        DataLoader(
            _Numbered(dataset),
            batch_sampler=batch_order(
                len(dataset), seed=seed, epochs=epochs, batch_size=batch_size, start=start
            ),
            collate_fn=_Collate(dataset, collate),
            num_workers=num_workers,
            pin_memory=device.type == "cuda",
            worker_init_fn=_quiet_worker if num_workers else None,
            # 自己的发生器：建迭代器要抽一个随机数，不能动用训练的随机数流，否则续训就不逐位一致
            generator=torch.Generator().manual_seed(seed),
        )
    )
