"""自检查得出错：每种故意弄坏的地方，该红的行变红，别的行照样是绿的。"""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch

from minimind import selftest
from minimind.inference.cuda_graph import GraphedDecode
from minimind.inference.engine import Engine
from minimind.model import cpu_attention, model_minimind
from minimind.runtime import checkpoint, device
from minimind.selftest import decoding, numerics, pair, toys, training
from minimind.selftest.rows import FAILED, PASSED, run_check
from minimind.trainer import archive, optim, setup

CPU = torch.device("cpu")
EAGER = {f"前向反向 {row}" for row in ("v2 打包 fp32", "v2 左填充 fp32", "v2 打包 bf16", "MoE 打包 fp32")}
ENGINE, RECORDED = "解码 引擎 v2 fp32", "解码 录制 v2 fp32"
ADAMW, MUON = "优化器 AdamW", "优化器 Muon，fp32 迭代"
WEIGHTS, RESUME = "存取 权重 fp16", "存取 中断再续 fp32"
SCOPE = [*sorted(EAGER), ENGINE, RECORDED, ADAMW, MUON, WEIGHTS, RESUME]


def recorded(replay_of, model):
    """不录、照常跑的替身；``replay_of(run, out)`` 给出重放。"""

    def recorder(work):
        out = work()
        return functools.partial(replay_of, work, out), out

    engine = Engine(model, **decoding.OPTIONS)
    engine._graphs = GraphedDecode(engine.decoder, engine.max_slots, recorder)
    return engine


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    """录制在 CPU 上用替身；峰值不必量。"""
    monkeypatch.setattr(device, "PEAK_SECONDS", 0.0)
    monkeypatch.setattr(pair, "WAIT_SECONDS", 600)  # 机器再忙也够
    honest = functools.partial(recorded, lambda work, out: out.copy_(work()))
    monkeypatch.setattr(decoding, "recorded_engine", honest)
    for kind, layout in (("v2", "打包"), ("v2", "左填充"), ("MoE", "打包")):
        numerics.reference(kind, layout)  # 参考要在弄坏之前算好
    decoding.judge("v2")


def rows_of(names):
    checks = {f"{check.group} {check.name}": check for check in selftest.all_checks(CPU)}
    return {name: run_check(checks[name]) for name in names}


def red_rows(names=SCOPE):
    rows = rows_of(names)
    assert {row.status for row in rows.values()} <= {PASSED, FAILED}
    return {name for name, row in rows.items() if row.status == FAILED}


def test_没有弄坏时全绿():
    assert red_rows() == set()


def zero_segment_gradient(patch):
    def backward(ctx, grad):
        return (*(torch.zeros_like(t) for t in ctx.saved_tensors), None)

    patch.setattr(cpu_attention.SegmentAttention, "backward", staticmethod(backward))


def mask_ignored(patch):
    original = model_minimind.attention
    patch.setattr(
        model_minimind, "attention", lambda q, k, v, mask, causal, dropout: original(q, k, v, None, True)
    )


def untied(patch):
    def broken(model, where):
        model = toys.on_device(model, where)
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        return model

    patch.setattr(numerics, "on_device", broken)


def swapped_head(patch):
    def broken(model, where):
        model = toys.on_device(model, where)
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().roll(1, 0))
        return model

    patch.setattr(decoding, "on_device", broken)


def stale_graph(patch):
    patch.setattr(decoding, "recorded_engine", functools.partial(recorded, lambda work, out: None))


def muon_too_large(patch):
    patch.setattr(optim, "RMS_MATCH", 0.4)


def adamw_wrong_beta(patch):
    original = torch.optim.AdamW

    def broken(groups, lr, betas, fused):
        return original(groups, lr=lr, betas=(0.9, 0.999), fused=fused)

    patch.setattr(optim.torch.optim, "AdamW", broken)


def lossy_resume(patch):
    original = checkpoint.lm_checkpoint

    def broken(*args, model=None, **kwargs):
        if model is None:
            return original(*args, **kwargs)
        rounded = {k: v.half().float() for k, v in model.state_dict().items()}
        model = type("Model", (), {"state_dict": lambda self: rounded})()
        return original(*args, model=model, **kwargs)

    patch.setattr(archive.checkpoint, "lm_checkpoint", broken)


def rng_not_restored(patch):
    # 临时借用随机数的地方也经过它，所以只在续训那一处弄坏
    original = setup.seed
    patch.setattr(setup, "seed", lambda run, saved: original(run, {}))


def lossy_weights(patch):
    original = checkpoint.half_state_dict
    patch.setattr(
        checkpoint, "half_state_dict", lambda m: {k: v.bfloat16().half() for k, v in original(m).items()}
    )


def half_is_really_fp32(patch):
    patch.setattr(numerics, "autocast_context", lambda where, dtype: contextlib.nullcontext())


def half_of_another_seed(patch):
    original = numerics.loss_and_gradients

    def broken(model, forward, batch, where, precision):
        if precision.dtype == torch.bfloat16:
            model = forward = toys.toy_model("v2", seed=1)
            precision = numerics.PRECISIONS["fp32"]
        return original(model, forward, batch, where, precision)

    patch.setattr(numerics, "loss_and_gradients", broken)


