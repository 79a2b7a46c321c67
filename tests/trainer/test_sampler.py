"""采样：一轮里每个样本恰好一次，续训与进程数变化都不例外。"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from minimind.trainer.loader import SkipBatchSampler, epoch_order


def all_ranks(order, batch_size, world, skip):
    """各进程的微批次列表。"""
    return [
        list(SkipBatchSampler(order, batch_size, rank=r, world_size=world, skip_samples=skip))
        for r in range(world)
    ]


@given(
    size=st.integers(1, 60),
    batch_a=st.integers(1, 5),
    world_a=st.integers(1, 4),
    batch_b=st.integers(1, 5),
    world_b=st.integers(1, 4),
    cut=st.integers(0, 20),
    as_list=st.booleans(),
)
def test_换了进程数每个样本仍恰好一次(size, batch_a, world_a, batch_b, world_b, cut, as_list):
    order = epoch_order(size, seed=1, epoch=2)
    source = order.tolist() if as_list else order
    first = [batches[:cut] for batches in all_ranks(source, batch_a, world_a, 0)]
    done = sum(len(ids) for batches in first for ids in batches)
    second = all_ranks(source, batch_b, world_b, done)
    used = [i for batches in first + second for ids in batches for i in ids]
    assert sorted(used) == list(range(size))
    # 各进程的微批次数相同，否则有人会在集合通信里空等
    assert len({len(batches) for batches in second}) == 1
    assert len(second[0]) == len(SkipBatchSampler(source, batch_b, world_size=world_b, skip_samples=done))
    # 除了末尾，全局微批次都是满的；末尾各进程至多差一个
    for step in range(len(second[0])):
        sizes = [len(batches[step]) for batches in second]
        assert max(sizes) - min(sizes) <= 1
        if step < len(second[0]) - 1:
            assert sizes == [batch_b] * world_b


def test_单进程按批跳过():
    assert list(SkipBatchSampler(list(range(7)), 2, 1)) == [[2, 3], [4, 5], [6]]
    assert list(SkipBatchSampler(iter(range(7)), 2, 1)) == [[2, 3], [4, 5], [6]]
    assert len(SkipBatchSampler(range(7), 2, 1)) == 3
    assert list(SkipBatchSampler(range(7), 2, 9)) == [] and len(SkipBatchSampler(range(7), 2, 9)) == 0


@given(st.integers(0, 2**40), st.integers(0, 2**40), st.integers(0, 50), st.integers(0, 50))
def test_顺序由种子与轮次决定(seed_a, seed_b, epoch_a, epoch_b):
    a, b = epoch_order(200, seed_a, epoch_a), epoch_order(200, seed_b, epoch_b)
    assert a.sort().values.tolist() == list(range(200))
    assert (a.tolist() == b.tolist()) == ((seed_a, epoch_a) == (seed_b, epoch_b))
