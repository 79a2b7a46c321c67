"""编译：各层一个图、不重编译、梯度与逐算子的一致；不对或编译不了就一句话，训练照常。"""

from __future__ import annotations

import json
import sys
import types
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch._dynamo
from trainer_helpers import (
    ToyRows,
    assert_same_weights,
    saved_model,
    tiny_args,
    tiny_config,
    tiny_model,
    toy_recipe,
    toy_train,
)

from minimind.arguments import parse_args
from minimind.errors import UserError
from minimind.trainer import compiling
from minimind.trainer.compiling import CompiledBlocks, compare, maybe_compile, worth_compiling
from minimind.trainer.loop import train
from minimind.trainer.recipe import Data, language_model_loss
from minimind.trainer.train_args import TrainArguments


@pytest.fixture
def backend(monkeypatch):
    """换掉 ``torch.compile`` 的后端；aot_eager 与 inductor 走同样的图捕获与自动微分，只省下生成 C++ 的一分钟。"""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    original = CompiledBlocks.__init__

    def use(chosen):
        monkeypatch.setattr(
            CompiledBlocks, "__init__", lambda self, model: original(self, model, backend=chosen)
        )

    use("aot_eager")
    yield use
    torch._dynamo.reset()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


class Packed(ToyRows):
    """打包的行：每批的段数、段长都不同。"""

    LENGTH = 140

    def __init__(self, size: int = 12):
        self.ids = torch.randint(3, 97, (size, self.LENGTH), generator=torch.Generator().manual_seed(0))

    def __getitem__(self, index):
        return index, self.ids[index]


def pack(rows):
    ids = torch.stack([row for _, row in rows])
    edges, positions = [0], []
    for line, (index, row) in enumerate(rows):
        cuts = sorted({7 * index + 3, 11, 60 + index}) if index % 3 else []
        inner = [0, *cuts, len(row)]
        edges += [line * len(row) + cut for cut in inner[1:]]
        positions += [torch.arange(b - a) for a, b in pairwise(inner)]
    return {
        "input_ids": ids,
        "labels": ids,
        "position_ids": torch.cat(positions).view_as(ids),
        "cu_seqlens": torch.tensor(edges, dtype=torch.int32),
        "max_seqlen": Packed.LENGTH,
    }


def packed_train(folder, model=None, **changes):
    settings = {"max_seq_len": Packed.LENGTH, "batch_size": 2, "learning_rate": 2e-3, **changes}
    args = tiny_args(folder, **settings)
    return train(args, toy_recipe(collate=pack), tiny_model(**(model or {})), None, Data(Packed()))


def losses(result):
    return [line["loss"] for line in map(json.loads, result.log.read_text().splitlines())]


@pytest.mark.parametrize(
    "model", [{}, {"arch": "v3"}, {"use_moe": True}, {"arch": "v3", "use_moe": True}, {"dropout": 0.1}]
)
def test_打包训练_编译与不编译一致_头一步之后不再编译(tmp_path, backend, capsys, monkeypatch, model):
    seen = []
    original = compiling.compile_and_check

    def recording(run, *rest):
        original(run, *rest)
        seen.append(graphs())

    monkeypatch.setattr(compiling, "compile_and_check", recording)
    plain = packed_train(tmp_path / "a", model)
    compiled = packed_train(tmp_path / "b", model, use_compile=1)
    said = capsys.readouterr().err
    assert "正在编译" in said and "都与不编译时一致" in said
    assert len(seen) == 6 and seen[0] == seen[-1] > 0  # 不编译的不经过它；第一步编好，之后一个图也不多
    if not model.get("dropout"):  # 带 dropout 时编译用另一种随机数，只是分布相同
        assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)
    assert torch._dynamo.utils.counters["graph_break"] == {}
    if model.get("use_moe"):
        assert "混合专家" in said


