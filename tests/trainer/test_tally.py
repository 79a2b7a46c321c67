"""晚一步读：卡上主机不等这一步的数，走不走由设备定；结果与当场就读逐位相同，坏步、停、续训都不变。

没有卡：在 CPU 上让 :attr:`Run.reads_late` 为真，走的就是卡上的那条路（``found_inf``、至多一次没有读）。
"""

from __future__ import annotations

import math
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from test_loop import bad_loss
from test_resume import SETTINGS, assert_as_if_uninterrupted, log_lines, train_and_die, uninterrupted  # noqa: F401
from trainer_helpers import (
    ToyRows,
    assert_same_weights,
    in_processes,
    saved_model,
    tiny_args,
    tiny_model,
    toy_recipe,
    toy_train,
)

from minimind.errors import UserError
from minimind.runtime import distributed
from minimind.runtime.checkpoint import load_file
from minimind.trainer import loop, tally
from minimind.trainer.loader import epoch_order
from minimind.trainer.loop import train
from minimind.trainer.recipe import Data, Run, language_model_loss


@pytest.fixture
def late(monkeypatch):
    """从此晚一步读。"""
    return lambda: monkeypatch.setattr(Run, "reads_late", True)


def resume_file(folder) -> dict[str, str]:
    """续训存档里的每一项，张量按位；用时与路径不算。"""
    data = load_file(folder / "checkpoints" / "toy_64_resume.pth")
    del data["args"], data["numerics"]

    def flat(value, path=""):
        if isinstance(value, torch.Tensor):
            raw = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            return {path: f"{value.dtype} {list(value.shape)} {hash(raw)}"}
        if not isinstance(value, dict | list | tuple):
            return {path: repr(value)}
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, inner in pairs for k, v in flat(inner, f"{path}.{key}").items()}

    return {key: value for key, value in flat(data).items() if not key.endswith(".seconds")}


def complaints(text: str) -> list[str]:
    return [line for line in text.splitlines() if "不是有限数" in line or "已跳过" in line]


def zero_loss(calls: set[int]):
    """第 k 次调用时梯度恰好全是 0。"""
    seen = {"n": -1}

    def compute(model, batch):
        loss, metrics = language_model_loss(model, batch)
        seen["n"] += model.training
        return loss * (0.0 if seen["n"] in calls else 1.0), metrics

    return compute


CASES = {
    "都好": (lambda: language_model_loss, {}),
    "损失是 NaN": (lambda: bad_loss({0, 4, 6, 7}, "loss"), {}),
    "梯度是无穷": (lambda: bad_loss({0, 4, 6, 7}, "grad"), {}),
    "没有目标": (lambda: language_model_loss, {"batch_size": 1}),  # 第 3 行一个目标也没有
    "梯度全是 0": (lambda: zero_loss({2, 5, 6, 9}), {}),
    "不裁剪": (lambda: bad_loss({4}, "grad"), {"grad_clip": 0.0}),
    "混合专家": (lambda: bad_loss({4}, "loss"), {"model": {"use_moe": True}}),
}


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("name", CASES)
def test_与当场就读逐位相同_坏步也是(tmp_path, capsys, late, name, optimizer):
    make, settings = CASES[name]
    settings = {"log_interval": 4, "save_interval": 6, "epochs": 2, "optimizer": optimizer, **settings}
    said = []
    for folder in (tmp_path / "now", tmp_path / "late"):
        toy_train(folder, loss=make(), **settings)
        said.append(complaints(capsys.readouterr().err))
        late()
    stem = "toy_64_moe" if "model" in settings else "toy_64"
    for folder in (tmp_path / "now", tmp_path / "late"):
        for path in folder.rglob(f"{stem}*"):
            path.rename(path.with_name(path.name.replace(stem, "toy_64")))
    assert said[0] == said[1] and bool(said[0]) == (name not in ("都好", "没有目标"))
    assert resume_file(tmp_path / "now") == resume_file(tmp_path / "late")
    assert log_lines(tmp_path / "now") == log_lines(tmp_path / "late")


def test_至多一步没有读_要准数的地方读完(tmp_path, monkeypatch, late):
    """下一步排上去之后才读上一步；记录（第 4、8 步）、存盘（第 6 步）、末一步（第 9 步）当场读。"""
    late()
    events, original = [], loop.update_weights

    class Arrived:
        def __init__(self, step):
            self.step = step

        def synchronize(self):
            events.append(f"读 {self.step}")

    def update(run, update, clip):
        update.arrived = Arrived(update.step)
        original(run, update, clip)
        events.append(f"走 {update.step}")

    monkeypatch.setattr(loop, "update_weights", update)
    toy_train(tmp_path, max_steps=9, log_interval=4, save_interval=6)
    expected = "走 1,走 2,读 1,走 3,读 2,走 4,读 3,读 4,走 5,走 6,读 5,读 6,走 7,走 8,读 7,读 8,走 9,读 9"
    assert events == expected.split(",")


