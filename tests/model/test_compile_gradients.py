"""编译后训练一步：损失与每个参数的梯度等于不编译的。反向图由 aot_eager 走一遍；真的生成代码（inductor）要半分钟，归 slow。"""

from __future__ import annotations

import shutil

import pytest
import torch

from minimind.model import MiniMindConfig, MiniMindForCausalLM


@pytest.mark.compat
@pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="inductor 在 CPU 上要有 C++ 编译器"
)
@pytest.mark.parametrize(
    ("backend", "return_logits"),
    [("aot_eager", True), ("aot_eager", False), pytest.param("inductor", False, marks=pytest.mark.slow)],
)
def test_编译后训练一步的损失与每个参数的梯度等于不编译的(backend, return_logits):
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, vocab_size=97
    )
    model = MiniMindForCausalLM(MiniMindConfig(**sizes)).train()
    ids = torch.randint(0, 97, (2, 33))
    torch._dynamo.reset()
    results = []
    for forward in (model, torch.compile(model, backend=backend)):
        model.zero_grad()
        loss = forward(ids, labels=ids, return_logits=return_logits).loss
        loss.backward()
        results.append((loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    (expected, eager), (got, compiled) = results
    torch.testing.assert_close(got, expected)
    for name, gradient in eager.items():
        assert gradient.abs().max() > 0, name  # 残差零初始化会让有的梯度恰为 0，那样什么也没比
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