def test_卡上损失也进图_各块一样长只编一次_出了前向照旧(tmp_path, backend, monkeypatch, capsys):
    monkeypatch.setattr(CompiledBlocks, "loss_fits", True)
    monkeypatch.setattr(compiling, "CHUNK_BYTES", 4 * 97 * 100)  # 2 × 140 行分三块，94、94、92
    sizes, original = [], compiling.linear_cross_entropy

    def spy(hidden, weight, target, loss_weight, chunk, piece):
        sizes.append((len(target), chunk))
        return original(hidden, weight, target, loss_weight, chunk, piece)

    monkeypatch.setattr(compiling, "linear_cross_entropy", spy)
    model = tiny_model()
    plain = packed_train(tmp_path / "a")
    args = tiny_args(
        tmp_path / "b", max_seq_len=Packed.LENGTH, batch_size=2, learning_rate=2e-3, use_compile=1
    )
    compiled = train(args, toy_recipe(collate=pack), model, None, Data(Packed()))
    assert "都与不编译时一致" in capsys.readouterr().err
    assert set(sizes) == {(2 * Packed.LENGTH, 94)}
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)
    assert "cross_entropy" not in vars(model) and graphs() <= 3  # 一层，损失的整块与零头


def test_CPU上损失不编译(backend):
    assert not CompiledBlocks(tiny_model()).loss_fits


def test_稠密模型各层共用一个图(tmp_path, backend):
    packed_train(tmp_path, {"num_hidden_layers": 4}, use_compile=1)
    assert graphs() == 1


def documents(count: int, rows: int = 2, length: int = 128) -> dict:
    """``rows`` 行打包成 ``count`` 篇，长短不一。"""
    generator = torch.Generator().manual_seed(count)
    cuts = torch.randperm(rows * length - 1, generator=generator)[: count - 1] + 1
    edges = sorted({0, *cuts.tolist(), *(length * (r + 1) for r in range(rows))})
    ids = torch.randint(3, 97, (rows, length), generator=generator)
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(edges)]).view(rows, length)
    edges = torch.tensor(edges, dtype=torch.int32)
    return dict(
        input_ids=ids,
        labels=ids,
        position_ids=positions,
        cu_seqlens=edges,
        max_seqlen=int(edges.diff().max()),
    )


@pytest.mark.parametrize("chosen", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("layers", [0, 1])
@pytest.mark.parametrize("model", [{}, {"arch": "v3"}, {"use_moe": True}])
def test_篇数批批不同_前向反向一次也不重编译(backend, model, layers, chosen):
    """头一批 12 篇，之后 3 到 25 篇；重编译当场就是错误，包括只多一个守卫、图没有变的。"""
    backend(chosen)
    wrapped = CompiledBlocks(tiny_model(**model).train())
    wrapped.module.model.gradient_checkpointing = layers
    wrapped.state = "on"
    language_model_loss(wrapped, documents(12))[0].backward()
    before = graphs()
    assert before > 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count in (3, 25, 1, 17, 12):
            language_model_loss(wrapped, documents(count))[0].backward()
    assert wrapped.state == "on" and graphs() == before


def test_重编译真的会被当成错误(backend):
    """上一条的尺子：段界不补齐，就要重编译。"""
    backend("aot_eager")
    wrapped = CompiledBlocks(tiny_model().train())
    wrapped.state, wrapped.static_inputs = "on", lambda batch: batch
    language_model_loss(wrapped, documents(12))
    with torch._dynamo.config.patch(error_on_recompile=True):
        language_model_loss(wrapped, documents(5))
    assert wrapped.state == "off"


def test_bf16的编译也过得了核对(tmp_path, backend, capsys):
    packed_train(tmp_path, use_compile=1, dtype="bfloat16", max_steps=2)
    assert "都与不编译时一致" in capsys.readouterr().err


def test_真的inductor_梯度余弦不低于千分之九百九十九(tmp_path, backend, monkeypatch, capsys):
    backend("inductor")
    cosines = []

    def recording(plain, ours, dtype):
        for name, a in plain.grads.items():
            b = ours.grads[name]
            cosines.append(float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0)))
        return compare(plain, ours, dtype)

    monkeypatch.setattr(compiling, "compare", recording)
    packed_train(tmp_path, use_compile=1, max_steps=2)
    assert "都与不编译时一致" in capsys.readouterr().err
    assert len(cosines) == 20 and min(cosines) > 0.999


def test_一轮末尾不满的批不为它重编译(tmp_path, backend, capsys):
    """12 行、每批 5 行：末尾 2 行逐算子走，结果不变。"""
    plain = packed_train(tmp_path / "a", batch_size=5, epochs=2)
    compiled = packed_train(tmp_path / "b", batch_size=5, epochs=2, use_compile=1)
    assert graphs() == 1
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)


