"""一步一时走不完（编译、长采样、验证）时收到信号：放弃它，存下上一步，续训逐位等于没有中断过。"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trainer_helpers
from test_resume import SETTINGS, assert_as_if_uninterrupted, uninterrupted  # noqa: F401  夹具
from trainer_helpers import (
    Data,
    ToyRows,
    assert_same_weights,
    in_processes,
    language_model_loss,
    saved_model,
    tiny_args,
    tiny_model,
    toy_recipe,
    toy_train,
    train,
)

from minimind import signals
from minimind.errors import UserError
from minimind.runtime import distributed
from minimind.runtime.checkpoint import config_dict, load_file, save_weights, weights_path
from minimind.runtime.files import check_writable
from minimind.trainer import loop
from minimind.trainer.recipe import Run
from minimind.trainer.reference import weights_hash
from minimind.trainer.trainer_utils import init_model, model_config, start_run

RESUME = Path("checkpoints") / "toy_64_resume.pth"


def stuck() -> None:
    """一头扎进 C 里出不来，信号处理函数轮不到执行；不拿 GIL，像编译与大矩阵乘那样。"""
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)


def train_and_stick(folder, at_call: int, rank: int = 0, validating: bool = False, **settings) -> None:
    """第 ``at_call`` 次前向时每个进程都收到 SIGTERM，序号为 ``rank`` 的从此卡住。"""
    signals.PATIENCE = 0.5
    calls = 0

    def loss(model, batch):
        nonlocal calls
        calls += model.training != validating
        if calls == at_call and model.training != validating:
            os.kill(os.getpid(), signal.SIGTERM)
            if distributed.rank() == rank:
                stuck()
        return language_model_loss(model, batch)

    toy_train(folder, loss=loss, **settings)


def test_卡在一步里_放弃它_续训逐位相同(tmp_path, uninterrupted):  # noqa: F811
    codes = in_processes(1, train_and_stick, folder=tmp_path, at_call=14, **SETTINGS)
    assert codes == [143]
    assert load_file(tmp_path / RESUME)["step"] == 4  # 第 14 次前向在第 5 步里；存盘间隔是 2，验证在第 4 步
    assert in_processes(1, toy_train, folder=tmp_path, from_resume=1, **SETTINGS) == [0]
    assert_as_if_uninterrupted(tmp_path, uninterrupted)


def test_上一步还没有存过盘也存得下(tmp_path, uninterrupted):  # noqa: F811
    """第 3 步走完时不存盘；卡在第 4 步里，存下的必须是第 3 步，含记录区间里攒了一半的数。"""
    codes = in_processes(1, train_and_stick, folder=tmp_path, at_call=10, **SETTINGS)
    assert codes == [143] and load_file(tmp_path / RESUME)["step"] == 3
    assert in_processes(1, toy_train, folder=tmp_path, from_resume=1, **SETTINGS) == [0]
    assert_as_if_uninterrupted(tmp_path, uninterrupted)


def stick_late(folder, **settings) -> None:
    Run.reads_late = True  # 显卡上的做法
    train_and_stick(folder, **settings)


@pytest.mark.parametrize(("at_call", "step"), [(5, 1), (16, 5)])
def test_晚一步读_放弃时那一步的数还没有读_存下的也有(tmp_path, uninterrupted, at_call, step):  # noqa: F811
    """卡在第 2、6 步里；第 1、5 步走完时不记录不存盘，数还没有读。"""
    codes = in_processes(1, stick_late, folder=tmp_path, at_call=at_call, **SETTINGS)
    saved = load_file(tmp_path / RESUME)
    assert codes == [143] and saved["step"] == step and saved["progress"]["interval"]["steps"] > 0
    assert in_processes(1, toy_train, folder=tmp_path, from_resume=1, **SETTINGS) == [0]
    assert_as_if_uninterrupted(tmp_path, uninterrupted)


def test_卡在验证里_续训补上那次验证(tmp_path, uninterrupted):  # noqa: F811
    codes = in_processes(1, train_and_stick, folder=tmp_path, at_call=2, validating=True, **SETTINGS)
    assert codes == [143] and load_file(tmp_path / RESUME)["step"] == 4
    assert in_processes(1, toy_train, folder=tmp_path, from_resume=1, **SETTINGS) == [0]
    assert_as_if_uninterrupted(tmp_path, uninterrupted)


def test_卡在第一步里_没有要存的(tmp_path):
    assert in_processes(1, train_and_stick, folder=tmp_path, at_call=1, **SETTINGS) == [143]
    assert not (tmp_path / "checkpoints").exists() and not list((tmp_path / "out").glob("*.pth"))


def slow_update(folder, **settings) -> None:
    signals.PATIENCE = 0.2
    original = loop.update_weights

    def update(run, *rest):
        if run.state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(2)  # 比耐心长得多
        return original(run, *rest)

    loop.update_weights = update
    toy_train(folder, **settings)


def test_已经在改权重了_走完这一步(tmp_path, uninterrupted):  # noqa: F811
    """权重改到一半不能放弃，再慢也等它走完。"""
    assert in_processes(1, slow_update, folder=tmp_path, **SETTINGS) == [143]
    assert load_file(tmp_path / RESUME)["step"] == 3
    assert in_processes(1, toy_train, folder=tmp_path, from_resume=1, **SETTINGS) == [0]
    assert_as_if_uninterrupted(tmp_path, uninterrupted)


TWO = {"epochs": 3, "accumulation_steps": 2, "save_interval": 2, "log_interval": 3, "model": {"dropout": 0.2}}


@pytest.mark.parametrize("rank", [0, 1])
def test_两个进程_一个卡住另一个在等它归约(tmp_path, rank):
    """大家一致地放弃同一步；存档里有两个进程各自的随机数。"""
    whole, part, log = tmp_path / "whole", tmp_path / "part", tmp_path / "log"
    assert in_processes(2, toy_train, folder=whole, log=log, **TWO) == [0, 0], log.read_text()
    codes = in_processes(2, train_and_stick, folder=part, at_call=7, rank=rank, log=log, **TWO)
    assert codes == [143, 143], log.read_text()
    assert load_file(part / RESUME)["step"] == 3
    assert in_processes(2, toy_train, folder=part, from_resume=1, log=log, **TWO) == [0, 0], log.read_text()
    assert_as_if_uninterrupted(part, whole)


# ---------------------------------------------------------------- 各机器各有各的磁盘


def own_folders(folder, **settings) -> None:
    toy_train(Path(folder) / f"node{distributed.rank()}", **settings)


def test_续训存档只在主进程的磁盘上_别的进程也从那一步接着走(tmp_path):
    settings = {**TWO, "max_steps": 4}
    whole, log = tmp_path / "whole", tmp_path / "log"
    assert in_processes(2, toy_train, folder=whole, log=log, **settings) == [0, 0], log.read_text()
    apart = {"folder": tmp_path, "log": log}
    codes = in_processes(2, own_folders, **apart, **{**settings, "max_steps": 2, "schedule": "cosine"})
    assert codes == [0, 0], log.read_text()
    assert not (tmp_path / "node1" / "checkpoints").exists()
    together = tmp_path / "together"
    codes = in_processes(
        2, toy_train, folder=together, log=log, **{**settings, "max_steps": 2, "schedule": "cosine"}
    )
    assert codes == [0, 0]
    for work, folder in ((own_folders, tmp_path), (toy_train, together)):
        codes = in_processes(2, work, folder=folder, from_resume=1, log=log, **settings)
        assert codes == [0, 0], log.read_text()
    assert_same_weights(saved_model(tmp_path / "node0"), saved_model(together))
    a, b = (load_file(f / RESUME) for f in (tmp_path / "node0", together))
    assert a["step"] == b["step"] == 4
    assert all((x["torch"] == y["torch"]).all() for x, y in zip(a["rng"], b["rng"]))


def different_data(folder) -> None:
    rows = ToyRows(22 + distributed.rank())
    train(tiny_args(folder), toy_recipe(), tiny_model(), None, Data(rows))


def test_各机器的数据不是同一份_说出是哪个进程(tmp_path):
    log = tmp_path / "log"
    assert in_processes(2, different_data, folder=tmp_path, log=log) == [2, 2]
    text = log.read_text()
    assert "进程 1/2" in text and "训练行数 23（主进程 22）" in text and "Traceback" not in text


def start_from_weights(folder) -> None:
    args = tiny_args(Path(folder) / f"node{distributed.rank()}", from_weight="full_sft", learning_rate=1e-3)
    if distributed.rank():  # 这台机器上没有权重，由磁盘定的参数就会不同
        args.from_weight, args.learning_rate = "none", 5e-3
    device = start_run(args)
    assert (args.from_weight, args.learning_rate) == ("full_sft", 1e-3)
    model, _ = init_model(model_config(args), args.from_weight, None, args.save_dir, device)
    mine, everyone = weights_hash(model), distributed.gather_objects(weights_hash(model))
    assert everyone == [mine, mine]


def test_起点权重只在主进程的磁盘上_发给大家(tmp_path):
    args, log = tiny_args(tmp_path / "node0"), tmp_path / "log"
    start_run(args)
    model = init_model(model_config(args), "none", device="cpu")[0]
    sidecar = {"config": config_dict(model.config), "tokenizer_hash": None, "recipe": "full_sft"}
    save_weights(model, weights_path(model.config, "full_sft", args.save_dir), sidecar)
    assert in_processes(2, start_from_weights, folder=tmp_path, log=log) == [0, 0], log.read_text()


def broadcast_mixed() -> None:
    import torch

    state = {
        "a": torch.arange(6).view(2, 3).T,  # 不连续
        "b": [torch.tensor(1.5), torch.zeros(0, 4), {"c": torch.tensor([True, False])}],
        "d": (1, "x"),
        3: torch.ones(2, dtype=torch.bfloat16),
    }
    got = distributed.broadcast_state(state if distributed.rank() == 0 else None, torch.device("cpu"))
    assert got.keys() == state.keys() and got["d"] == (1, "x")
    pairs = [(got["a"], state["a"]), (got[3], state[3]), *zip(got["b"][:2], state["b"][:2])]
    pairs.append((got["b"][2]["c"], state["b"][2]["c"]))
    for x, y in pairs:
        assert x.dtype == y.dtype and x.shape == y.shape and torch.equal(x, y)


def test_广播嵌套的状态_各种类型与形状(tmp_path):
    log = tmp_path / "log"
    assert in_processes(2, broadcast_mixed, log=log) == [0, 0], log.read_text()


# ---------------------------------------------------------------- 输出目录


@pytest.mark.parametrize("flag", ["--save_dir", "--checkpoint_dir"])
def test_写不了的目录_说出是哪个参数_不留痕迹(tmp_path, flag):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=rf"{flag} .*file/below.*换一个可写的目录"):
        check_writable(tmp_path / "file" / "below", flag)
    check_writable(tmp_path / "a" / "b", flag)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("flag", ["--save_dir", "--checkpoint_dir"])
def test_训练命令动手之前就查(tmp_path, flag):
    (tmp_path / "file").write_text("x")
    done = subprocess.run(
        [sys.executable, "-m", "minimind", "pretrain", "--device", "cpu", flag, str(tmp_path / "file" / "x")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(signals.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2 and flag in done.stderr and "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["file"]  # 连微世界语料都还没有写


def test_续训存档写不成时_说的是checkpoint_dir(tmp_path):
    args = tiny_args(tmp_path, max_steps=1)
    blocked = tmp_path / "checkpoints"
    blocked.write_text("x")
    with pytest.raises(UserError, match=r"checkpoints.*--checkpoint_dir"):
        train(args, toy_recipe(), tiny_model(), None, Data(ToyRows()))


# ---------------------------------------------------------------- 真的 torchrun

JOB = """import os, sys
sys.path[:0] = [{helpers!r}]
from pathlib import Path
from minimind.errors import guard
from minimind.runtime import distributed


