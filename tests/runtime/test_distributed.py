"""多进程：两个 gloo 进程与一个进程同样的全局批得到同样的权重，两个进程之间逐位相同。"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trainer_helpers
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

from minimind.runtime import distributed
from minimind.runtime.checkpoint import unwrap

STEPS = 20


def train_and_keep(folder, **changes):
    """训练后每个进程都把自己内存里的权重存下来。"""
    model = tiny_model()
    args = tiny_args(folder, epochs=5, max_steps=STEPS, schedule="cosine", **changes)
    train(args, toy_recipe(), model, None, Data(ToyRows(21), ToyRows(5, 1)))
    torch.save(model.state_dict(), Path(folder) / f"rank{distributed.rank()}.pth")


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_两个进程等于一个进程(tmp_path, optimizer):
    """21 行、全局批 4 × 累积 1：每轮末尾只剩 1 行，有一个进程没有样本。"""
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    train_and_keep(one, batch_size=4, optimizer=optimizer)
    codes = in_processes(
        2, train_and_keep, folder=two, batch_size=2, optimizer=optimizer, log=tmp_path / "log"
    )
    assert codes == [0, 0], (tmp_path / "log").read_text()
    a, b = (torch.load(two / f"rank{r}.pth", weights_only=True) for r in (0, 1))
    assert_same_weights(a, b)
    single = torch.load(one / "rank0.pth", weights_only=True)
    assert max((a[k] - single[k]).abs().max() for k in a) < 1e-5
    initial = tiny_model().state_dict()
    assert max((a[k] - initial[k]).abs().max() for k in a) > 0.005  # 真训练了


def test_累积时只归约一次且结果一致(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    toy_train(one, batch_size=12, epochs=3)
    codes = in_processes(
        2, toy_train, folder=two, batch_size=2, accumulation_steps=3, epochs=3, log=tmp_path / "log"
    )
    assert codes == [0, 0], (tmp_path / "log").read_text()
    a, b = saved_model(one), saved_model(two)
    assert max((a[k] - b[k]).abs().max() for k in a) < 1e-5


def test_混合专家两个进程权重一致(tmp_path):
    """行很短，常有专家一个词元也分不到：它也得参加归约。"""
    kwargs = {"folder": tmp_path, "batch_size": 1, "rows": 6, "log": tmp_path / "log"}
    moe = {"use_moe": True, "n_routed_experts": 16, "num_experts_per_tok": 1}
    assert in_processes(2, same_everywhere, model=moe, **kwargs) == [0, 0], (tmp_path / "log").read_text()


def same_everywhere(**kwargs):
    toy_train(**kwargs, loss=remember_model)
    mine = {k: v.clone() for k, v in unwrap(remembered[0]).state_dict().items()}
    first, second = distributed.gather_objects(mine)
    assert_same_weights(first, second)


remembered: list = []


def remember_model(model, batch):
    remembered.append(model)
    return language_model_loss(model, batch)


def dropout_differs(folder):
    """第一步的 dropout 掩码：每个进程记下自己的随机数流。"""
    picks = []

    def loss(model, batch):
        picks.append(torch.get_rng_state())
        return language_model_loss(model, batch)

    toy_train(folder, loss=loss, max_steps=1)
    states = distributed.gather_objects(picks[0])
    assert not torch.equal(states[0], states[1])


def test_各进程的随机数流不同(tmp_path):
    codes = in_processes(2, dropout_differs, folder=tmp_path, log=tmp_path / "log")
    assert codes == [0, 0], (tmp_path / "log").read_text()


def bad_on_one_rank(folder):
    def loss(model, batch):
        value, metrics = language_model_loss(model, batch)
        return value * (float("nan") if distributed.rank() == 1 else 1.0), metrics

    toy_train(folder, loss=loss)


def test_一个进程出NaN全体一起停(tmp_path):
    codes = in_processes(2, bad_on_one_rank, folder=tmp_path, log=tmp_path / "log")
    text = (tmp_path / "log").read_text()
    assert codes == [2, 2], text
    assert text.count("连续 3 步") == 1  # 只有主进程说话


def full_disk(folder):
    from minimind.runtime import files

    def fail(*_):
        raise OSError(28, "No space left on device")

    files.os.fsync = fail
    toy_train(folder, max_steps=2)


def test_主进程存不了盘全体一起停(tmp_path):
    codes = in_processes(2, full_disk, folder=tmp_path, log=tmp_path / "log")
    text = (tmp_path / "log").read_text()
    assert codes == [2, 2], text
    assert "No space left" in text and "Traceback" not in text


def test_torchrun之下可用(tmp_path):
    """真用 torchrun 起两个进程，走 init_distributed_mode 与真的信号处理。"""
    script = tmp_path / "job.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(trainer_helpers.__file__).parent)!r})\n"
        "from trainer_helpers import toy_train\n"
        "from minimind.runtime.distributed import init_distributed_mode, shutdown_distributed\n"
        "init_distributed_mode('cpu')\n"
        f"toy_train({str(tmp_path)!r}, max_steps=3)\n"
        "shutdown_distributed()\n"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(script),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "2 进程" in done.stderr and done.stderr.count("训练完成") == 1


def test_单进程时都是空操作():
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.init_distributed_mode("cpu") == 0
    x = torch.ones(3)
    assert distributed.all_reduce_sum(x) is x and x.tolist() == [1, 1, 1]
    assert distributed.broadcast_object("a") == "a" and distributed.gather_objects(5) == [5]
    distributed.barrier()
    distributed.shutdown_distributed()