def wrong(kind):
    """一个算错梯度的“编译器”：损失都对，梯度不对。"""

    def spoil(grad):
        return {"zero": grad * 0, "double": grad * 2, "swapped": grad.flip(0), "nan": grad * float("nan")}[
            kind
        ]

    def compile(function, **options):
        def forward(unit, x, *rest):
            y = function(unit, x, *rest)
            hidden = y[0] + 0
            if hidden.requires_grad:
                hidden.register_hook(spoil)
            return hidden, y[1]

        return forward

    return compile


@pytest.mark.parametrize("kind", ["zero", "double", "swapped", "nan"])
def test_梯度算错的编译被识破_说出头一个参数_照常学(tmp_path, monkeypatch, capsys, kind):
    monkeypatch.setattr(torch, "compile", wrong(kind))
    checked = toy_train(tmp_path / "a", use_compile=1, epochs=4, learning_rate=2e-3)
    said = capsys.readouterr().err
    assert said.count("编译后的梯度不对：model.") == 1 and "接着训练，但不编译" in said
    assert checked.step == 44
    plain = toy_train(tmp_path / "b", epochs=4, learning_rate=2e-3)
    assert_same_weights(saved_model(tmp_path / "a"), saved_model(tmp_path / "b"))
    assert losses(plain)[-1] < losses(plain)[0]


def test_损失算错的编译被识破(tmp_path, monkeypatch, capsys):
    def compile(function, **options):
        return lambda unit, x, *rest: function(unit, x * 1.5 + 1, *rest)

    monkeypatch.setattr(torch, "compile", compile)
    toy_train(tmp_path, use_compile=1, max_steps=2)
    assert "编译后的损失是" in capsys.readouterr().err


def test_编译不了是一句话_训练照常(tmp_path, monkeypatch, capsys):
    """没有 C++ 编译器、后端报错都一样。"""

    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler found\n  长长的栈")

    original = CompiledBlocks.__init__
    monkeypatch.setattr(CompiledBlocks, "__init__", lambda self, model: original(self, model, backend=broken))
    torch._dynamo.reset()
    toy_train(tmp_path / "a", use_compile=1)
    said = [line for line in capsys.readouterr().err.splitlines() if "编译失败" in line]
    assert len(said) == 1 and "C++" in said[0]
    toy_train(tmp_path / "b")
    assert_same_weights(saved_model(tmp_path / "a"), saved_model(tmp_path / "b"))


def test_核对不动随机数_有dropout也一样(tmp_path, monkeypatch):
    """编译器换成原样的函数，于是训练只多了核对这一遍：权重必须逐位相同。"""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    for name, choice in (("a", 0), ("b", 1)):
        toy_train(tmp_path / name, use_compile=choice, model={"dropout": 0.2}, accumulation_steps=2)
    assert_same_weights(saved_model(tmp_path / "a"), saved_model(tmp_path / "b"))


def test_梯度全为零的头一步说明不了什么_留到有梯度时再核对(tmp_path, monkeypatch, capsys):
    calls = {"n": 0}

    def silent_at_first(model, batch):
        loss, metrics = language_model_loss(model, batch)
        calls["n"] += 1
        return loss * float(calls["n"] > 4), metrics

    monkeypatch.setattr(torch, "compile", wrong("zero"))
    toy_train(tmp_path, use_compile=1, loss=silent_at_first)
    assert capsys.readouterr().err.count("编译后的梯度不对") == 1


def test_存档的键名干净_评估用没包装的模型(tmp_path, backend):
    result = toy_train(tmp_path, use_compile=1, max_steps=2, optimizer="adamw", val_rows=3)
    keys = set(saved_model(tmp_path)) | set(torch.load(result.weights, weights_only=True))
    assert keys == set(tiny_model().state_dict())
    assert graphs() == 1


def test_编译的时间不计入步时(tmp_path, monkeypatch):
    from minimind.console import Meter

    clock = {"t": 0.0}
    monkeypatch.setattr("minimind.console.time.perf_counter", lambda: clock["t"])
    meter = Meter()
    with meter.pause("compile"):
        clock["t"] += 4000
    clock["t"] += 2
    assert meter.lap() == 2
    assert meter.seconds_left(10, 0, 0) == pytest.approx(20)


