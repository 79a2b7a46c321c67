"""训练与验证的划分：确定、不相交、重复的内容在同一边、验证集不会太大。"""

from __future__ import annotations

import numpy as np
import pytest
from data_helpers import chat
from hypothesis import given
from hypothesis import strategies as st

from minimind.dataset.base import MIN_DOCUMENTS, VAL_TOKENS, choose, val_mask
from minimind.dataset.encode import split_key

HASHES = st.lists(st.integers(0, 2**64 - 1), min_size=MIN_DOCUMENTS, max_size=300)


@given(HASHES, st.floats(0.001, 0.5), st.data())
def test_训练与验证不相交且合起来是全部(hashes, ratio, data):
    hashes = np.array(hashes, dtype=np.uint64)
    lengths = np.array(data.draw(st.lists(st.integers(1, 500), min_size=len(hashes), max_size=len(hashes))))
    train, val = (choose(split, hashes, lengths, ratio) for split in ("train", "val"))
    assert sorted([*train, *val]) == list(range(len(hashes)))
    assert choose("all", hashes, lengths, ratio).tolist() == list(range(len(hashes)))


@given(HASHES, st.floats(0.01, 0.5))
def test_内容相同的落在同一边(hashes, ratio):
    hashes = np.array(hashes * 2, dtype=np.uint64)
    mask = val_mask(hashes, np.full(len(hashes), 10), ratio)
    half = len(hashes) // 2
    assert (mask[:half] == mask[half:]).all()


def test_划分不随文档的次序改变():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 1000).astype(np.uint64)
    lengths = rng.integers(1, 100, 1000)
    order = rng.permutation(1000)
    assert (val_mask(hashes, lengths, 0.05)[order] == val_mask(hashes[order], lengths[order], 0.05)).all()


@pytest.mark.parametrize(("documents", "ratio"), [(1000, 0.01), (100_000, 0.01), (1_000_000, 0.2)])
def test_验证集接近比例而不超过上限(documents, ratio):
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, documents, dtype=np.uint64)
    lengths = rng.integers(1, 400, documents)
    tokens = int(lengths[val_mask(hashes, lengths, ratio)].sum())
    budget = min(ratio * lengths.sum(), VAL_TOKENS)
    assert 0.7 * budget < tokens <= budget


def test_一本书不会成为整个验证集():
    hashes = np.arange(1000, dtype=np.uint64) * np.uint64(2**50)
    lengths = np.full(1000, 100)
    lengths[0] = 5_000_000
    mask = val_mask(hashes, lengths, 0.01)
    assert not mask[0]
    assert mask.any()


def test_小数据集至少留一条而太小的不划分():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 82, dtype=np.uint64)
    assert val_mask(hashes, np.full(82, 50), 0.01).sum() == 1
    assert not val_mask(hashes[: MIN_DOCUMENTS - 1], np.full(MIN_DOCUMENTS - 1, 50), 0.5).any()
    assert not val_mask(hashes, np.full(82, 50), 0.0).any()


def test_同一个提问的不同回答有同样的划分哈希():
    assert split_key(chat("问", "甲"), "sft") == split_key(chat("问", "乙"), "sft")
    assert split_key(chat("问", "甲", "追问", "乙"), "sft") != split_key(chat("问", "甲"), "sft")
    pair = {"chosen": chat("问", "甲")["conversations"], "rejected": chat("问", "乙")["conversations"]}
    assert split_key(pair, "dpo") == split_key(chat("问", "甲"), "rl")


def test_不认识的划分名报错():
    with pytest.raises(ValueError, match=r"train \| val \| all"):
        choose("test", np.zeros(1, np.uint64), np.ones(1), 0.1)
