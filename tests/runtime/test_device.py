"""设备：没有卡的机器上用桩走遍 CUDA、NPU 的分支。"""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from minimind.errors import UserError
from minimind.runtime import device as dev
from minimind.runtime import distributed


@pytest.fixture
def cpu_only(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def four_cuda(cpu_only, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)


def test_自动选择与指定(four_cuda, monkeypatch):
    assert dev.resolve_device("auto") == torch.device("cuda:0")
    assert dev.resolve_device("cuda") == torch.device("cuda:0")
    assert dev.resolve_device("cuda:3") == torch.device("cuda:3")
    assert dev.resolve_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert dev.resolve_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert dev.resolve_device("auto") == torch.device("mps")


def test_torchrun之下取本机进程序号(four_cuda, monkeypatch):
    monkeypatch.setenv("RANK", "6")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert dev.resolve_device("cuda:0") == torch.device("cuda:2")
    assert dev.resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match=r"没有 5 号卡.*nproc_per_node"):
        dev.resolve_device("auto", local_rank=5)


@pytest.mark.parametrize("name", ["tpu", "cuda:x", "gpu:0", "cuda", "npu:0", "mps", "cpu:"])
def test_没有的或不认识的设备一句话(cpu_only, name):
    if name == "cpu:":
        assert dev.resolve_device(name) == torch.device("cpu")
        return
    with pytest.raises(UserError, match=r"--device.*本机可用的：auto、cpu"):
        dev.resolve_device(name)


def test_精度的默认值(monkeypatch):
    cuda = torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert dev.choose_dtype("auto", cuda) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert dev.choose_dtype("auto", cuda) == torch.float16
    assert dev.choose_dtype("float32", cuda) == torch.float32
    assert dev.choose_dtype("auto", torch.device("mps")) == torch.float32


@pytest.mark.parametrize(
    "bf16_cost, expected", [(0.5, torch.bfloat16), (0.95, torch.float32), (2.0, torch.float32)]
)
def test_CPU上按测速决定精度(monkeypatch, bf16_cost, expected):
    clock = {"now": 0.0}
    monkeypatch.setattr(dev.time, "perf_counter", lambda: clock["now"])

    def probe(dtype):
        clock["now"] += bf16_cost if dtype == torch.bfloat16 else 1.0

    assert dev.choose_dtype("auto", torch.device("cpu"), probe) == expected


def test_峰值算力(monkeypatch):
    assert dev.peak_flops(torch.device("cpu"), torch.float32) > 1e8
    cuda = torch.device("cuda:0")
    for name, tflops in [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA H200", 989), ("NVIDIA L40S", 362), ("NVIDIA H20", 148),
    ]:  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert dev.peak_flops(cuda, torch.bfloat16) == tflops * 1e12
        assert dev.peak_flops(cuda, torch.float32) == tflops * 0.5e12
    # 名字里含着 A40、A100、T4、A30 的别的卡：查不到，不显示利用率，不拿那一张的数充
    for name in ("没见过的卡", "NVIDIA RTX A4000", "NVIDIA RTX A1000", "NVIDIA T400 4GB", "NVIDIA RTX A3000"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert dev.peak_flops(cuda, torch.bfloat16) is None


def test_只有float16用缩放器():
    cpu = torch.device("cpu")
    assert dev.make_scaler(cpu, torch.float16).is_enabled()
    assert not dev.make_scaler(cpu, torch.bfloat16).is_enabled()
    with dev.autocast_context(cpu, torch.bfloat16):
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16
    with dev.autocast_context(cpu, torch.float32):
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.float32


def draw() -> tuple:
    return random.random(), float(np.random.rand()), torch.rand(3).tolist(), np.random.randn()


def test_随机数状态可存可还原(tmp_path):
    cpu = torch.device("cpu")
    dev.seed_all(5)
    np.random.randn()  # 留下一个缓存的高斯数
    torch.save(dev.rng_state(cpu), tmp_path / "rng.pth")
    first = draw()
    draw()
    dev.set_rng_state(torch.load(tmp_path / "rng.pth", weights_only=True), cpu)
    assert draw() == first
    dev.seed_all(5)
    expected = draw()
    dev.seed_all(5)
    with dev.preserved_rng(cpu):
        draw()
    assert draw() == expected


def test_散列种子互不相同():
    seeds = {dev.mix_seeds(s, step, rank) for s in range(20) for step in range(20) for rank in range(8)}
    assert len(seeds) == 20 * 20 * 8


# 桩要改动 torch 的全局注册（与真的 torch_npu 做的一样），放到单独的进程里
NPU_SCRIPT = """
import sys, types, torch
calls = []
npu = types.ModuleType("npu")
npu.is_available = lambda: AVAILABLE
npu.device_count = lambda: COUNT
npu.set_device = lambda d: calls.append(("set_device", str(d)))
npu.current_device = lambda: 0
npu.get_device_name = lambda d=None: "Ascend910B2"
npu.max_memory_allocated = lambda d=None: 123
npu.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
npu.synchronize = lambda: calls.append("sync")
npu.get_rng_state = lambda d: torch.arange(4)
npu.set_rng_state = lambda state, d: calls.append(("rng", state.tolist()))
torch.utils.rename_privateuse1_backend("npu")
torch._register_device_module("npu", npu)
sys.modules["torch_npu"] = types.ModuleType("torch_npu")

from minimind.errors import UserError
from minimind.runtime import device as dev
from minimind.runtime import distributed
"""


def run_npu(body: str, available: bool = True, count: int = 8, env: dict | None = None) -> None:
    import os

    script = NPU_SCRIPT.replace("AVAILABLE", str(available)).replace("COUNT", str(count)) + body
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, **(env or {})}
    )
    assert done.returncode == 0, done.stderr


