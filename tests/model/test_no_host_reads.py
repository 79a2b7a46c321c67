"""主机不等设备：两行日志之间的训练（取数到更新的整个循环）、两次对账之间的解码，一个数也不从设备读；没有卡，用 meta 设备与盯着算子的模式来证明。

meta 上的张量没有数据，``.item()``、``.tolist()``、``nonzero``、布尔下标都是错误；盯着的模式另外说出是哪个算子，CPU 上也认得出。
卡上才走的路（变长内核、分组矩阵乘）在这里用形状相同的替身。
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.optim import AdamW, adam
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trainer_helpers import tiny_args, toy_recipe

from minimind.dataset.collate import collate_dpo, target_mask, target_places, to_device
from minimind.dataset.packed import collate_packed
from minimind.inference.cuda_graph import GraphedDecode
from minimind.inference.decoder import FusedDecoder
from minimind.inference.engine import Engine
from minimind.inference.sampling import GREEDY, SamplingParams
from minimind.model import MiniMindConfig, MiniMindLM, kernels, model_minimind
from minimind.objectives.logprobs import target_logits
from minimind.objectives.preference import sequence_logprobs
from minimind.recipes.distillation import distill_loss
from minimind.rl.actor_critic import Critic
from minimind.trainer import loop, optim, step, tally
from minimind.trainer.recipe import Data, Run, language_model_loss
from minimind.trainer.vital_signs import VitalSigns

META = torch.device("meta")
READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")


class HostRead(Exception):
    """从设备读了一个数。"""


class NoHostReads(TorchDispatchMode):
    """里面的算子谁也不许让主机等 ``device``：读一个数、结果的形状要看数据、拷到别的设备。"""

    def __init__(self, device: str):
        super().__init__()
        self.device = device

    def __enter__(self):
        """两样不经过算子的另外盯着：列表直接送到设备上（要等送到），CPU 上的 ``tolist``。"""
        tensor, tolist = torch.tensor, torch.Tensor.tolist

        def no_list(x):
            if x.device.type == self.device:
                raise HostRead("tolist")
            return tolist(x)

        def no_tensor(*args, **kwargs):
            if self.device != "cpu" and kwargs.get("device", "cpu") not in (None, "cpu"):
                raise HostRead("torch.tensor(…, device=卡) 要等送到")
            return tensor(*args, **kwargs)

        self.patches = pytest.MonkeyPatch()
        self.patches.setattr(torch.Tensor, "tolist", no_list)
        self.patches.setattr(torch, "tensor", no_tensor)
        return super().__enter__()

    def __exit__(self, *error):
        self.patches.undo()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves = tree_leaves((args, kwargs or {}))
        tensors = [t for t in leaves if isinstance(t, torch.Tensor) and t.device.type == self.device]
        name = func.overloadpacket.__name__
        if tensors and self.waits(name, tensors, args, kwargs or {}):
            raise HostRead(str(func))
        return func(*args, **(kwargs or {}))

    def waits(self, name: str, tensors: list, args: tuple, kwargs: dict) -> bool:
        if name in READS:
            return True
        if name in ("index", "index_put", "index_put_", "_unsafe_index"):
            return any(t.dtype == torch.bool for t in tree_leaves(args[1]) if isinstance(t, torch.Tensor))
        if name == "where":  # 主机上的 0 维张量要先送到
            return self.device != "cpu" and any(
                t.device.type == "cpu" for t in args if isinstance(t, torch.Tensor)
            )
        if name in ("_to_copy", "copy_"):
            target = kwargs.get("device") or (args[0].device if name == "copy_" else None)
            return target is not None and torch.device(target).type != self.device
        return False


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool((x > 0).any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.__setitem__(x > 0, torch.ones(3)),
        lambda x: torch.equal(x, x),
    ],
)
def test_这把尺子量得出每一种读法(read):
    x = torch.ones(3)
    read(x)
    with pytest.raises(HostRead), NoHostReads("cpu"):
        read(x)
    with NoHostReads("cpu"):  # 这些不用等
        torch.where(x > 0, x, 0).index_select(0, torch.tensor([0, 2])).sum()
        x[torch.tensor([1])]


# ---------------------------------------------------------------- 卡上的路


class VarlenStandIn(torch.autograd.Function):
    """变长内核的替身：形状与要存的都相同。"""

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return torch.empty_like(q)

    @staticmethod
    def backward(ctx, grad):
        assert grad.is_meta
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors)


@pytest.fixture
def on_card(monkeypatch):
    """meta 当作一张有变长内核、有分组矩阵乘的卡。"""
    monkeypatch.setattr(kernels, "has_flash", lambda device: device.type == "meta")
    monkeypatch.setattr(kernels, "varlen_attn", lambda q, k, v, *a, **kw: VarlenStandIn.apply(q, k, v))
    monkeypatch.setattr(model_minimind, "grouped_mm_available", lambda x, width: x.is_meta)
    if not hasattr(F, "grouped_mm"):  # torch 2.9 只有私有的
        monkeypatch.setattr(F, "grouped_mm", torch._grouped_mm, raising=False)


def make(**extra) -> MiniMindLM:
    sizes = dict(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=97
    )
    return MiniMindLM(MiniMindConfig(**(sizes | extra)))


def rows() -> dict:
    made = []
    for lengths in ([40, 33, 127], [100, 60, 40]):
        ids = torch.arange(sum(lengths)) % 90 + 3
        labels = ids.clone()
        labels[torch.tensor([0, *lengths[:-1]]).cumsum(0)] = -100
        position = torch.cat([torch.arange(n) for n in lengths])
        made.append(
            dict(input_ids=ids, labels=labels, position_ids=position, seg_lens=lengths, num_tokens=len(ids))
        )
    return collate_packed(made)


GROUPED = pytest.mark.skipif(
    not hasattr(F, "grouped_mm"), reason="torch 2.9 没有分组矩阵乘，混合专家每层要读一次"
)
KINDS = [{}, {"arch": "v3"}]
KINDS += [pytest.param({"use_moe": True, **arch}, marks=GROUPED) for arch in KINDS]


@pytest.mark.parametrize("kind", KINDS)
def test_训练一个微批次的前向反向(on_card, kind):
    model = make(**kind).to(META, torch.bfloat16).train()
    batch = to_device(rows(), META, torch.bfloat16)
    assert batch["cu_seqlens"].is_meta  # 有变长内核：段界也在卡上
    with NoHostReads("meta"):
        loss, _ = language_model_loss(model, batch)
        loss.backward()
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters())


def test_有变长内核的卡上用fp32算_段界留在主机(on_card):
    """内核只认半精度：段界若上了卡，每个微批次都要读回来一次。"""
    model = make().to(META).train()
    batch = to_device(rows(), META, torch.float32)
    assert not batch["cu_seqlens"].is_meta
    with NoHostReads("meta"):
        language_model_loss(model, batch)[0].backward()


def test_混合专家没有分组矩阵乘时要读回各专家的词元数(on_card, monkeypatch):
    """fp16、fp32 的卡上还剩这一处，每层一次；改掉了就把这条换成前面那一条。"""
    monkeypatch.setattr(model_minimind, "grouped_mm_available", lambda x, width: False)
    model = make(use_moe=True).to(META, torch.bfloat16).train()
    with pytest.raises(HostRead, match="tolist"), NoHostReads("meta"):
        language_model_loss(model, to_device(rows(), META, torch.bfloat16))


def test_取目标位置的损失(on_card):
    """强化学习、蒸馏、价值网络：目标的位置在搬上卡之前数好。"""
    model, teacher = (make().to(META, torch.bfloat16) for _ in range(2))
    batch = to_device(rows(), META, torch.bfloat16)
    args = SimpleNamespace(alpha=0.5, temperature=2.0, divergence="forward", jsd_beta=0.5)
    with NoHostReads("meta"):
        target_logits(model, batch).logprobs_and_entropy(0.7)[0].sum().backward()
        distill_loss(model, batch, args, model, teacher)[0].backward()
    critic, single = Critic(make()).to(META), to_device(rows(), META, torch.float32)  # 状态在 fp32 里算
    with NoHostReads("meta"):
        critic(single)[0].sum().backward()


def test_偏好对的损失(on_card):
    item = {
        f"{side}{suffix}": torch.arange(3, 3 + n)
        for side, n in (("chosen", 20), ("rejected", 14))
        for suffix in ("", "_labels")
    }
    model = make().to(META, torch.bfloat16)
    batch = to_device(collate_dpo([item, item]), META, torch.bfloat16)
    with NoHostReads("meta"):
        sequence_logprobs(model, batch).logps.sum().backward()


def test_主机上数好的目标位置与卡上数的相同():
    batch = rows()
    moved = to_device(batch, META)
    assert "target_places" not in to_device(batch, torch.device("cpu"))
    assert moved["target_places"].shape == target_places(batch).shape
    expected = [i for i, on in enumerate(target_mask(batch["labels"]).flatten().tolist()) if on]
    assert target_places(batch).tolist() == expected
    assert target_places({**batch, "target_places": torch.tensor([4])}).tolist() == [4]


# ---------------------------------------------------------------- 整个循环


class Enough(Exception):
    """走够了。"""


class Packed:
    """打包的行：两种段长轮着来。"""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict:
        lengths = ([40, 33, 127], [100, 60, 40])[index % 2]
        ids = torch.arange(200) % 90 + 3
        labels = ids.clone()
        labels[torch.tensor([0, *lengths[:-1]]).cumsum(0)] = -100
        position = torch.cat([torch.arange(n) for n in lengths])
        return dict(input_ids=ids, labels=labels, position_ids=position, seg_lens=lengths, num_tokens=200)


@pytest.fixture
def train_on_card(on_card, monkeypatch, tmp_path):
    """``train_on_card(…)``：真的训练循环在 meta 上晚一步读地走六步，两行日志之间；走到第七步就够了。

    meta 上没有的三样用替身：融合 AdamW 的设备检查、抽看的权重、拷回来的数（全是 1，没有人要停；这一份是唯一
    许读的，CUDA 上由锁页内存与记号完成，不等）。
    """
    steps = []
    monkeypatch.setattr(Run, "reads_late", True)
    monkeypatch.setattr(tally, "start_copy", lambda values: (None, None))
    monkeypatch.setattr(
        tally.Update, "numbers", property(lambda self: {n: float(n != "stop") for n in self.names})
    )
    monkeypatch.setattr(VitalSigns, "_sample", lambda self: torch.zeros(1))
    monkeypatch.setattr(step, "autocast_context", lambda *a: contextlib.nullcontext())
    monkeypatch.setattr(adam, "_device_dtype_check_for_fused", lambda *a, **kw: None)
    monkeypatch.setattr(
        optim.torch.optim, "AdamW", lambda groups, fused, **kw: AdamW(groups, fused=True, **kw)
    )
    original = loop.forward_backward

    def forward_backward(run, *rest):
        if run.state.step == 6:
            raise Enough
        steps.append(run.state.step)
        return original(run, *rest)

    monkeypatch.setattr(loop, "forward_backward", forward_backward)

    def train(kind: dict, **settings) -> None:
        args = tiny_args(tmp_path, dtype="bfloat16", log_interval=100, accumulation_steps=2, **settings)
        model = make(**kind).to(META, torch.bfloat16)
        with pytest.raises(Enough), NoHostReads("meta"):
            loop.train(args, toy_recipe(collate=collate_packed), model, None, Data(Packed()))
        assert steps == list(range(6))

    return train


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("kind", KINDS)
def test_两行日志之间的整个训练循环(train_on_card, kind, optimizer):
    """取数、前向反向、范数、裁剪、走不走、Muon 与 AdamW、记账、快照。"""
    train_on_card(kind, optimizer=optimizer)


def test_有的参数没有梯度也不等(train_on_card, monkeypatch):
    """没有分到词元的专家、没有用到的头：记下谁有梯度的下标也不等它送到。"""
    original = step.add_metrics

    def forget_one(sums, *rest):
        original(sums, *rest)
        run_model[0].model.norm.weight.grad = None

    run_model, build = [], loop.set_up
    monkeypatch.setattr(step, "add_metrics", forget_one)
    monkeypatch.setattr(loop, "set_up", lambda *a: run_model.append(a[2]) or build(*a))
    train_on_card({})


@pytest.mark.parametrize(
    ("what", "operator"),
    [
        (lambda run: run.vitals.gradient_norm().item(), "_local_scalar_dense"),
        (lambda run: bool(run.model.lm_head.weight.grad.sum() > 0), "_local_scalar_dense"),
        (lambda run: torch.where(run.vitals.streaks > 0, torch.tensor(1.0), run.vitals.streaks), "where"),
        (lambda run: run.vitals.streaks.cpu(), "_to_copy"),
    ],
)
def test_循环里谁读一次都会被认出来(train_on_card, monkeypatch, what, operator):
    original = loop.update_weights

    def peeking(run, *rest):
        what(run)
        original(run, *rest)

    monkeypatch.setattr(loop, "update_weights", peeking)
    with pytest.raises(HostRead, match=operator):
        train_on_card({})


def test_当场就读的循环过不了(train_on_card, monkeypatch):
    """上面几条真的在看：不晚读，走不走由主机定，就要等。"""
    monkeypatch.setattr(Run, "reads_late", False)
    monkeypatch.setattr(tally.Update, "numbers", property(lambda self: self.totals.tolist()))
    with pytest.raises(HostRead, match="tolist"):
        train_on_card({})


# ---------------------------------------------------------------- 解码

PARAMS = {
    "贪心": [GREEDY],
    "温度一": [SamplingParams(temperature=1.0, seed=1)],
    "各种截断": [
        SamplingParams(temperature=0.7, top_k=5, top_p=0.9, min_p=0.05, repetition_penalty=1.2, seed=1)
    ],
    "各行不同": [
        GREEDY,
        SamplingParams(temperature=0.7, top_k=5, seed=1),
        SamplingParams(temperature=1.3, top_p=0.8, repetition_penalty=1.1, seed=2),
    ],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PARAMS)
def test_两次对账之间的解码(on_card, monkeypatch, kind, name):
    """整个引擎在 meta 上走：进场、读提示、写，只有每 stride 个词元对一次账时读。"""
    monkeypatch.setattr(FusedDecoder, "precision", lambda self: contextlib.nullcontext())
    # 读提示的注意力在卡上是变长内核，这里按长度成批
    engine = Engine(
        make(**kind).to(META, torch.bfloat16).eval(), eos_ids=(), max_slots=3, max_length=64, stride=8
    )
    reads, releasing, original = [], [], engine._collect

    def record(ids, logp, first):
        reads.append(ids.shape)
        host = [torch.zeros(t.shape, dtype=t.dtype) for t in (ids, logp)]
        return original(*host, first)

    monkeypatch.setattr(engine, "_collect", record)
    for index in range(3):
        engine.add_request([5, 6, 7, 8], PARAMS[name][index % len(PARAMS[name])], 17)
    written, leave = engine._advance, engine._release
    # 写完的行离场在对账之后，搬动时建下标不要紧
    monkeypatch.setattr(engine, "_release", lambda slots: releasing.append(slots))

    def advance():
        with NoHostReads("meta"):
            finished = written()
        while releasing:
            leave(releasing.pop())
        return finished

    monkeypatch.setattr(engine, "_advance", advance)
    finished = []
    while engine.has_unfinished:
        finished += engine.step()
    assert [len(sequence.ids) for sequence in finished] == [17] * 3
    assert reads == [(1, 3), (8, 3), (8, 3)]  # 第一个词元，然后每八个一次


@pytest.mark.parametrize("arch", ["v2", "v3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [1, 3])
def test_混合专家定形的一步_没有分组矩阵乘也不读(monkeypatch, arch, dtype, rows):
    """照路由分组的在这里要读回各专家的词元数；录制只能用不读的。"""
    monkeypatch.setattr(model_minimind, "grouped_mm_available", lambda x, width: False)
    monkeypatch.setattr(FusedDecoder, "precision", lambda self: contextlib.nullcontext())
    decoder = FusedDecoder(make(use_moe=True, arch=arch).to(META, dtype).eval(), 4)
    decoder.reserve(0, 64)
    tokens = positions = torch.zeros(rows, dtype=torch.long, device=META)
    with torch.inference_mode():
        with pytest.raises(HostRead, match="tolist"), NoHostReads("meta"):
            decoder.walk(tokens, positions, 64, True)
        decoder.use_static()
        with NoHostReads("meta"):
            assert decoder.walk(tokens, positions, 64, True).shape == (rows, 97)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name in PARAMS if name != "各行不同"])
def test_录好的一段_连抽样在内_到对账才读(kind, name):
    """录与核对时可以读；此后一段（八步）里一个数也不读。用不录的替身，盯着 CPU。"""
    engine = Engine(make(**kind).eval(), eos_ids=(), max_slots=4, max_length=200)
    engine._graphs, engine.stride = GraphedDecode(engine.decoder, 4, rerun), 8
    write, quiet = engine._graphs.write, []

    def watched(*args):
        made = len(engine._graphs.graphs)
        if made:
            with NoHostReads("cpu"):
                result = write(*args)
            quiet.append(len(engine._graphs.graphs) == made)
            return result
        return write(*args)

    engine._graphs.write = watched
    for _ in range(3):
        engine.add_request([5, 6, 7, 8], PARAMS[name][0], 50)
    while engine.has_unfinished:
        engine.step()
    assert len(quiet) >= 5 and all(quiet) and not engine._graphs.trouble


def rerun(run):
    """录制的替身：不录、照常跑。"""
    out = run()
    return (lambda: out.copy_(run())), out


def test_读回来的一步会被认出来(on_card, monkeypatch):
    """上一条真的在看：采样里加一次读，就过不了。"""
    monkeypatch.setattr(FusedDecoder, "precision", lambda self: contextlib.nullcontext())
    engine = Engine(make().to(META).eval(), eos_ids=(), max_slots=1, max_length=64, stride=8)
    sample, written = engine._state.sample, []

    def peeking(logits, rows, first):
        if len(engine._rows) and written:
            logits.argmax(-1).tolist()
        written.append(1)
        return sample(logits, rows, first)

    monkeypatch.setattr(engine._state, "sample", peeking)
    engine.add_request([5, 6], GREEDY, 4)
    advance = engine._advance

    def watched():
        with NoHostReads("meta"):
            return advance()

    monkeypatch.setattr(engine, "_collect", lambda ids, logp, first: [])
    monkeypatch.setattr(engine, "_advance", watched)
    with pytest.raises(HostRead, match="tolist"):
        engine.step()


def test_对数概率不受目标位置从哪里来的影响():
    torch.manual_seed(0)
    model, batch = make().eval(), rows()
    early = {**batch, "target_places": target_places(batch)}
    a, b = (target_logits(model, one) for one in (batch, early))
    assert torch.equal(a.hidden, b.hidden) and torch.equal(a.targets, b.targets)
    expected = F.log_softmax(a.logits.float(), -1).gather(1, a.targets[:, None])[:, 0]
    torch.testing.assert_close(b.logprobs(), expected)
