"""预分配 KV 缓存与逐段拼接等价。"""

import pytest
import torch

from minimind.inference.kv_cache import StaticKVCache


def test_分段写入等于整段拼接():
    cache = StaticKVCache(2, 3, 2, 10, 4)
    pieces = [torch.randn(3, 2, size, 4) for size in (4, 1, 3)]
    for index, piece in enumerate(pieces):
        for layer in range(2):
            keys, values = cache.update(piece + layer, piece * 2, layer)
            so_far = torch.cat(pieces[: index + 1], dim=2)
            assert torch.equal(keys, so_far + layer)
            assert torch.equal(values, so_far * 2)
    assert cache.get_seq_length() == 8


def test_写入不搬动已有内容():
    cache = StaticKVCache(1, 1, 1, 8, 4)
    first, _ = cache.update(torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4), 0)
    second, _ = cache.update(torch.randn(1, 1, 1, 4), torch.randn(1, 1, 1, 4), 0)
    assert first.data_ptr() == second.data_ptr()


def test_写过头是错误而不是越界():
    cache = StaticKVCache(1, 1, 1, 4, 2)
    with pytest.raises(ValueError, match="容量 4"):
        cache.update(torch.zeros(1, 1, 5, 2), torch.zeros(1, 1, 5, 2), 0)