def test_有NPU时的全部分支():
    run_npu("""
assert dev.is_npu_available()
d = dev.resolve_device("auto")
assert d == torch.device("npu:0"), d
assert dev.resolve_device("npu:5") == torch.device("npu:5")
assert dev.choose_dtype("auto", d) == torch.float16
assert dev.backend_for(d) == "hccl"
assert dev.make_scaler(d, torch.float16).is_enabled()
with dev.autocast_context(d, torch.float16):
    assert torch.is_autocast_enabled("npu") and torch.get_autocast_dtype("npu") == torch.float16
dev.prepare_device(d)
dev.synchronize(d)
assert calls == [("set_device", "npu:0"), "sync"], calls
assert dev.peak_memory_bytes(d) == 123 and dev.peak_flops(d, torch.float16) == 320e12
assert "Ascend910B2" in dev.device_name(d)
dev.set_rng_state(dev.rng_state(d), d)
assert calls[-1] == ("rng", [0, 1, 2, 3])

made = []
distributed.dist.init_process_group = lambda backend, timeout: made.append(backend)
import os
os.environ.update(RANK="3", WORLD_SIZE="4", LOCAL_RANK="3")
assert distributed.init_distributed_mode("auto") == 3
assert made == ["hccl"] and calls[-1] == ("set_device", "npu:3")
""")


@pytest.mark.parametrize("available, count", [(False, 0), (True, 0)])
def test_装了torch_npu但没有卡应答(available, count):
    run_npu(
        """
torch.cuda.is_available = lambda: False
torch.backends.mps.is_available = lambda: False
assert not dev.is_npu_available()
assert dev.resolve_device("auto") == torch.device("cpu")
try:
    dev.resolve_device("npu:0")
except UserError as error:
    assert "不可用" in str(error)
else:
    raise AssertionError("应当报错")
""",
        available,
        count,
    )


@pytest.mark.parametrize("backend, device", [("nccl", "cuda:1"), ("gloo", "cpu")])
def test_进程组后端随设备(four_cuda, monkeypatch, backend, device):
    made = []
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda name, timeout: made.append(name))
    monkeypatch.setattr(torch.cuda, "set_device", lambda d: made.append(str(d)))
    for key, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(key, value)
    assert distributed.init_distributed_mode("auto" if backend == "nccl" else "cpu") == 1
    assert made[-1] == backend and (backend == "gloo" or made[0] == device)


def test_建不起进程组报人话(cpu_only, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("port in use")

    monkeypatch.setattr(distributed.dist, "init_process_group", refuse)
    for key, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match=r"gloo 进程组失败（port in use）.*torchrun"):
        distributed.init_distributed_mode("auto")