def test_哪些晚读_一处说了算(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        tally.Tally, "add", lambda self, update: seen.append((self.run, self.depth)) or stop()
    )

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        toy_train(tmp_path)
    (run, depth) = seen[0]
    assert depth == 0 and not run.reads_late  # CPU
    cuda = property(lambda self: torch.device("cuda"))
    monkeypatch.setattr(Run, "device", cuda)
    assert run.reads_late
    run.scaler = torch.amp.GradScaler("cpu", enabled=True)
    assert not run.reads_late  # float16
    run.scaler = torch.amp.GradScaler("cpu", enabled=False)
    run.recipe = toy_recipe(prepare=lambda run, window: [window])
    assert not run.reads_late
    run.recipe = toy_recipe()
    for other in ("mps", "npu", "cpu"):
        monkeypatch.setattr(Run, "device", property(lambda self, other=other: SimpleNamespace(type=other)))
        assert not run.reads_late


def test_连续三步坏就停_步数与样本都是坏的那一步(tmp_path, late):
    """第 7 步的数在第 8 步才读到；说的仍是第 7 步与它的样本。"""
    late()
    rows = epoch_order(22, 42, 0)[12:14].sort().values.tolist()
    names = "、".join(map(str, rows))
    with pytest.raises(UserError, match=rf"第 7 步，样本 {names}.*连续 3 步的损失.*第 4 步的存档"):
        toy_train(tmp_path, loss=bad_loss({4, 5, 6}, "loss"), save_interval=4, log_interval=100)
    data = load_file(tmp_path / "checkpoints" / "toy_64_resume.pth")
    assert data["step"] == 4 and all(torch.isfinite(v).all() for v in data["model"].values())


def test_头一步就坏_优化器的状态等于没有走过(tmp_path, late):
    late()
    toy_train(tmp_path, loss=bad_loss({0}, "grad"), max_steps=1)
    assert_same_weights(saved_model(tmp_path), tiny_model().state_dict())
    state = load_file(tmp_path / "checkpoints" / "toy_64_resume.pth")["optimizer"]
    tensors = [t for part in state.values() for one in part["state"].values() for t in one.values()]
    assert tensors and all(not t.any() for t in tensors)  # 动量、步数都是 0


# ---------------------------------------------------------------- 停与续


def train_late(folder, **settings) -> None:
    Run.reads_late = True
    toy_train(folder, **settings)


def die_late(folder, **settings) -> None:
    Run.reads_late = True
    train_and_die(folder, **settings)


def test_收到信号存盘离开_续训逐位相同(tmp_path, uninterrupted):  # noqa: F811
    """第 5 步走到一半：它与没有读的第 5 步一起存下。"""
    codes = in_processes(1, die_late, folder=tmp_path, die_at_call=13, signum=signal.SIGTERM, **SETTINGS)
    assert codes == [143]
    assert load_file(tmp_path / "checkpoints" / "toy_64_resume.pth")["step"] == 5
    assert in_processes(1, train_late, folder=tmp_path, from_resume=1, **SETTINGS) == [0]
    assert_as_if_uninterrupted(tmp_path, uninterrupted)


def test_每一步被杀都能续上(tmp_path, uninterrupted):  # noqa: F811
    """读的早晚可以换：晚读的存档当场读着续，当场读的晚读着续。"""
    settings = {**SETTINGS, "save_interval": 1}
    for call in (2, 5, 8, 11, 13):
        kill = {"folder": tmp_path, "die_at_call": call, "from_resume": 1}
        work = die_late if call % 2 else train_and_die
        assert in_processes(1, work, **kill, **settings) == [-signal.SIGKILL]
    assert in_processes(1, train_late, folder=tmp_path, from_resume=1, **SETTINGS) == [0]
    assert_as_if_uninterrupted(tmp_path, uninterrupted)


# ---------------------------------------------------------------- 两个进程

TWO = {"epochs": 3, "accumulation_steps": 2, "log_interval": 4, "save_interval": 5, "model": {"dropout": 0.2}}


