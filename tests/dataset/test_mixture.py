"""按权重配：每一轮精确到条，与进程数、续训、文件的外壳无关；任何一份内容或权重变了就是另一份数据。"""

from __future__ import annotations

import pickle
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from data_helpers import chat, write_shell
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.dataset import DPODataset, PretrainDataset, RLAIFDataset, SFTDataset, packed
from minimind.dataset.base import source_words
from minimind.dataset.mixture import draw, exact_counts
from minimind.errors import UserError
from minimind.trainer.loader import SkipBatchSampler, epoch_order

SIZES = {"a.jsonl": 70, "b.jsonl.gz": 25, "c.json": 9}
WEIGHTS = {"a.jsonl": "0.5", "b.jsonl.gz": "0.3", "c.json": "0.2"}
# 104 条：52、31.2、20.8 → 最大余数法
EXPECTED = {"a.jsonl": 52, "b.jsonl.gz": 31, "c.json": 21}


def record(kind: str, name: str, i: int) -> dict:
    text = f"{name} 的第 {i} 条" + "，后面还有一些话" * (i % 5)
    if kind == "pretrain":
        return {"text": text}
    if kind == "dpo":
        return {side: chat(text, side + text)["conversations"] for side in ("chosen", "rejected")}
    return chat(text, "答" + text)


def write(folder, kind: str, names=SIZES) -> str:
    """三个文件，返回带权重的写法。"""
    for name in names:
        write_shell(folder / name, [record(kind, name, i) for i in range(SIZES[name])])
    return ",".join(f"{folder / name}:{WEIGHTS[name]}" for name in names)


DATASETS = {"pretrain": PretrainDataset, "sft": SFTDataset, "dpo": DPODataset, "rl": RLAIFDataset}


def uses(dataset, samples) -> Counter:
    """这些样本里，每个 ``(文件名, 行号)`` 用了几次；切开的文档只数开头的一块。"""
    found: Counter = Counter()
    for index in samples:
        if isinstance(dataset, packed.PackedDataset):
            first, last = dataset._segments(index)
            docs = [int(dataset.packing.doc[s]) for s in range(first, last) if dataset.packing.begin[s] == 0]
        else:
            docs = dataset.source_docs(index)
        for doc in docs:
            file, line = dataset.cache.origin(doc)
            found[file.name, line] += 1
    return found


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(st.integers(1, 10**6), min_size=1, max_size=8), total=st.integers(1, 10**7))
def test_分给各组的条数_和恰好是总数_各与份额差不到一条(parts, total):
    weights = [Fraction(n, sum(parts)) for n in parts]
    counts = exact_counts(weights, total)
    assert sum(counts) == total
    assert all(abs(count - weight * total) < 1 for count, weight in zip(counts, weights, strict=True))


@settings(max_examples=200, deadline=None)
@given(
    size=st.integers(1, 40),
    count=st.integers(0, 100),
    seed=st.integers(0, 2**63 - 1),
    part=st.integers(0, 5),
    epochs=st.integers(1, 4),
)
def test_抽取无放回_用完一遍再来一遍_各轮接着抽(size, count, seed, part, epochs):
    drawn = [draw(size, count, seed, part, epoch) for epoch in range(epochs)]
    assert all(len(one) == count for one in drawn)
    times = np.bincount(np.concatenate(drawn), minlength=size)
    assert times.max() - times.min() <= 1
    for one in drawn:
        own = np.bincount(one, minlength=size)
        assert own.max(initial=0) <= count // size + (2 if count % size else 1)


@pytest.mark.parametrize("kind", DATASETS)
def test_每一轮精确到条(kind, tmp_path, tokenizer):
    dataset = DATASETS[kind](write(tmp_path, kind), tokenizer, 96)
    found = uses(dataset, range(len(dataset)))
    by_file: Counter = Counter()
    for (name, _), times in found.items():
        by_file[name] += times
    assert by_file == EXPECTED
    for name, size in SIZES.items():  # 同一组里各条用到的次数至多差一
        times = [found[name, line] for line in range(1, size + 1)]
        assert max(times) - min(times) <= 1
    assert [share[1:] for share in dataset.stats["shares"]] == [(SIZES[n], EXPECTED[n]) for n in SIZES]
    assert "a.jsonl 52 条（50.00%，取自 70 条）" in dataset.mixture_words()


