"""两个进程：用 torchrun 起两个，各拿一半的批，练出的权重要与一个进程的相同。

这个文件也是子进程的入口：``torchrun --nproc_per_node 2 -m minimind.selftest.pair 目录 设备种类``。
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import minimind
from minimind.runtime import distributed
from minimind.runtime.checkpoint import load_file
from minimind.runtime.device import backend_for, module_of, prepare_device, resolve_device
from minimind.selftest.rows import Check, Measure, NotApplicable, Outcome
from minimind.selftest.toys import matmul_precision
from minimind.selftest.training import difference, started, toy_train

# 与训练走过的路比。两个进程分着加，次序不同，舍入就不同：CPU 上六步之后约 1e-5；少归约一次就是一成以上
LIMIT = 2e-3
WAIT_SECONDS = 120


def child(folder: str, kind: str) -> None:
    """torchrun 的每个进程：建组、训练、各存一份最后的权重。"""
    local_rank = distributed.init_distributed_mode(kind)
    device = resolve_device(kind, local_rank)
    prepare_device(device)
    with matmul_precision("highest"):
        weights = toy_train(folder, device, batch_size=2)
    torch.save(weights, Path(folder) / f"rank{distributed.rank()}.pth")
    distributed.shutdown_distributed()


def launch(folder: str, kind: str) -> None:
    """起两个进程并等它们结束。

    Raises:
        RuntimeError: 没有成功；消息是子进程最后的一句。
    """
    package = Path(minimind.__file__).parent.parent
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment["PYTHONPATH"] = os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    with open(Path(folder) / "log", "w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            [*command, "-m", "minimind.selftest.pair", folder, kind], env=environment, stdout=log, stderr=log
        )
        try:
            code = process.wait(WAIT_SECONDS)
        except BaseException as error:
            process.terminate()  # torchrun 收到 SIGTERM 会带走两个子进程
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
            if isinstance(error, subprocess.TimeoutExpired):
                raise RuntimeError(f"{WAIT_SECONDS} 秒还没有结束") from error
            raise
        log.seek(0)
        lines = [line.strip() for line in log if "Error" in line or "错误" in line]
    if code:
        raise RuntimeError(f"退出码 {code}：{lines[0] if lines else '没有说原因'}")


def pair_check(device: torch.device) -> Outcome:
    """两个进程之间逐位相同，与一个进程差不多。"""
    if device.type == "mps":
        raise NotApplicable("MPS 只有一个设备")
    if device.type != "cpu" and module_of(device).device_count() < 2:
        raise NotApplicable("只有一张卡")
    if not torch.distributed.is_available():
        raise NotApplicable("这个 torch 没有编译多进程通信")
    with tempfile.TemporaryDirectory() as folder:
        launch(folder, device.type)
        first, second = (load_file(Path(folder) / f"rank{rank}.pth") for rank in (0, 1))
        with matmul_precision("highest"):
            single = toy_train(f"{folder}/single", device, batch_size=4)
    begin = started()
    apart = sum(float((first[name] - single[name]).square().sum()) for name in begin) ** 0.5
    walked = sum(float((single[name] - begin[name]).square().sum()) for name in begin) ** 0.5
    measures = [
        Measure("两个进程之差", difference(first, second), high=0),
        Measure("与一个进程之差", apart / walked, high=LIMIT),
    ]
    return Outcome(measures, f"{backend_for(device)}，全局批相同，六步")


def pair_checks(device: torch.device) -> list[Check]:
    return [Check("多进程", "两个进程", lambda: pair_check(device), 15.0)]


if __name__ == "__main__":
    child(*sys.argv[1:])