def train_two(folder, late=False, bad=(), stop_at=0, **settings) -> None:
    """各进程训练，末了各存一份权重；``bad`` 里的那几次前向，进程 1 的损失是 NaN；第 ``stop_at`` 次时只有它收到信号。"""
    if late:
        Run.reads_late = True
    calls, original = 0, loop.finish

    def loss(model, batch):
        nonlocal calls
        calls += 1
        value, metrics = language_model_loss(model, batch)
        if distributed.rank() == 1 and calls == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return value * (math.nan if distributed.rank() == 1 and calls in bad else 1.0), metrics

    def finish(run):
        torch.save(run.model.state_dict(), folder / f"rank{distributed.rank()}.pt")
        return original(run)

    loop.finish = finish
    toy_train(folder, loss=loss, **settings)


@pytest.mark.parametrize("bad", [(), (5, 9)])
def test_两个进程_晚读与当场读逐位相同(tmp_path, bad):
    log = tmp_path / "log"
    for name in ("now", "late"):
        (tmp_path / name).mkdir()
        options = {
            "folder": tmp_path / name,
            "late": name == "late",
            "bad": bad,
            "log": tmp_path / f"{name}.txt",
        }
        assert in_processes(2, train_two, **options, **TWO) == [0, 0], log.read_text()
    ranks = [
        torch.load(tmp_path / name / f"rank{rank}.pt", weights_only=True)
        for name in ("now", "late")
        for rank in range(2)
    ]
    for other in ranks[1:]:
        assert_same_weights(ranks[0], other)
    assert resume_file(tmp_path / "now") == resume_file(tmp_path / "late")
    assert log_lines(tmp_path / "now") == log_lines(tmp_path / "late")
    said = [complaints((tmp_path / f"{name}.txt").read_text()) for name in ("now", "late")]
    assert said[0] == said[1] and len(said[0]) == len(bad)


def test_两个进程_一个收到信号_晚一步一起停_续训逐位相同(tmp_path):
    log, whole, part = tmp_path / "log", tmp_path / "whole", tmp_path / "part"
    for folder in (whole, part):
        folder.mkdir()
    common = {"log": log, "late": True, **TWO}
    assert in_processes(2, train_two, folder=whole, **common) == [0, 0], log.read_text()
    codes = in_processes(2, train_two, folder=part, stop_at=3, **common)
    assert codes == [143, 143], log.read_text()
    # 第 3 次前向在第 2 步里，第 2 步的数在第 3 步读到
    assert load_file(part / "checkpoints" / "toy_64_resume.pth")["step"] == 3
    assert in_processes(2, train_two, folder=part, from_resume=1, **common) == [0, 0], log.read_text()
    assert resume_file(part) == resume_file(whole) and log_lines(part) == log_lines(whole)


def test_两个进程_连续三步坏一起停(tmp_path):
    log = tmp_path / "log"
    codes = in_processes(2, train_two, folder=tmp_path, late=True, bad=(3, 5, 7), log=log, **TWO)
    assert codes == [2, 2] and "第 4 步，样本" in log.read_text()


# ---------------------------------------------------------------- 显卡


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="没有 CUDA 显卡")
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("use_moe", [False, True])
def test_卡上两行日志之间一次也不等(tmp_path, monkeypatch, optimizer, use_moe):
    """``set_sync_debug_mode("error")``：第 3 步到第 9 步之间，循环里谁让主机等卡谁报错。"""
    if use_moe and not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip("这个版本没有分组矩阵乘，混合专家每层要读一次")
    original, steps = loop.forward_backward, []

    def forward_backward(run, *rest):
        steps.append(run.state.step)
        torch.cuda.set_sync_debug_mode("error" if 2 <= run.state.step < 9 else "default")
        return original(run, *rest)

    monkeypatch.setattr(loop, "forward_backward", forward_backward)
    settings = dict(device="cuda", dtype="bfloat16", optimizer=optimizer, log_interval=0, max_steps=11)
    model = tiny_model(use_moe=use_moe, hidden_size=256).cuda()
    try:
        train(tiny_args(tmp_path, **settings), toy_recipe(), model, None, Data(ToyRows()))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert steps == list(range(11))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="没有 CUDA 显卡")
def test_卡上坏的一步什么也不改(tmp_path):
    """头三步走，第四步梯度是无穷：权重等于只走三步的。"""
    weights = []
    for steps in (3, 4):
        folder = tmp_path / str(steps)
        constant = dict(schedule="wsd", warmup_ratio=0, decay_ratio=0)
        args = tiny_args(folder, device="cuda", dtype="bfloat16", max_steps=steps, **constant)
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            train(args, toy_recipe(bad_loss({3}, "grad")), tiny_model().cuda(), None, Data(ToyRows()))
        finally:
            torch.use_deterministic_algorithms(False)
        weights.append(saved_model(folder))
    assert_same_weights(*weights)
