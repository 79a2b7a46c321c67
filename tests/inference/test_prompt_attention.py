"""读提示的注意力：从头读的、接着读的混在一批，都等于逐条的公式；没写到的与别人的位置不影响结果。"""

import pytest
import torch

from minimind.inference.prompt_attention import BlockedAttention, DeviceAttention

KV_HEADS, CAPACITY = 2, 640


def formula(q, keys, values, start):
    """q ``[T, heads, D]`` 接在 start 个之后，keys、values ``[kv_heads, 容量, D]``。"""
    stop = start + len(q)
    k, v = (x[:, :stop].repeat_interleave(q.shape[1] // KV_HEADS, dim=0).double() for x in (keys, values))
    score = q.transpose(0, 1).double() @ k.transpose(1, 2) / q.shape[2] ** 0.5
    hidden = torch.arange(stop) > torch.arange(start, stop)[:, None]
    return (score.masked_fill(hidden, float("-inf")).softmax(-1) @ v).transpose(0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "dim"), [(4, 16), (8, 64)])  # 半精度时窄的与宽的是两种算法
@pytest.mark.parametrize("kind", [BlockedAttention, DeviceAttention])
@pytest.mark.parametrize(
    "pieces",
    [
        [(1, 0), (64, 0), (128, 0), (3, 0)],
        [(129, 0), (600, 0), (65, 0)],
        [(20, 0), (1, 5), (40, 600), (300, 0)],
        [(256, 64), (63, 65), (1, 639), (2, 255), (70, 250)],
    ],
)
def test_等于逐条的公式(pieces, kind, heads, dim, dtype):
    torch.manual_seed(0)
    lengths, starts = [list(x) for x in zip(*pieces)]
    slots = [5, 2, 7, 0, 3][: len(pieces)]
    q = torch.randn(sum(lengths), heads, dim, dtype=dtype)
    store = torch.randn(2, 8, KV_HEADS, CAPACITY, dim, dtype=dtype) * 50  # 别人的与用剩的
    k, v = (torch.randn(sum(lengths), KV_HEADS, dim, dtype=dtype) for _ in range(2))
    begin = 0
    for length, start, slot in zip(lengths, starts, slots):
        stop = start + length
        for half, new in zip(store, (k, v)):
            half[slot, :, :start] /= 50
            half[slot, :, start:stop] = new[begin : begin + length].transpose(0, 1)
        begin += length
    if kind is BlockedAttention:
        attend = BlockedAttention(lengths, starts, slots, CAPACITY)
    else:
        attend = DeviceAttention(lengths, starts, slots, q.device, dtype)
    out, begin = attend(q, k, v, *store), 0
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for length, start, slot in zip(lengths, starts, slots):
        want = formula(q[begin : begin + length], store[0, slot], store[1, slot], start)
        torch.testing.assert_close(out[begin : begin + length].double(), want, atol=tolerance, rtol=0)
        begin += length
