"""LoRA：公式与手算一致、加上时不改变输出、只有 A 与 B 受训练、合并与还原、公共项目的文件、坏输入。"""

import pytest
import torch
from torch import nn

from minimind.model import MiniMindConfig, MiniMindForCausalLM
from minimind.model.model_lora import (
    LINEAR_NAMES,
    LoRALinear,
    apply_lora,
    effective_weight,
    load_adapter,
    lora_layers,
    lora_state_dict,
    merge_adapter,
    merge_lora,
    parse_adapter,
    remove_lora,
    target_modules,
    unmerge_lora,
)

IDS = torch.arange(3, 27).view(2, 12)


def model(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = dict(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=97
    )
    return MiniMindForCausalLM(MiniMindConfig(**{**sizes, **changes})).eval()


def fill(net, seed=1):
    """给 B 随机的非零值：像训练过一样。"""
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(net).values():
        layer.lora.B.weight.data.normal_(std=0.1, generator=generator)
    return net


@torch.no_grad()
def logits(net):
    return net(IDS).logits


def test_公式与手算一致():
    base = nn.Linear(2, 2, bias=False)
    base.weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    layer = LoRALinear(base, rank=1, alpha=4.0)
    layer.lora.A.weight.data = torch.tensor([[1.0, -1.0]])
    layer.lora.B.weight.data = torch.tensor([[0.5], [2.0]])
    # x = (3, 1)：Wx = (5, 13)；Ax = 2；B(Ax) = (1, 4)；alpha/r = 4
    x = torch.tensor([[3.0, 1.0]])
    assert layer(x).tolist() == [[5 + 4 * 1, 13 + 4 * 4]]
    assert layer.delta().tolist() == [[2.0, -2.0], [8.0, -8.0]]
    # 梯度：dL/dB = scale·(A x)·g，dL/dA = scale·Bᵀg·x，取 g = (1, 1)
    layer(x).sum().backward()
    assert layer.lora.B.weight.grad.tolist() == [[8.0], [8.0]]
    assert layer.lora.A.weight.grad.tolist() == [[4 * 2.5 * 3, 4 * 2.5 * 1]]


@pytest.mark.parametrize("changes", [{}, {"use_moe": True}, {"arch": "v3"}, {"arch": "v3", "use_moe": True}])
def test_刚加上时输出一位不变_键名不变(changes):
    net = model(**changes)
    before, keys = logits(net), set(net.state_dict())
    names = apply_lora(net)
    assert torch.equal(logits(net), before)
    assert keys == {key for key in net.state_dict() if ".lora." not in key}
    assert {name.rpartition(".")[2] for name in names} == set(LINEAR_NAMES)
    assert not any(name.endswith((".gate", "lm_head")) for name in names)


def test_只有A与B受训练_底座一位不动():
    net = model(use_moe=True).train()
    apply_lora(net, rank=2)
    trainable = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trainable == set(lora_state_dict(net))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):  # 第一步 B = 0，A 没有梯度；第二步两边都动
        optimizer.zero_grad()
        net(IDS, labels=IDS).loss.backward()
        optimizer.step()
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]) == (".lora." not in key), key


def test_方阵的选法就是_q_与_o_并与公共项目的键名相同():
    names = target_modules(model(), "square")
    assert names == [f"model.layers.{i}.self_attn.{x}_proj" for i in (0, 1) for x in "qo"]
    net = model()
    apply_lora(net, rank=8, targets="square")
    keys = list(lora_state_dict(net))
    assert keys[:2] == [f"model.layers.0.self_attn.q_proj.lora.{x}.weight" for x in "AB"]
    assert lora_state_dict(net)[keys[0]].shape == (8, 64) and lora_state_dict(net)[keys[1]].shape == (64, 8)


def test_按层名选_混合专家的每个专家都有():
    assert target_modules(model(), "q_proj, v_proj") == [
        f"model.layers.{i}.self_attn.{x}_proj" for i in (0, 1) for x in "qv"
    ]
    names = target_modules(model(use_moe=True), "up_proj")
    assert len(names) == 2 * (4 + 1)  # 两层，四个专家加一个共享专家


@pytest.mark.parametrize("targets", ["gate", "lm_head", "q_prj", "", "embed_tokens"])
def test_不能加或不存在的层_列出可选的(targets):
    with pytest.raises(ValueError, match="q_proj"):
        target_modules(model(), targets)


@pytest.mark.parametrize("changes", [{}, {"use_moe": True}])
def test_合并前后输出相同_还原后回到底座(changes):
    net = model(**changes)
    base, weights = logits(net), {k: v.clone() for k, v in net.state_dict().items()}
    apply_lora(net, rank=4, alpha=8.0)
    apart = logits(fill(net))
    assert (apart - base).abs().max() > 1e-2
    merge_lora(net)
    merge_lora(net)  # 合并两次等于一次
    assert (logits(net) - apart).abs().max() < 1e-5
    unmerge_lora(net)
    assert (logits(net) - apart).abs().max() < 1e-5
    remove_lora(net)
    assert not lora_layers(net) and net.state_dict().keys() == weights.keys()
    for key, value in net.state_dict().items():
        assert (value - weights[key]).abs().max() < 1e-6
    assert (logits(net) - base).abs().max() < 1e-5