def fake_run(kind="cuda", steps=10_000, probes=True, peak=1e14):
    recipe = toy_recipe(prepare=None if probes else lambda run, window: [window])
    args = types.SimpleNamespace(max_seq_len=512, batch_size=32, accumulation_steps=1)
    return types.SimpleNamespace(
        device=types.SimpleNamespace(type=kind), args=args, recipe=recipe, numerics={"peak_flops": peak},
        state=types.SimpleNamespace(step=0, total_steps=steps), data=Data(ToyRows(4)), config=tiny_config(hidden_size=512, num_hidden_layers=8),
    )  # fmt: skip


def test_auto只在CUDA上够长的训练里编译():
    assert worth_compiling(fake_run())
    assert not worth_compiling(fake_run("cpu")) and not worth_compiling(fake_run("mps"))
    assert not worth_compiling(fake_run(steps=20))
    assert not worth_compiling(fake_run(probes=False))  # 强化学习
    assert worth_compiling(fake_run(peak=None)) and not worth_compiling(fake_run(peak=None, steps=100))
    model = tiny_model()
    assert maybe_compile(model, "auto", fake_run("cpu")) is model
    assert maybe_compile(model, 0, fake_run()) is model


@pytest.mark.parametrize("kind", ["npu", "mps"])
def test_NPU与MPS上跳过编译并说明(capsys, kind):
    model = tiny_model()
    assert maybe_compile(model, 1, fake_run(kind)) is model
    assert kind.upper() in capsys.readouterr().err


def test_参数的四种写法():
    def choice(*words):
        return parse_args(TrainArguments, list(words)).use_compile

    assert (choice(), choice("--use_compile"), choice("--use_compile", "1")) == (0, 1, 1)
    assert (choice("--use_compile", "0"), choice("--use-compile", "auto")) == (0, "auto")
    with pytest.raises(UserError, match="0、1、auto"):
        choice("--use_compile", "2")


def test_整个模型一起编译梯度也对(backend):
    """不经过训练循环、自己 ``torch.compile(model)`` 的人：torch 2.11 上曾经所有梯度都是 0。"""
    model, batch = tiny_model(), pack([Packed()[i] for i in range(3)])
    expected = model(**batch).loss_sum
    expected.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss = torch.compile(model, backend="aot_eager", fullgraph=True)(**batch).loss_sum
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, plain[name], rtol=1e-3, atol=1e-5)


def test_模型文件载入两份_编译的算子照样可用(backend, tmp_path, monkeypatch):
    """导出的目录自带这个文件，与项目里的那份会同时在一个进程里。"""
    import importlib
    import shutil

    from transformers import AutoConfig

    from minimind.model import model_minimind

    shutil.copytree(Path(model_minimind.__file__).parent, tmp_path / "second_copy")
    (tmp_path / "second_copy/__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        module = importlib.import_module("second_copy.model_minimind")
        batch = pack([Packed()[i] for i in range(2)])
        for home in (model_minimind, module):
            config = home.MiniMindConfig(**tiny_config(num_hidden_layers=1).to_diff_dict())
            model = home.MiniMindForCausalLM(config)
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
            loss = compiled(**batch).loss
            torch.testing.assert_close(loss, model(**batch).loss)
            loss.backward()
    finally:
        for name in [name for name in sys.modules if name.startswith("second_copy")]:
            del sys.modules[name]
        AutoConfig.register("minimind", model_minimind.MiniMindConfig, exist_ok=True)  # 第二份把自己登记上了


def test_DDP两个进程得出同一个结论(tmp_path):
    """只有一个进程算错梯度，两个都不编译，权重仍与没编译的相同。"""
    from trainer_helpers import in_processes

    codes = in_processes(2, one_rank_wrong, folder=tmp_path / "a")
    assert codes == [0, 0]
    assert in_processes(2, toy_train, folder=tmp_path / "b", max_steps=3) == [0, 0]
    assert_same_weights(saved_model(tmp_path / "a"), saved_model(tmp_path / "b"))


def one_rank_wrong(folder):
    import os

    identity = lambda function, **options: function  # noqa: E731
    torch.compile = wrong("double") if os.environ["RANK"] == "1" else identity
    original = CompiledBlocks.turn_off
    off = []
    CompiledBlocks.turn_off = lambda self, reason: off.append(reason) or original(self, reason)
    toy_train(folder, use_compile=1, max_steps=3)
    assert len(off) == 1 and "编译后的梯度不对" in off[0]