@settings(max_examples=25, deadline=None)
@given(world=st.integers(1, 5), batch=st.integers(1, 7), stop=st.integers(0, 200), data=st.data())
def test_份额与进程数_批大小_在哪里续训都无关(world, batch, stop, data):
    """一轮的行由（种子，轮次）排好，各进程分着取；中途换进程数续训，一条不漏、一条不重。"""
    size, other = 150, data.draw(st.integers(1, 5))
    order = epoch_order(size, 42, 0)
    seen: list[int] = []
    stop = min(stop // (batch * world) * batch * world, size)
    for ranks, skip, limit in ((world, 0, stop), (other, stop, size)):
        each = [
            list(SkipBatchSampler(order, batch, rank=r, world_size=ranks, skip_samples=skip))
            for r in range(ranks)
        ]
        steps = -(-(limit - skip) // (batch * ranks))
        seen += [i for step in range(steps) for own in each for i in own[step]]
    assert sorted(seen) == list(range(size))


def test_划出验证集之后训练的份额照样精确_验证集不按权重(tmp_path, tokenizer):
    spec = write(tmp_path, "pretrain")
    train, val = (PretrainDataset(spec, tokenizer, 96, split=s, val_ratio=0.1) for s in ("train", "val"))
    used, held = uses(train, range(len(train))), uses(val, range(len(val)))
    assert held and max(held.values()) == 1 and not set(used) & set(held)
    left = sum(SIZES.values()) - len(held)
    by_file = Counter()
    for (name, _), times in used.items():
        by_file[name] += times
    for name, weight in WEIGHTS.items():
        assert abs(by_file[name] - Fraction(weight) * left) < 1
    assert by_file.total() == left


def test_丢弃的不占份额(tmp_path, tokenizer):
    long = chat("很长的提问" * 100, "答")
    (tmp_path / "a.jsonl").touch()
    write_shell(tmp_path / "a.jsonl", [record("sft", "a", i) for i in range(30)] + [long] * 10)
    write_shell(tmp_path / "b.jsonl", [record("sft", "b", i) for i in range(30)])
    dataset = SFTDataset(f"{tmp_path / 'a.jsonl'}:0.5,{tmp_path / 'b.jsonl'}:0.5", tokenizer, 96)
    by_file = Counter(name for name, _ in uses(dataset, range(len(dataset))).elements())
    assert by_file == {"a.jsonl": 30, "b.jsonl": 30} and dataset.stats["dropped"] == 10
    labels = sum(int((dataset[i]["labels"] != -100).sum()) for i in range(len(dataset)))
    assert labels == dataset.stats["targets"]


@pytest.mark.parametrize("kind", ["pretrain", "sft"])
def test_重复的文档都算进目标数(kind, tmp_path, tokenizer):
    dataset = DATASETS[kind](write(tmp_path, kind), tokenizer, 48)
    labels = sum(int((dataset[i]["labels"] != -100).sum()) for i in range(len(dataset)))
    assert labels == dataset.stats["targets"]


def test_没有权重就是首尾相接(tmp_path, tokenizer):
    write(tmp_path, "pretrain")
    files = [tmp_path / name for name in SIZES]
    joined = PretrainDataset(",".join(map(str, files)), tokenizer, 64)
    write_shell(
        tmp_path / "all.jsonl", [record("pretrain", name, i) for name, n in SIZES.items() for i in range(n)]
    )
    whole = PretrainDataset(tmp_path / "all.jsonl", tokenizer, 64)
    assert len(joined) == len(whole) and joined.stats == whole.stats
    for i in range(len(whole)):
        assert all((joined[i][key] == whole[i][key]).all() for key in ("input_ids", "labels", "position_ids"))


def test_同一份数据换了外壳_配出同样的行(tmp_path, tokenizer):
    (tmp_path / "二").mkdir()
    first = PretrainDataset(write(tmp_path, "pretrain"), tokenizer, 64)
    names = {"a.jsonl": "a.json", "b.jsonl.gz": "b.jsonl", "c.json": "c.json.gz"}
    for old, new in names.items():
        write_shell(tmp_path / "二" / new, [record("pretrain", old, i) for i in range(SIZES[old])])
    spec = ",".join(f"{tmp_path / '二' / new}:{WEIGHTS[old]}" for old, new in names.items())
    second = PretrainDataset(spec, tokenizer, 64)
    for i in range(len(first)):
        assert (first[i]["input_ids"] == second[i]["input_ids"]).all()


def test_内容_权重_次序任何一样变了_指纹就变(tmp_path, tokenizer):
    spec = write(tmp_path, "pretrain")
    first = PretrainDataset(spec, tokenizer, 64).fingerprint
    assert PretrainDataset(spec, tokenizer, 64).fingerprint == first
    weights = spec.replace(":0.5", ":0.4").replace(":0.2", ":0.3")
    reordered = ",".join(reversed(spec.split(",")))
    unweighted = ",".join(item.rpartition(":")[0] for item in spec.split(","))
    others = [PretrainDataset(other, tokenizer, 64).fingerprint for other in (weights, reordered, unweighted)]
    write_shell(tmp_path / "c.json", [record("pretrain", "c.json", i) for i in range(8)] + [{"text": "换了"}])
    others.append(PretrainDataset(spec, tokenizer, 64).fingerprint)
    assert len({first, *others}) == 5


def test_名字变了而内容没变_还是同一份数据(tmp_path, tokenizer):
    spec = write(tmp_path, "pretrain")
    first = PretrainDataset(spec, tokenizer, 64).fingerprint
    (tmp_path / "a.jsonl").rename(tmp_path / "改名.jsonl")
    assert PretrainDataset(spec.replace("a.jsonl", "改名.jsonl"), tokenizer, 64).fingerprint == first


@pytest.mark.parametrize("kind", DATASETS)
def test_样本说得出来自哪个文件的哪一行(kind, tmp_path, tokenizer):
    dataset = DATASETS[kind](write(tmp_path, kind), tokenizer, 96)
    again = pickle.loads(pickle.dumps(dataset))  # 读数据的子进程拿到的那份
    for index in range(0, len(dataset), 5):
        names, lines = dataset.source_names(index), dataset.source_lines(index)
        assert names and len(names) == len(lines) == len(dataset.source_docs(index))
        assert (names, lines) == (again.source_names(index), again.source_lines(index))
        for doc, name, line in zip(dataset.source_docs(index), names, lines, strict=True):
            assert f"{name.rsplit('/', 1)[-1]} 的第 {line - 1} 条" in tokenizer.decode(
                dataset.cache.document(doc)
            )
    words = source_words(dataset, list(range(len(dataset))))
    assert f"{tmp_path / 'b.jsonl.gz'}第 1、" in words and words.count("；") == 2


def test_出错的样本只来自一个文件时照旧只说行号(tmp_path, tokenizer):
    path = write_shell(tmp_path / "a.jsonl", [record("pretrain", "a", i) for i in range(4)])
    assert source_words(PretrainDataset(path, tokenizer, 96), [0]).startswith("源文件第 1")


def test_坏行说出是哪个文件(tmp_path, tokenizer):
    spec = write(tmp_path, "pretrain")
    write_shell(tmp_path / "b.jsonl.gz", [{"text": "好"}, {"text": ""}])
    with pytest.raises(UserError, match=r"b\.jsonl\.gz:2 字段 text"):
        PretrainDataset(spec, tokenizer, 64)


@pytest.mark.parametrize(
    ("weights", "words"),
    [("0.9999:0.0001", "权重 0.0001 太小"), ("0.5:0.5", "没有可用的记录")],
)
def test_一条也分不到的组是错误(weights, words, tmp_path, tokenizer):
    a = write_shell(tmp_path / "a.jsonl", [record("sft", "a", i) for i in range(30)])
    answer = "太长" * 200 if words == "没有可用的记录" else "答"
    b = write_shell(tmp_path / "b.jsonl", [chat("问" * 200 if answer != "答" else "问", answer)])
    first, second = weights.split(":")
    with pytest.raises(UserError, match=words):
        SFTDataset(f"{a}:{first},{b}:{second}", tokenizer, 64)


def test_文档多的拼行方案存下来_再开时一样(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(packed, "STORED_DOCUMENTS", 10)
    spec = write(tmp_path, "pretrain")
    first = PretrainDataset(spec, tokenizer, 64)
    monkeypatch.setattr(PretrainDataset, "_make_plan", lambda self: pytest.fail("应当用存着的方案"))
    second = PretrainDataset(spec, tokenizer, 64)
    assert second.mixture_words() == first.mixture_words()
    assert all((first[i]["input_ids"] == second[i]["input_ids"]).all() for i in range(len(first)))
    monkeypatch.undo()
