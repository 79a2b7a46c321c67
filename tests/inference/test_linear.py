"""合并又预排的线性层：与原来的几层一样，权重变了要跟得上。"""

import pytest
import torch
from torch import nn

from minimind.inference.linear import JoinedLinear, packing_available
from minimind.model.model_lora import LoRALinear


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 64, 200])
def test_合并等于逐个算(rows, bias):
    torch.manual_seed(0)
    linears = [nn.Linear(24, n, bias=bias) for n in (16, 8, 40)]
    joined = JoinedLinear(linears, torch.float32)
    x = torch.randn(rows, 24)
    with torch.inference_mode():
        torch.testing.assert_close(joined(x), torch.cat([linear(x) for linear in linears], -1))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("total", [torch.float32, torch.bfloat16])
def test_加到残差上等于先乘后加(bias, total):
    torch.manual_seed(0)
    linear = nn.Linear(24, 16, bias=bias)
    joined, x, residual = (
        JoinedLinear([linear], torch.float32),
        torch.randn(5, 24),
        torch.randn(5, 16).to(total),
    )
    before = residual.clone()
    with torch.inference_mode():
        torch.testing.assert_close(joined.add_to(residual, x), residual + linear(x))
    assert torch.equal(residual, before), "残差还有别处要用，不能就地改"


def test_权重变了_刷新之后跟得上():
    linear = nn.Linear(8, 6, bias=False)
    joined, x = JoinedLinear([linear], torch.float32), torch.randn(5, 8)
    with torch.no_grad():
        linear.weight.mul_(2)
        joined.refresh()
        torch.testing.assert_close(joined(x), linear(x))


def test_没合并的LoRA增量也算():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(8, 6, bias=False), rank=2, alpha=4.0)
    nn.init.normal_(layer.lora.B.weight)
    x = torch.randn(5, 8)
    with torch.no_grad():
        torch.testing.assert_close(JoinedLinear([layer], torch.float32)(x), layer(x))


def test_不能预排时照样能算(monkeypatch):
    monkeypatch.setattr("minimind.inference.linear.packing_available", lambda dtype: False)
    linear = nn.Linear(8, 6)
    joined, x = JoinedLinear([linear], torch.float32), torch.randn(5, 8)
    assert not joined.packed
    with torch.no_grad():
        assert torch.equal(joined(x), linear(x))


@pytest.mark.skipif(not packing_available(torch.bfloat16), reason="这颗处理器没有 bf16 的 oneDNN")
def test_bf16_也预排():
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=False)
    joined, x = JoinedLinear([linear], torch.bfloat16), torch.randn(5, 64).bfloat16()
    residual = torch.randn(5, 48).bfloat16()
    assert joined.packed
    with torch.inference_mode():
        want = x.float() @ linear.weight.bfloat16().float().t()
        torch.testing.assert_close(joined(x).float(), want, atol=0.02, rtol=0.01)
        torch.testing.assert_close(joined.add_to(residual, x).float(), residual + want, atol=0.04, rtol=0.01)


def test_fp16_不预排():
    assert not JoinedLinear([nn.Linear(8, 6)], torch.float16).packed


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="这份 torch 没有 oneDNN")
def test_有oneDNN就用得上():
    """内部算子换了名字或参数时这里先知道，而不是悄悄变慢一倍。"""
    assert packing_available()