@guard
def main():
    import time
    from trainer_helpers import toy_train, language_model_loss

    distributed.init_distributed_mode("cpu")
    rank = distributed.rank()

    def loss(model, batch):
        time.sleep(0.02)
        Path("pid" + str(rank)).write_text(str(os.getpid()))
        return language_model_loss(model, batch)

    try:
        toy_train(".", loss=loss, epochs=100000, log_interval=1000)
    except BaseException as error:
        distributed.shutdown_distributed(error)
        Path("code" + str(rank)).write_text(str(getattr(error, "code", error)))
        raise
"""


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_torchrun_收到信号_各进程存盘离开_不等它来杀(tmp_path, signum, code):
    (tmp_path / "job.py").write_text(JOB.format(helpers=str(Path(trainer_helpers.__file__).parent)))
    (tmp_path / "start.py").write_text("from minimind.launch import launch\nlaunch('job:main')\n")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "start.py"]
    process = subprocess.Popen(
        [sys.executable, *launcher],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(signals.__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    pids = [tmp_path / f"pid{rank}" for rank in range(2)]
    while not all(path.exists() and path.read_text() for path in pids):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signum)
    output = process.communicate(timeout=300)[0]
    assert "SIGKILL" not in output, output  # 三十秒没走掉，torchrun 才用它
    assert [int((tmp_path / f"code{rank}").read_text()) for rank in range(2)] == [code, code], output
    assert load_file(tmp_path / RESUME)["step"] > 0
    for path in pids:
        stat = Path(f"/proc/{path.read_text()}/stat")
        assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_存档里没有因放弃而多出的日志(tmp_path):
    """日志在放弃的那一步之前是完整的 JSON 行。"""
    assert in_processes(1, train_and_stick, folder=tmp_path, at_call=10, **SETTINGS) == [143]
    lines = (tmp_path / "out" / "logs" / "toy_64.jsonl").read_text().splitlines()
    assert all(json.loads(line)["step"] <= 3 for line in lines)
