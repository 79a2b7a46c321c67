"""开训前说的内存：按结构数出来的，与 CPU 上实测留给反向的字节、与卡上实测的最高值都差在一成半之内。"""

from __future__ import annotations

import contextlib
import types

import pytest
import torch
from test_compiling import Packed, packed_train
from trainer_helpers import tiny_args

from minimind.dataset.packed import collate_packed
from minimind.model import MiniMindConfig, MiniMindLM, preset
from minimind.trainer import footprint as home
from minimind.trainer.footprint import activation_bytes, footprint, largest_rows
from minimind.trainer.recipe import language_model_loss
from minimind.trainer.setup import recompute_layers

ROWS, LENGTH, VOCAB = 3, 256, 1000


def batch() -> dict:
    made = []
    for _ in range(ROWS):
        lengths = [100, 60, LENGTH - 160]
        ids = torch.randint(3, VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(1))
        positions = torch.cat([torch.arange(n) for n in lengths])
        made.append(
            dict(input_ids=ids, labels=ids, position_ids=positions, seg_lens=lengths, num_tokens=LENGTH)
        )
    return collate_packed(made)


def saved_bytes(config: MiniMindConfig, half: bool, layers: str) -> int:
    """留给反向的张量一共多少字节：同一块存储只数一次，参数自己不数。"""
    torch.manual_seed(0)
    model = MiniMindLM(config).train()
    recompute_layers(model, layers)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, torch.Tensor] = {}

    def keep(tensor):
        where = tensor.untyped_storage().data_ptr()
        if where not in own:
            held[where] = tensor  # 拿着，地址才不会让给别人
        return tensor

    mixed = torch.autocast("cpu", dtype=torch.bfloat16) if half else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), mixed:
        language_model_loss(model, batch())
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


@pytest.mark.parametrize("layers", ["0", "2", "all"])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    "kind",
    [{}, {"arch": "v3"}, {"use_moe": True}, {"use_moe": True, "arch": "v3"}, {"num_key_value_heads": 8}],
)
def test_中间结果与CPU上数到的差在一成半之内(kind, half, layers):
    sizes = dict(hidden_size=256, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2)
    config = MiniMindConfig(**(sizes | kind), vocab_size=VOCAB)
    with torch.device("meta"):
        model = MiniMindLM(config)
    tokens = ROWS * LENGTH
    found = footprint(model, tokens, half=half, checkpoint_layers=layers)
    # 分块交叉熵还把输出头的 fp32 梯度留给反向，它记在 transient 里
    head = 4 * VOCAB * config.hidden_size
    expected = found.activations + found.casts + head
    assert expected == pytest.approx(saved_bytes(config, half, layers), rel=0.15)
    assert found.activations == activation_bytes(config, tokens, half=half, checkpoint_layers=layers)


@pytest.mark.parametrize(("size", "measured_gib"), [("small", 6.2), ("base", 17.3), ("moe", 17.7)])
def test_一步的最高值与卡上量到的差在一成半之内(size, measured_gib):
    """一张 H200，打包的 32,768 个位置，Muon，bf16，逐算子，分配器的最高值。"""
    with torch.device("meta"):
        model = MiniMindLM(preset(size))
    assert footprint(model, 32_768).peak / 2**30 == pytest.approx(measured_gib, rel=0.15)


def test_优化器的状态与梯度照实数():
    from types import SimpleNamespace

    from minimind.trainer.optim import build_optimizer

    model = MiniMindLM(preset("tiny"))
    args = dict(learning_rate=1e-3, weight_decay=0.1, embed_lr_scale=4.0, muon_momentum=0.95, adam_beta2=0.95)
    for name in ("muon", "adamw"):
        optimizer = build_optimizer(model, SimpleNamespace(**args, optimizer=name))
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        every = getattr(optimizer, "optimizers", {"": optimizer}).values()
        states = [t for one in every for state in one.state.values() for t in state.values()]
        held = sum(t.numel() * t.element_size() for t in states if isinstance(t, torch.Tensor) and t.ndim)
        found = footprint(model, 128, optimizer=name)
        assert found.state == held
        assert found.weights == found.gradients == 4 * sum(p.numel() for p in model.parameters())


def test_冻结的参数没有梯度与状态():
    model = MiniMindLM(preset("tiny"))
    for p in model.model.parameters():
        p.requires_grad_(False)
    found = footprint(model, 128)
    assert found.gradients == found.state == 0 and found.weights > 0


def test_最大的批刚好放得下_多一行就放不下():
    with torch.device("meta"):
        model = MiniMindLM(preset("small"))
    for card in (8, 24):
        rows = largest_rows(model, card, 512)
        room = (card * home.GB - home.CARD_OVERHEAD) / (1 + home.FRAGMENTS)
        assert footprint(model, rows * 512).peak <= room < footprint(model, (rows + 1) * 512).peak
    assert largest_rows(model, 8, 512, checkpoint_layers="all") > 3 * largest_rows(model, 8, 512)
    assert largest_rows(model, 1, 512) == 0


def test_开训前说一声(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Packed, "row_length", Packed.LENGTH, raising=False)
    packed_train(tmp_path, max_steps=1)
    assert "预计内存 0.0 GB（参数与优化器 0.0，中间结果 0.0，其余 0.0）。" in capsys.readouterr().err


def test_卡上放不下_先说该动哪个参数(monkeypatch, capsys):
    with torch.device("meta"):
        model = MiniMindLM(preset("base"))
    run = types.SimpleNamespace(
        args=tiny_args("out", batch_size=64, max_seq_len=512),
        recipe=types.SimpleNamespace(cross_entropy=True),
        data=types.SimpleNamespace(train=types.SimpleNamespace(row_length=512)),
        model=model,
        config=model.config,
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 * 10**9, 8 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    home.announce_memory(run)
    said = capsys.readouterr().err
    assert "预计显存 1" in said and "卡上只剩 8.0 GB，多半放不下" in said and "--batch_size 32" in said
    run.recipe.cross_entropy = False  # 另有教师、价值网络的训练数不全，不说
    home.announce_memory(run)
    assert capsys.readouterr().err == ""
