"""打包：不丢一个 token、不重复一个目标、几乎没有填充、快慢与文档数无关。"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.dataset.packing import pack_documents, split_long, trim_to_turns

LENGTHS = st.lists(st.integers(0, 300), max_size=60)


@given(LENGTHS, st.integers(2, 64))
def test_切块后每个token恰好当一次目标(lengths, max_len):
    doc, begin, length = split_long(np.array(lengths, dtype=np.int64), max_len)
    assert (length <= max_len).all()
    assert (length >= 2).all()
    targets = [(d, b + k) for d, b, n in zip(doc, begin, length) for k in range(1, n)]
    assert sorted(targets) == [(d, k) for d, n in enumerate(lengths) for k in range(1, n)]


@given(LENGTHS, st.integers(2, 64), st.integers(1, 4), st.integers(0, 3))
def test_可切的打包不丢字不重复目标(lengths, max_len, factor, seed):
    packing = pack_documents(np.array(lengths), max_len, seed, row_len=max_len * factor)
    rows = np.diff(packing.row_offsets)
    assert (rows > 0).all()
    assert packing.row_offsets[-1] == len(packing.doc)
    for first, last in zip(packing.row_offsets, packing.row_offsets[1:]):
        assert packing.length[first:last].sum() <= max_len * factor
    assert (packing.length <= max_len).all()
    targets = [(d, b + k) for d, b, n in zip(packing.doc, packing.begin, packing.length) for k in range(1, n)]
    assert sorted(targets) == [(d, k) for d, n in enumerate(lengths) for k in range(1, n)]


@given(st.lists(st.integers(0, 64), max_size=80), st.integers(0, 3))
def test_不可切的打包每篇完整地出现一次(lengths, seed):
    packing = pack_documents(np.array(lengths, dtype=np.int64), 64, seed, splittable=False)
    used = [d for d, n in enumerate(lengths) if n >= 2]
    assert sorted(packing.doc.tolist()) == used
    assert (packing.begin == 0).all()
    assert (packing.length == np.array(lengths, dtype=np.int64)[packing.doc]).all()
    for first, last in zip(packing.row_offsets, packing.row_offsets[1:]):
        assert packing.length[first:last].sum() <= 64


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([340, 512, 1024]),
    st.floats(2.5, 7.0),
    st.floats(0.0, 1.0),
    st.integers(0, 100),
)
def test_预训练文本无论长短填充都小于百分之二(max_len, mean_log, sigma, seed):
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(mean_log, sigma, 30_000), 3, 20_000).astype(np.int64)
    # 少于 50 行时，装不满的最后一行自己就占百分之二
    lengths = lengths if lengths.sum() > 100 * max_len else np.repeat(lengths, 10)
    assert pack_documents(lengths, max_len, seed).padding_share(max_len) < 0.02


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([340, 512, 1024]), st.floats(2.5, 4.8), st.floats(0.5, 1.0), st.integers(0, 100))
def test_对话的填充小于百分之二(max_len, mean_log, sigma, seed):
    """常见的分布：多数明显短于一行，少数截到整行。"""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(mean_log, sigma, 20_000), 8, max_len).astype(np.int64)
    assert pack_documents(lengths, max_len, seed, splittable=False).padding_share(max_len) < 0.02


def test_都略过半行的对话用几倍的行长消掉填充():
    lengths = np.random.default_rng(0).integers(180, 300, 5000)
    assert pack_documents(lengths, 340, splittable=False).padding_share(340) > 0.25
    assert pack_documents(lengths, 340, splittable=False, row_len=4 * 340).padding_share(4 * 340) < 0.02


def test_同一种子同一方案而换种子换搭配():
    lengths = np.random.default_rng(0).integers(5, 100, 2000)
    a, b, c = (pack_documents(lengths, 128, seed) for seed in (1, 1, 2))
    assert all((x == y).all() for x, y in zip(a, b))
    assert (a.doc[:50] != c.doc[:50]).any()


def test_步数与文档数无关():
    """一百万篇也只走几百步：靠步数而不是时间来断言。"""
    from minimind.dataset import packing

    calls = 0
    original = packing._fill_one_row

    def counted(*args):
        nonlocal calls
        calls += 1
        return original(*args)

    packing._fill_one_row = counted
    try:
        pack_documents(np.random.default_rng(0).integers(10, 340, 1_000_000), 340, splittable=False)
    finally:
        packing._fill_one_row = original
    assert calls < 2000


def test_行长与段长不合理时报错():
    with pytest.raises(ValueError, match="max_len=1"):
        pack_documents(np.array([5]), 1)
    with pytest.raises(ValueError, match="长 9"):
        pack_documents(np.array([9]), 4, splittable=False)
    with pytest.raises(ValueError, match="小于段长"):
        pack_documents(np.array([9]), 4, row_len=3)


def test_没有文档时没有行():
    packing = pack_documents(np.zeros(0, dtype=np.int64), 16)
    assert len(packing.row_offsets) == 1
    assert packing.padding_share(16) == 0.0


@pytest.mark.parametrize(
    ("length", "spans", "max_len", "keep"),
    [
        (20, [[5, 18]], 20, 18),  # 放得下：末尾没有目标的换行不占位置
        (40, [[5, 12], [20, 38]], 30, 12),  # 留下完整的第一回合，不截第二回合
        (40, [[5, 12], [20, 28], [32, 38]], 30, 28),
        (40, [[5, 38]], 30, 30),  # 第一个回答就放不下：截断，结束符（第 37 个）不在其中
        (40, [[30, 38]], 30, 0),  # 目标全在截断之后
        (40, [[29, 38]], 30, 30),
        (40, [], 30, 0),
    ],
)
def test_对话截到完整的回合(length, spans, max_len, keep):
    array = np.array(spans, dtype=np.int32).reshape(-1, 2)
    got = trim_to_turns(np.array([length]), array, np.array([0, len(spans)]), max_len)
    assert got.tolist() == [keep]


@given(st.data())
def test_成批截断与逐条相同(data):
    docs = []
    for _ in range(data.draw(st.integers(1, 8))):
        cuts = sorted(data.draw(st.sets(st.integers(1, 60), max_size=8)))
        docs.append([[a, b] for a, b in zip(cuts[::2], cuts[1::2])])
    offsets = np.concatenate([[0], np.cumsum([len(d) for d in docs])])
    spans = np.array([s for d in docs for s in d], dtype=np.int32).reshape(-1, 2)
    lengths = np.array([70] * len(docs))
    together = trim_to_turns(lengths, spans, offsets, 40)
    alone = [
        trim_to_turns(lengths[:1], np.array(d, np.int32).reshape(-1, 2), np.array([0, len(d)]), 40)[0]
        for d in docs
    ]
    assert together.tolist() == alone
