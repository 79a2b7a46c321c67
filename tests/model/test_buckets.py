"""没有变长内核的设备（旧卡、fp32、NPU、MPS）上的打包注意力：不建整行的 T×T，前向里不从设备读任何东西，值与梯度不变。"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minimind.dataset.collate import to_device
from minimind.dataset.packed import collate_packed
from minimind.model import MiniMindConfig, MiniMindLM, kernels
from minimind.model.kernels import Buckets, keep_lengths_on_host
from minimind.trainer.recipe import language_model_loss

SIZES = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=97)


def make(**extra) -> MiniMindLM:
    torch.manual_seed(0)
    return MiniMindLM(MiniMindConfig(**(SIZES | extra)))


def packed(*rows: list[int]) -> dict:
    """每行几篇，长度给定，各行等长；与训练用的同一种批。"""
    generator = torch.Generator().manual_seed(1)
    made = []
    for lengths in rows:
        ids = torch.randint(3, 97, (sum(lengths),), generator=generator)
        labels = ids.clone()
        labels[torch.tensor([0, *lengths[:-1]]).cumsum(0)] = -100
        position = torch.cat([torch.arange(n) for n in lengths])
        made.append(
            {
                "input_ids": ids,
                "labels": labels,
                "position_ids": position,
                "seg_lens": lengths,
                "num_tokens": len(ids),
            }
        )
    return collate_packed(made)


def block_mask(batch: dict) -> torch.Tensor:
    """写明白的另一条路：整块的布尔表，文档内因果。"""
    ids = batch["input_ids"]
    document = torch.bucketize(torch.arange(ids.numel()), batch["cu_seqlens"][1:].long(), right=True).view_as(
        ids
    )
    return (document.unsqueeze(2) == document.unsqueeze(1)).tril().unsqueeze(1)


class Largest(TorchDispatchMode):
    """每个算子的结果里最大的有多少个元素。"""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


@pytest.fixture
def no_kernel(monkeypatch):
    """像一台没有变长内核、也不是 CPU 的设备。"""
    monkeypatch.setattr(kernels, "segments_available", lambda x: False)


def loss_and_gradients(model, batch, **extra):
    names = ("input_ids", "labels", "position_ids", "cu_seqlens", "max_seqlen")
    inputs = {name: batch[name] for name in names} | extra
    if "attention_mask" in extra:
        del inputs["cu_seqlens"], inputs["max_seqlen"]
    loss = model(**inputs).loss
    return loss.detach(), torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("arch", ["v2", "v3"])
def test_值与梯度等于写明白的掩码(no_kernel, arch, flash):
    model = make(arch=arch, flash_attn=flash).train()
    batch = packed([1, 40, 33, 150, 7, 90, 79], [200, 64, 64, 72])
    got, grads = loss_and_gradients(model, batch)
    expected, wanted = loss_and_gradients(model, batch, attention_mask=block_mask(batch))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    for (name, _), a, b in zip(model.named_parameters(), grads, wanted):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("flash", [True, False])
def test_很多篇的一行_前向反向都没有_T乘T(no_kernel, flash):
    model = make(flash_attn=flash).train()
    lengths = [17, 64, 5, 48, 90, 32, 1, 63, 100, 28] * 5
    batch, T = packed(lengths), sum(lengths)
    with Largest() as seen:
        loss_and_gradients(model, batch)
    assert seen.numel < T * T / 4
    with Largest() as seen:  # 这把尺子真的量得到
        loss_and_gradients(model, batch, attention_mask=block_mask(batch))
    assert seen.numel >= T * T


def test_有丢弃率时也没有_T乘T_不泄漏():
    model, lengths = make(dropout=0.2).train(), [40, 90, 64, 30] * 8
    batch, outs = packed(lengths), []
    changed = batch["input_ids"].clone()
    changed[0, :40] = 3 + (changed[0, :40] + 1) % 90
    with Largest() as seen:
        for ids in (batch["input_ids"], changed):
            torch.manual_seed(7)
            outs.append(
                model(
                    **{k: v for k, v in batch.items() if k in ("position_ids", "cu_seqlens")}, input_ids=ids
                )
            )
    assert seen.numel < sum(lengths) ** 2
    assert torch.equal(outs[0].logits[0, 40:], outs[1].logits[0, 40:])
    assert not torch.equal(outs[0].logits[0, :40], outs[1].logits[0, :40])


# ---------------------------------------------------------------- 不从设备读


def on_meta(model: MiniMindLM) -> MiniMindLM:
    """meta 上的张量没有数据：谁从设备读一个数，谁就报错，正好当作没有一次往返的证明。"""
    return model.to("meta")


@pytest.mark.parametrize("arch", ["v2", "v3"])
def test_训练一步的前向反向不从设备读任何东西(arch):
    model = on_meta(make(arch=arch)).train()
    batch = to_device(packed([40, 33, 127], [100, 60, 40]), torch.device("meta"))
    assert batch["input_ids"].is_meta and not batch["cu_seqlens"].is_meta  # 段界留在主机
    loss, _ = language_model_loss(model, batch)
    loss.backward()
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters())


def test_段界若在设备上_meta_上就看得出来():
    batch = packed([40, 33, 127])
    with pytest.raises((NotImplementedError, RuntimeError), match="meta tensor"):
        on_meta(make())(
            **{k: v.to("meta") for k, v in batch.items() if k in ("input_ids", "position_ids", "cu_seqlens")}
        )


def test_安排一次送到设备_层数再多也不增加(no_kernel, monkeypatch):
    sent = []
    original = Buckets.of.__func__
    monkeypatch.setattr(Buckets, "of", classmethod(lambda *a: sent.append(1) or original(*a)))
    make(num_hidden_layers=5)(**{k: packed([40, 33])[k] for k in ("input_ids", "position_ids", "cu_seqlens")})
    assert len(sent) == 1


@pytest.mark.parametrize(("device", "stays"), [("cpu", False), ("npu", True), ("mps", True), ("meta", True)])
def test_哪些设备的段界留在主机(device, stays):
    class Fake:  # torch.device("npu") 要注册过才造得出来
        type = device

    assert keep_lengths_on_host(Fake()) is stays


def test_算力不到八的卡_段界留在主机_注意力展开键值头(monkeypatch):
    """图灵卡（7.5）：flash 内核不在，SDPA 带 enable_gqa 会退回整块 softmax。"""
    from torch._subclasses.fake_tensor import FakeTensorMode

    given = {}
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, k, v, **kw: given.update(kw, heads=k.shape[1]) or q
    )
    monkeypatch.setattr(kernels, "varlen_attn", lambda *a: None)
    for capability, stays, heads in (((7, 5), True, 4), ((8, 0), False, 2)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, c=capability: c)
        assert keep_lengths_on_host(torch.device("cuda:0")) is stays
        with FakeTensorMode():
            q, k = (torch.empty(1, n, 8, 16, dtype=torch.float16, device="cuda") for n in (4, 2))
            kernels.attention(q, k, k, None, True)
        assert given["heads"] == heads and given["enable_gqa"] is (heads == 2)


# ---------------------------------------------------------------- 排法


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=40))
def test_排法取到每一行恰一次_补齐有上限(lengths):
    edges = torch.tensor([0, *lengths]).cumsum(0).tolist()
    segments = list(pairwise(edges))
    buckets = Buckets.of(segments, torch.device("cpu"))
    assert torch.equal(buckets.take[buckets.place], torch.arange(edges[-1]))
    assert sum(n * length for n, length in buckets.shapes) == len(buckets.take)
    assert sum(n for n, _ in buckets.shapes) == len(lengths)
    floor = sum(max(n, Buckets.SHORTEST) for n in lengths)
    assert len(buckets.take) <= 1.5 * floor + 1


def test_一批的分数有上限(monkeypatch):
    monkeypatch.setattr(Buckets, "SCORES", 64 * 64 * 2)
    shapes = Buckets.of([(i * 64, i * 64 + 64) for i in range(7)], torch.device("cpu")).shapes
    assert shapes == [(2, 64)] * 3 + [(1, 64)]


def test_段界没有铺满整行是错误(no_kernel):
    batch = packed([40, 33])
    with pytest.raises(ValueError, match="B·T = 73，得到 40"):
        make()(batch["input_ids"], cu_seqlens=batch["cu_seqlens"][:-1])
