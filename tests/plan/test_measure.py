"""测数据：词元数推得准，压缩的与不压缩的一样，分过词的直接数；内存问得到。"""

import gzip
import json

import pytest
import torch

from minimind.dataset import PretrainDataset
from minimind.dataset.cache import build_cache, cached_tokens
from minimind.errors import UserError
from minimind.plan import measure
from minimind.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture
def data(tmp_path, monkeypatch):
    """3 MB 的文本：比样本大，要推。"""
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "cache"))
    lines = [
        {"text": f"第{n}天，{n * 7919 % 37}度，风向{n * 31 % 8}，记在本子第{n % 97}页。" * 8}
        for n in range(7000)
    ]
    path = tmp_path / "数据.jsonl"
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
    return path


def test_词元数按样本推_压缩的一样_分过词的直接数(data, tmp_path, tokenizer):
    def size(path, name):
        folder = tmp_path / name
        folder.mkdir()
        return measure.size_up(PretrainDataset, str(path), folder, tokenizer, "--data_path", 512)

    packed = data.with_suffix(".jsonl.gz")
    packed.write_bytes(gzip.compress(data.read_bytes()))
    assert data.stat().st_size > 2 * measure.SAMPLE_BYTES
    plain, zipped = size(data, "a"), size(packed, "b")
    assert cached_tokens(data, "pretrain", tokenizer) is None
    exact = int(build_cache(data, "pretrain", tokenizer, num_workers=0).offsets[-1])
    assert plain.tokens == pytest.approx(exact, rel=0.03) and plain.tokenize_seconds > 0
    assert zipped.tokens == pytest.approx(plain.tokens, rel=1e-6)
    assert zipped.squeezed_bits == plain.squeezed_bits
    again = size(data, "c")
    if cached_tokens(data, "pretrain", tokenizer) is not None:  # 刚写完两秒之内的文件不记
        assert again.tokens == exact and again.tokenize_seconds == 0


def test_几个文件各取开头(data, tmp_path):
    other = tmp_path / "另一份.jsonl"
    other.write_text('{"text": "另一份"}\n', "utf-8")
    target = tmp_path / "样本.jsonl"
    total, written = measure.take_sample(f"{data},{other}", target, "--data_path")
    assert total == data.stat().st_size + other.stat().st_size
    assert written == target.stat().st_size < total
    assert target.read_text("utf-8").endswith('{"text": "另一份"}\n')


def test_坏行照数据集的规矩报错(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "坏.jsonl"
    path.write_text('{"text": "好"}\n{"text": 3}\n', "utf-8")
    with pytest.raises(UserError, match=":2"):
        measure.size_up(PretrainDataset, str(path), tmp_path, tokenizer, "--data_path", 512)


def test_坏行说的是使用者的文件与行号_不是临时的样本(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "cache"))
    good, bad, blank = (tmp_path / name for name in ("好.jsonl", "坏.jsonl", "空行.jsonl"))
    good.write_text('{"text": "好"}\n' * 7, "utf-8")
    bad.write_text('{"text": "好"}\n\n{"text": 3}\n', "utf-8")
    blank.write_text("\n\n", "utf-8")
    folder = tmp_path / "样本"
    folder.mkdir()
    with pytest.raises(UserError) as caught:
        measure.size_up(PretrainDataset, f"{good},{bad}", folder, tokenizer, "--data_path", 512)
    assert f"{bad}:3 字段 text" in str(caught.value) and str(folder) not in str(caught.value)
    with pytest.raises(UserError) as caught:
        measure.size_up(PretrainDataset, str(blank), folder, tokenizer, "--data_path", 512)
    assert str(blank) in str(caught.value) and str(folder) not in str(caught.value)


@pytest.mark.parametrize("weights", [(0.02, 0.98), (0.5, 0.5), (0.98, 0.02)])
def test_按权重配的_一轮的词元数与真的配出来的相近(tmp_path, monkeypatch, tokenizer, weights):
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "cache"))
    long, short = tmp_path / "长.jsonl", tmp_path / "短.jsonl"
    for path, times in ((long, 30), (short, 2)):
        rows = [{"text": f"第{n}天，风向{n * 31 % 8}，记在本子第{n % 97}页。" * times} for n in range(300)]
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    spec = f"{long}:{weights[0]},{short}:{weights[1]}"
    folder = tmp_path / "样本"
    folder.mkdir()
    found = measure.size_up(PretrainDataset, spec, folder, tokenizer, "--data_path", 512)
    lengths = [
        int(build_cache(path, "pretrain", tokenizer, num_workers=0).offsets[-1]) / 300
        for path in (long, short)
    ]
    exact = sum(weight * 600 * length for weight, length in zip(weights, lengths))
    assert found.tokens == pytest.approx(exact, rel=0.1)


def test_内存问得到():
    assert 0.05 < measure.free_memory(torch.device("cpu")) < 10_000


def test_容器的限额算进去(tmp_path):
    (tmp_path / "memory.max").write_text("3000000000\n")
    (tmp_path / "memory.current").write_text("1000000000\n")
    assert measure._cgroup_room(tmp_path) == 2e9
    (tmp_path / "memory.max").write_text("max\n")
    assert measure._cgroup_room(tmp_path) is None
    assert measure._cgroup_room(tmp_path / "没有") is None


def test_试跑没跑成_附上它说的(tmp_path):
    sample = tmp_path / "空.jsonl"
    sample.write_text("")
    with pytest.raises(UserError, match="试跑几步没有跑成") as caught:
        measure.trial(["--preset", "tiny", "--device", "cpu"], sample, tmp_path, 4)
    assert "空.jsonl" in str(caught.value)