def test_几份叠加是增量之和_与次序无关():
    parts = []
    for seed, alpha, targets in ((1, 16.0, "all"), (2, 4.0, "square")):
        net = model()
        apply_lora(net, rank=4, alpha=alpha, targets=targets)
        fill(net, seed)
        deltas = {name: layer.delta().detach() for name, layer in lora_layers(net).items()}
        parts.append((parse_adapter(lora_state_dict(net), alpha), deltas))
    one, other = model(), model()
    for adapter, _ in parts:
        merge_adapter(one, adapter)
    for adapter, _ in reversed(parts):
        merge_adapter(other, adapter)
    assert (logits(one) - logits(other)).abs().max() < 1e-5
    base = model().state_dict()
    name = "model.layers.1.self_attn.o_proj"
    want = base[f"{name}.weight"] + parts[0][1][name] + parts[1][1][name]
    assert torch.allclose(one.state_dict()[f"{name}.weight"], want, atol=1e-6)


def test_取出再装回_逐位相同():
    net = model()
    apply_lora(net, rank=4, alpha=12.0)
    want, state = logits(fill(net)), {k: v.clone() for k, v in lora_state_dict(net).items()}
    other = model()
    load_adapter(other, parse_adapter(state, 12.0))
    assert torch.equal(logits(other), want)


def test_没有alpha的文件按不缩放读():
    """公共项目 y = Wx + B(Ax)：没有 alpha，相当于 alpha = r。"""
    net = model()
    layer = net.model.layers[0].self_attn.q_proj
    A, B = torch.randn(8, 64), torch.randn(64, 8)
    key = "model.layers.0.self_attn.q_proj.lora"
    adapter = parse_adapter({f"{key}.A.weight": A, f"{key}.B.weight": B})
    assert (adapter.rank, adapter.alpha, adapter.modules) == (8, 8.0, (key.removesuffix(".lora"),))
    x, before = torch.randn(3, 64), layer.weight.detach().clone()
    load_adapter(net, adapter)
    got = net.model.layers[0].self_attn.q_proj(x)
    assert torch.allclose(got, x @ before.T + x @ A.T @ B.T, atol=1e-4)


KEY = "model.layers.0.self_attn.q_proj.lora"


@pytest.mark.parametrize(
    "state, words",
    [
        ({"model.norm.weight": torch.ones(4)}, r"model\.norm\.weight.*\(4,\)"),
        ({f"{KEY}.A.weight": torch.ones(2, 64)}, "没有.*B.weight"),
        (
            {f"{KEY}.A.weight": torch.ones(2, 64), f"{KEY}.B.weight": torch.ones(64, 3)},
            r"秩不一致.*\(2, 64\)",
        ),
        ({}, "一个 LoRA 权重也没有"),
    ],
)
def test_认不出的权重_指出键与形状(state, words):
    with pytest.raises(ValueError, match=words):
        parse_adapter(state)


def test_别的尺寸的权重_指出键与两边的形状():
    net = model(hidden_size=32)
    apply_lora(net, rank=4)
    adapter = parse_adapter(lora_state_dict(net))
    with pytest.raises(ValueError, match=r"q_proj\.lora\.A\.weight.*\(4, 32\).*\(4, 64\)"):
        load_adapter(model(), adapter)
    deeper = model(num_hidden_layers=3)
    apply_lora(deeper, rank=4)
    with pytest.raises(ValueError, match=r"没有线性层 model\.layers\.2"):
        load_adapter(model(), parse_adapter(lora_state_dict(deeper)))


def test_秩不同的权重装不到已有的LoRA上_也不能加两次():
    net, other = model(), model()
    apply_lora(net, rank=4)
    apply_lora(other, rank=2)
    with pytest.raises(ValueError, match=r"秩是 4.*文件里是 2"):
        load_adapter(net, parse_adapter(lora_state_dict(other)))
    with pytest.raises(ValueError, match="已经加过"):
        apply_lora(net)
    with pytest.raises(ValueError, match="rank=0"):
        apply_lora(model(), rank=0)


def test_半精度的底座_合并按fp32算():
    net = model().half()
    apply_lora(net, rank=2, alpha=2.0)
    layer = next(iter(lora_layers(fill(net)).values()))
    want = (layer.weight.float() + layer.delta()).half()
    merge_lora(net)
    assert layer.weight.dtype == torch.float16 and torch.equal(layer.weight, want)


def test_推理引擎直接取权重_也算上没合并的增量():
    from minimind.inference.engine import Engine
    from minimind.inference.sampling import GREEDY

    def write(net):
        engine = Engine(net, eos_ids=[2])
        engine.add_request(IDS[0].tolist(), GREEDY, 8)
        done = []
        while engine.has_unfinished:
            done += engine.step()
        return done[0].ids, done[0].logprobs

    net = model()
    apply_lora(net, rank=4)
    fill(net)
    ids, logprobs = write(net)
    merge_lora(net)
    merged = write(net)
    assert merged[0] == ids and torch.allclose(torch.tensor(merged[1]), torch.tensor(logprobs), atol=1e-5)
    assert write(model())[1] != logprobs


def test_实际起作用的权重_没合并时加上增量():
    net = model()
    apply_lora(net, rank=4)
    layer = next(iter(lora_layers(fill(net)).values()))
    plain = layer.weight.detach().clone()
    apart = effective_weight(layer)
    merge_lora(net)
    assert torch.equal(effective_weight(layer), layer.weight) and torch.allclose(
        apart, layer.weight, atol=1e-6
    )
    assert (apart - plain).abs().max() > 1e-2
    assert effective_weight(net.lm_head) is net.lm_head.weight
