"""数据顺序：只由（种子，轮次）决定，与进程数无关；续训时直接跳到第 k 个样本。"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from torch.utils.data import Sampler


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
