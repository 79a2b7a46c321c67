"""线性层：CPU 上换了矩阵乘的内核，值与梯度都要与 ``F.linear`` 相同。"""

import pytest
import torch
import torch.nn.functional as F

from minimind.model import kernels
from minimind.model.kernels import linear, linear_cross_entropy, matmul_nt
from minimind.model.model_minimind import Linear


@pytest.fixture(params=[True, False], ids=["oneDNN", "MKL"])
def onednn(request, monkeypatch):
    """两种内核各走一遍，不看这台机器是哪一家的处理器。"""
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("这份 torch 没有 oneDNN")
    monkeypatch.setattr(kernels, "_onednn_is_faster", lambda: request.param)
    monkeypatch.setattr(kernels, "_SMALL_MATMUL", 1)
    return request.param


@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 7, 24), (0, 24)])
def test_值与梯度同F_linear(onednn, shape):
    torch.manual_seed(0)
    weight = torch.randn(40, 24, requires_grad=True)
    x = torch.randn(shape, requires_grad=True)
    theirs_x, theirs_w = (t.detach().clone().requires_grad_() for t in (x, weight))
    y, expected = linear(x, weight), F.linear(theirs_x, theirs_w)
    grad = torch.randn_like(expected)
    y.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, theirs_x.grad)
    torch.testing.assert_close(weight.grad, theirs_w.grad)


def test_转置的与切片的输入也对(onednn):
    torch.manual_seed(0)
    x, weight = torch.randn(24, 30).t()[3:20], torch.randn(24, 50).t()
    torch.testing.assert_close(matmul_nt(x, weight), x @ weight.t())


def test_冻结的权重不求梯度(onednn):
    layer, x = Linear(8, 6, bias=False), torch.randn(3, 8, requires_grad=True)
    layer.weight.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, 8))


def test_自动混合精度照旧(onednn):
    layer, x = Linear(8, 6, bias=False), torch.randn(3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), F.linear(x, layer.weight), atol=0.05, rtol=0.05)


def test_分块交叉熵的值与梯度(onednn):
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    target, ones = torch.randint(30, (9,)), torch.ones(9)
    linear_cross_entropy(hidden, weight, target, ones, chunk=4).backward()
    h, w = (t.detach().clone().requires_grad_() for t in (hidden, weight))
    F.cross_entropy(h @ w.t(), target, reduction="sum").backward()
    torch.testing.assert_close(hidden.grad, h.grad)
    torch.testing.assert_close(weight.grad, w.grad)


def test_行数各不相同时内存不涨():
    """oneDNN 给每种形状留一份内核；不设上限，300 种行数多占一个多 GB。"""
    import subprocess
    import sys

    code = """
import minimind, resource, torch
from minimind.model import kernels as m
m._onednn_is_faster, m._SMALL_MATMUL = lambda: True, 0
torch.set_num_threads(1)
weight = torch.randn(64, 64)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
for n in range(1, 200): m.matmul_nt(torch.ones(n, 64), weight)
before = peak()
for n in range(200, 1200): m.matmul_nt(torch.ones(n, 64), weight)
print(peak() - before)
"""
    if not torch.backends.mkldnn.is_available() or not sys.platform.startswith("linux"):
        pytest.skip("没有 oneDNN，或量不到内存")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(out.stdout) < 120, "一千种行数"
