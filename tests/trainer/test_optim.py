"""优化器：与 torch 自带 Muon、与奇异值分解对照；参数分组；状态存取逐位一致。"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from minimind.trainer import optim
from minimind.trainer.optim import (
    NEWTON_SCHULZ,
    OPTIMIZERS,
    Muon,
    OptimizerPair,
    build_optimizer,
    orthogonalize,
    set_learning_rate,
    split_parameters,
)

SHAPES = [(16, 48), (48, 16), (16, 48), (32, 32), (5, 1)]


def make_args(**changes) -> SimpleNamespace:
    args = {
        "optimizer": "muon",
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "embed_lr_scale": 0.5,
        "muon_momentum": 0.95,
        "adam_beta2": 0.95,
    }
    return SimpleNamespace(**{**args, **changes})


class Toy(nn.Module):
    """词嵌入与输出层共享，带归一化与一个没用到的矩阵。"""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm = nn.RMSNorm(8)
        self.hidden = nn.Linear(8, 8)
        self.unused = nn.Linear(8, 4, bias=False)
        self.lm_head = nn.Linear(8, 11, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        return self.lm_head(self.hidden(self.norm(self.embed(ids))))


def toy_loss(model: nn.Module, seed: int) -> torch.Tensor:
    ids = torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(seed))
    return nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.roll(1, -1).flatten())


def test_Muon与torch自带实现一致():
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    start = [p.detach().clone() for p in ours]
    a = Muon(ours, lr=0.02, weight_decay=0.1, newton_schulz_dtype="bfloat16")
    b = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q, p0 in zip(ours, theirs, start):
        moved = (q - p0).norm()
        assert (p - q).norm() < 0.02 * moved  # 二者只差 bfloat16 的舍入


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decayed", [True, False])
def test_逐个更新与摞起来更新逐位相同_连负零(dtype, decayed):
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(6, 10, generator=generator) for _ in range(4)]
    params[1][0, :3] = torch.tensor([-0.0, 0.0, 1e-42])
    update = torch.randn(4, 6, 10, generator=generator).to(dtype)
    update[1] = 0  # 不更新、不衰减的一个
    keep = torch.tensor([0.99, 1.0, 0.995, 0.99]) if decayed else None
    before, each, stacked = (
        [p.clone() for p in params],
        [p.clone() for p in params],
        [p.clone() for p in params],
    )
    optim.apply_each(each, update, keep, -0.013)
    optim.apply_stacked(stacked, update, keep, -0.013)
    for a, b in zip(each, stacked):
        assert torch.equal(a.view(torch.int32), b.view(torch.int32))
    assert torch.equal(each[1].view(torch.int32), before[1].view(torch.int32))
    assert not torch.equal(each[0], before[0])
    want = before[0] * (0.99 if decayed else 1.0) - 0.013 * update[0].float()
    torch.testing.assert_close(each[0], want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(3, 16, 40), (2, 40, 16)])
def test_正交化等于在奇异值上套五次多项式(shape):
    torch.manual_seed(1)
    x = torch.randn(shape, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    s = s / x.norm(dim=(-2, -1))[:, None]
    a, b, c = NEWTON_SCHULZ
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    expected = u @ torch.diag_embed(s) @ vh
    torch.testing.assert_close(orthogonalize(x, dtype=torch.float64), expected)
    assert (s > 0.3).all() and (s < 1.3).all()


def test_更新量的均方根与AdamW相当():
    torch.manual_seed(2)
    for shape in [(64, 64), (64, 256), (256, 64)]:
        p = nn.Parameter(torch.zeros(shape))
        p.grad = torch.randn(shape)
        Muon([p], lr=1.0).step()
        rms = p.detach().square().mean().sqrt().item()
        assert 0.12 < rms < 0.28  # 0.2 × 奇异值的均方根（0.7 到 1.2）


def test_没有梯度的参数原样不动():
    p, q = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))
    q0 = q.detach().clone()
    p.grad = torch.randn(4, 4)
    Muon([p, q], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(q, q0)


def test_参数分组不重不漏且衰减只在隐层矩阵():
    model = Toy()
    groups = split_parameters(model)
    assert [id(p) for p in groups["embedding"]] == [id(model.embed.weight)]
    assert {id(p) for p in groups["matrix"]} == {id(model.hidden.weight), id(model.unused.weight)}
    assert sum(len(v) for v in groups.values()) == len(list(model.parameters()))
    for name in ("muon", "adamw"):
        optimizer = build_optimizer(model, make_args(optimizer=name))
        decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
        assert decayed == {id(p) for p in groups["matrix"]}
        covered = [id(p) for g in optimizer.param_groups for p in g["params"]]
        assert sorted(covered) == sorted(id(p) for p in model.parameters())


def test_学习率倍数作用于词嵌入():
    model = Toy()
    optimizer = build_optimizer(model, make_args())
    set_learning_rate(optimizer, 0.3)
    by_param = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert by_param[id(model.embed.weight)] == pytest.approx(0.15)
    assert by_param[id(model.hidden.weight)] == pytest.approx(0.3)


def test_冻结的参数不进优化器():
    model = Toy()
    model.hidden.weight.requires_grad_(False)
    covered = {id(p) for g in build_optimizer(model, make_args()).param_groups for p in g["params"]}
    assert id(model.hidden.weight) not in covered


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_状态存取后逐位一致(name, tmp_path):
    torch.manual_seed(3)
    model = Toy()
    optimizer = build_optimizer(model, make_args(optimizer=name), newton_schulz_dtype="bfloat16")

    def run(model, optimizer, seeds):
        for seed in seeds:
            optimizer.zero_grad()
            toy_loss(model, seed).backward()
            optimizer.step()

    run(model, optimizer, range(3))
    twin = copy.deepcopy(model)
    torch.save(optimizer.state_dict(), tmp_path / "o.pth")
    # 存档里的迭代精度胜过新进程里测出来的
    other = build_optimizer(twin, make_args(optimizer=name), newton_schulz_dtype="float32")
    other.load_state_dict(torch.load(tmp_path / "o.pth", weights_only=True))
    run(model, optimizer, range(3, 6))
    run(twin, other, range(3, 6))
    for p, q in zip(model.parameters(), twin.parameters()):
        assert torch.equal(p, q)


def test_合并的优化器能与GradScaler一起用():
    model = Toy()
    optimizer = build_optimizer(model, make_args())
    assert isinstance(optimizer, OptimizerPair)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = model.hidden.weight.detach().clone()
    scaler.scale(toy_loss(model, 0)).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(before, model.hidden.weight)
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    model.hidden.weight.grad = torch.full_like(model.hidden.weight, float("inf"))
    before = model.hidden.weight.detach().clone()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(before, model.hidden.weight) and scaler.get_scale() == 4.0


def old_muon_step(params, buffers, lr, weight_decay, momentum=0.95):
    """从前的一步：不看梯度大小。"""
    for p, buffer in zip(params, buffers):
        buffer.lerp_(p.grad, 1 - momentum)
        update = orthogonalize(p.grad.lerp(buffer, momentum)[None])[0]
        p.data.mul_(1 - lr * weight_decay).add_(update, alpha=-lr * 0.2 * max(p.shape) ** 0.5)


@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_正常的梯度下与不看梯度大小的Muon逐位相同(scale):
    torch.manual_seed(4)
    ours = [nn.Parameter(torch.randn(shape)) for shape in SHAPES if shape != (16, 48)]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    buffers = [torch.zeros_like(p) for p in theirs]
    muon = Muon(ours, lr=0.02, weight_decay=0.1)
    for _ in range(5):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p) * scale
            q.grad = p.grad.clone()
        muon.step()
        old_muon_step(theirs, buffers, 0.02, 0.1)
    for p, q in zip(ours, theirs):
        assert torch.equal(p, q)


def test_梯度恰好是零的矩阵不动_有动量也不动():
    """同形状的另一个矩阵照常走：没有分到词元的专家不该被往日的动量推着走，也不衰减。"""
    torch.manual_seed(5)
    idle, busy = (nn.Parameter(torch.randn(8, 8)) for _ in range(2))
    muon = Muon([idle, busy], lr=0.1, weight_decay=0.5)
    idle.grad, busy.grad = torch.zeros(8, 8), torch.randn(8, 8)
    start = idle.detach().clone()
    muon.step()
    assert torch.equal(idle, start)
    idle.grad = torch.randn(8, 8)
    muon.step()
    moved, other = idle.detach().clone(), busy.detach().clone()
    assert not torch.equal(moved, start)
    idle.grad = torch.zeros(8, 8)
    for _ in range(10):
        muon.step()
    assert torch.equal(idle, moved) and not torch.equal(busy, other)


def test_近乎零的梯度不走满一步():
    """路由器的梯度只剩舍入（1e-10）时，从前一步走 0.012，现在不到百万分之一；旁边的矩阵照常。"""
    torch.manual_seed(6)
    router, matrix = nn.Parameter(torch.randn(4, 512) * 0.02), nn.Parameter(torch.randn(512, 512) * 0.02)
    before, other = router.detach().clone(), matrix.detach().clone()
    muon = Muon([router, matrix], lr=3e-3, weight_decay=0.1)
    router.grad, matrix.grad = torch.randn(4, 512) * 1e-10, torch.randn(512, 512) * 1e-3
    muon.step()
    assert (router - before).abs().max() < 1e-6
    assert (matrix - other).abs().max() > 1e-4


def test_一种形状只迭代一次_不论有多少个矩阵(monkeypatch):
    """逐个矩阵地迭代，卡上的时间都花在发射上。"""
    seen = []
    original = optim.orthogonalize
    monkeypatch.setattr(optim, "orthogonalize", lambda m, *a: seen.append(tuple(m.shape)) or original(m, *a))
    shapes = [(8, 4)] * 5 + [(4, 8)] * 3 + [(6, 6)]
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    optim.Muon(params, lr=0.1).step()
    assert seen == [(5, 8, 4), (3, 4, 8), (1, 6, 6)]


@pytest.mark.parametrize("shape", [(3, 8, 5), (2, 5, 8)])
def test_迭代进得了一个图_结果不变(shape):
    """没有断图、没有看数据的分支：编译它、录它都行。"""
    torch._dynamo.reset()
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(optim.orthogonalize, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(matrices), optim.orthogonalize(matrices))


# ---------------------------------------------------------------- found_inf：走不走由设备定


def bits(model: nn.Module, optimizer) -> list[bytes]:
    """权重与优化器状态的每一位，负零与 NaN 也分得出。"""
    state = optimizer.state_dict()
    parts = state.values() if isinstance(optimizer, OptimizerPair) else [state]
    tensors = [t for part in parts for one in part["state"].values() for t in one.values()]
    return [
        t.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        for t in [*model.parameters(), *tensors]
    ]


def signed_zeros(model: nn.Module, optimizer) -> None:
    """权重与动量里放几个负零：加正零就会翻成正零。"""
    optimizers = optimizer.optimizers.values() if isinstance(optimizer, OptimizerPair) else [optimizer]
    with torch.no_grad():
        for p in model.parameters():
            p.view(-1)[:2] = -0.0
        for one in optimizers:
            for state in one.state.values():
                for name, value in state.items():
                    if name != "step":
                        value.view(-1)[1:3] = -0.0


class TwoShapes(nn.Module):
    """两种形状的矩阵、一个向量、一个没有梯度的矩阵。"""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.unused = (nn.Linear(*s) for s in ((6, 4), (6, 4), (5, 5), (3, 3)))

    def fill(self, seed: int, value: float | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if not name.startswith("unused"):
                p.grad = torch.randn(p.shape, generator=generator)
                if value is not None:
                    p.grad.view(-1)[seed % 3] = value


@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.parametrize("value", [None, 0.0, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_found_inf为一_一位不动_连负零与步数(name, value, dtype):
    torch.manual_seed(7)
    model = TwoShapes()
    optimizer = build_optimizer(model, make_args(optimizer=name), newton_schulz_dtype=dtype)
    for seed in range(2):
        model.fill(seed)
        optimizer.step()
    signed_zeros(model, optimizer)
    before = bits(model, optimizer)
    optimizer.found_inf = torch.ones(())
    for seed in range(2, 5):
        model.fill(seed, value)
        optimizer.step()
        assert bits(model, optimizer) == before
    # 尺子量得出：同样的梯度，不说就会改
    optimizer.found_inf = None
    optimizer.step()
    assert bits(model, optimizer) != before


@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_found_inf为零_与没有它逐位相同_跳过的一步如同没有(name, dtype):
    torch.manual_seed(8)
    plain = TwoShapes()
    twin = copy.deepcopy(plain)
    a, b = (build_optimizer(m, make_args(optimizer=name), newton_schulz_dtype=dtype) for m in (plain, twin))
    for seed in range(6):
        plain.fill(seed)
        a.step()
        twin.fill(seed + 100, float("nan"))
        b.found_inf = torch.ones(())
        b.step()
        twin.fill(seed)
        b.found_inf = torch.zeros(())
        b.step()
        assert bits(plain, a) == bits(twin, b)


def test_没有found_inf_不多算(monkeypatch):
    """CPU 上当场就读，Muon 一步不多一次挑选、不多一份动量。"""
    model = TwoShapes()
    muon = build_optimizer(model, make_args(weight_decay=0.0))
    calls = {"stack": 0, "where": 0}
    for name in calls:
        original = getattr(torch, name)

        def counted(*args, name=name, original=original):
            calls[name] += 1
            return original(*args)

        monkeypatch.setattr(torch, name, counted)
    model.fill(0)
    muon.step()
    assert calls == {"stack": 4, "where": 0}  # 两种形状，各自的范数与动量
    muon.found_inf = torch.zeros(())
    muon.step()
    assert calls == {"stack": 12, "where": 6}