def half_gradients_nan(patch):
    original = numerics.loss_and_gradients

    def broken(model, forward, batch, where, precision):
        loss, gradients = original(model, forward, batch, where, precision)
        if precision.dtype == torch.bfloat16:
            gradients["model.norm.weight"][0] = float("nan")
        return loss, gradients

    patch.setattr(numerics, "loss_and_gradients", broken)


def engine_raises(patch):
    def step(self):
        raise RuntimeError("NPU 上没有这个算子\n第二行")

    patch.setattr(Engine, "step", step)


PACKED = {name for name in EAGER if "打包" in name}


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (zero_segment_gradient, PACKED),
        (mask_ignored, {"前向反向 v2 左填充 fp32"}),
        (untied, EAGER),
        (swapped_head, {ENGINE, RECORDED}),
        (stale_graph, {RECORDED}),
        (muon_too_large, {MUON}),
        (adamw_wrong_beta, {ADAMW, MUON}),
        (lossy_resume, {RESUME}),
        (rng_not_restored, {RESUME}),
        (lossy_weights, {WEIGHTS}),
        (half_is_really_fp32, {"前向反向 v2 打包 bf16"}),
        (half_of_another_seed, {"前向反向 v2 打包 bf16"}),
        (half_gradients_nan, {"前向反向 v2 打包 bf16"}),
        (engine_raises, {ENGINE, RECORDED}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_弄坏一处_只有该红的红(monkeypatch, fault, expected):
    fault(monkeypatch)
    assert red_rows() == expected


def test_红的行说得出原因(monkeypatch):
    with monkeypatch.context() as patch:
        engine_raises(patch)
        assert rows_of([ENGINE])[ENGINE].note == "RuntimeError：NPU 上没有这个算子"
    with monkeypatch.context() as patch:
        half_is_really_fp32(patch)
        name = "前向反向 v2 打包 bf16"
        assert "没有真的用半精度" in rows_of([name])[name].note
    with monkeypatch.context() as patch:
        untied(patch)
        name = "前向反向 v2 打包 fp32"
        assert "lm_head.weight" in rows_of([name])[name].note
    muon_too_large(monkeypatch)
    assert "最差的是 model.layers" in rows_of([MUON])[MUON].note


def test_编译出的图算错就红(monkeypatch):
    """编译在这里换成现成的“图”：对的绿，别的权重的红；照常跑的那一行不受影响。"""
    name, eager = "编译 v2 打包 fp32", "前向反向 v2 打包 fp32"
    monkeypatch.setattr(numerics, "compiled_forward", lambda model: lambda **batch: model(**batch))
    monkeypatch.setattr(numerics, "language_model_loss", _loss_of_a_graph)
    assert red_rows([name, eager]) == set()
    other = toys.toy_model("v2", seed=1)
    monkeypatch.setattr(numerics, "compiled_forward", lambda _: lambda **batch: other(**batch))
    assert red_rows([name, eager]) == {name}


def _loss_of_a_graph(forward, batch):
    inputs = {key: value for key, value in batch.items() if key != "num_tokens"}
    out = forward(**inputs, return_logits=False)
    return out.loss_sum, {}


def test_缺编译器不算不合格(monkeypatch):
    class InvalidCxxCompiler(Exception):
        pass

    def graph(**batch):
        raise RuntimeError("后端失败") from InvalidCxxCompiler("g++")

    monkeypatch.setattr(numerics, "compiled_forward", lambda _: graph)
    row = rows_of(["编译 v2 打包 fp32"])["编译 v2 打包 fp32"]
    assert (row.status, "C++ 编译器" in row.note) == ("—", True)


def fake_launch(folder, kind, *, first, second):
    for rank, weights in enumerate((first, second)):
        torch.save(weights, f"{folder}/rank{rank}.pth")


@pytest.mark.parametrize(("fault", "red"), [("没有", False), ("各练各的", True), ("只用了一半的批", True)])
def test_两个进程没有归约就红(monkeypatch, tmp_path, fault, red):
    whole = training.toy_train(tmp_path / "一", CPU, batch_size=4)
    half = training.toy_train(tmp_path / "二", CPU, batch_size=2)
    pairs = {"没有": (whole, whole), "各练各的": (whole, half), "只用了一半的批": (half, half)}
    first, second = pairs[fault]
    monkeypatch.setattr(pair, "launch", functools.partial(fake_launch, first=first, second=second))
    assert red_rows(["多进程 两个进程"]) == ({"多进程 两个进程"} if red else set())


def test_两个真的进程():
    row = rows_of(["多进程 两个进程"])["多进程 两个进程"]
    assert row.status == PASSED, row


def test_子进程起不来说出原因(tmp_path):
    with pytest.raises(RuntimeError, match=r"退出码 \d+：.*不认识的设备"):
        pair.launch(str(tmp_path), "没有的设备")


def test_设备不可重复时限度写明(monkeypatch):
    """两遍训练自己都不相同的设备：续训的限度随它而定，并写在说明里；差得太远照样红。"""
    for resumed, status in ((2e-6, PASSED), (0.2, FAILED)):
        noises = iter([0.0, 1e-6, 0.0, resumed])

        def noisy(*_, noises=noises, **__):
            amount = next(noises)
            return {name: p + 0.5 + amount for name, p in toys.toy_model("v2").state_dict().items()}

        monkeypatch.setattr(training, "toy_train", noisy)
        monkeypatch.setattr(training, "load_file", lambda path: {"step": 3})
        row = rows_of([RESUME])[RESUME]
        assert (row.status, "不可重复" in row.note) == (status, True)
