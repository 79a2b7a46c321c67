"""设备：选择、精度、随机种子、峰值算力、显存统计。全部 NPU 分支都在这个文件里。"""

from __future__ import annotations

import contextlib
import importlib
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from minimind.errors import UserError
from minimind.runtime.fair_share import CROWDED, available_cpus, fair_share, queued_seconds

# 各卡稠密 bf16/fp16 矩阵乘峰值（TFLOPS，厂商公布值，不含稀疏加速）；由 :func:`known_card` 在设备的名字里找
PEAK_TFLOPS = {
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "H800": 989, "H20": 148, "GH200": 989,
    "B200": 2250, "A100": 312, "A800": 312, "A30": 165, "A10G": 70, "A10": 125, "A40": 150, "A6000": 155,
    "L40S": 362, "L40": 181, "L20": 119, "L4": 121, "V100": 125, "T4": 65, "RTX 6000 Ada": 364,
    "RTX 5090": 209, "RTX 5080": 113, "RTX 4090": 165, "RTX 4080": 97, "RTX 4070": 58, "RTX 4060": 30,
    "RTX 3090": 71, "RTX 3080": 60, "RTX 3070": 41, "RTX 3060": 26, "RTX 2080 Ti": 54,
    "Ascend910B": 320, "Ascend910_93": 376, "Ascend910": 256, "910B": 320,
}  # fmt: skip
PEAK_SECONDS = 0.3  # CPU 上测矩阵乘峰值用多久
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def is_npu_available() -> bool:
    """只有 ``torch_npu`` 能导入 *并且* 有卡应答才算有 NPU。"""
    try:
        importlib.import_module("torch_npu")
    except ImportError:
        return False
    npu = getattr(torch, "npu", None)
    try:
        return npu is not None and npu.is_available() and npu.device_count() > 0
    except (RuntimeError, OSError):  # 装了驱动包但没有卡、卡掉线：都当没有
        return False


def resolve_device(name: str = "auto", local_rank: int | None = None) -> torch.device:
    """把 ``--device`` 变成确实可用的设备。

    ``auto`` 依次找 NPU、CUDA、MPS、CPU。在 torchrun 之下卡号一律取 ``local_rank``，不管写的是几号卡。

    Args:
        name: ``auto``、``cpu``、``cuda``、``cuda:1``、``npu:0``、``mps``。
        local_rank: 本机进程序号；``None`` 时读 torchrun 的环境变量，不在 torchrun 之下则不改卡号。

    Raises:
        UserError: 名字不认识，或设备不在。
    """
    if local_rank is None and "RANK" in os.environ:
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    counts = {
        "npu": torch.npu.device_count() if is_npu_available() else 0,
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
        "cpu": 1,
    }
    kind, _, index = (name or "auto").strip().lower().partition(":")
    if kind == "auto":
        kind, index = next(k for k, count in counts.items() if count), ""
    usable = "、".join(
        ["auto"] + [k if k in ("cpu", "mps") else f"{k}:0…{n - 1}" for k, n in counts.items() if n]
    )
    if kind not in counts or (index and not index.isdigit()):
        raise UserError(f"不认识的设备 {name!r}", where="--device", expected=f"本机可用的：{usable}")
    if not counts[kind]:
        raise UserError(
            f"设备 {name!r} 在本机不可用",
            where="--device",
            expected=f"本机可用的：{usable}",
            fix="换一个，或去掉 --device 让程序自己选",
        )
    if kind in ("cpu", "mps"):
        return torch.device(kind)
    number = local_rank if local_rank is not None else int(index or 0)
    if number >= counts[kind]:
        raise UserError(
            f"没有 {number} 号卡（{kind} 共 {counts[kind]} 张）",
            where="--device" if local_rank is None else f"torchrun 的本机进程 {number}",
            expected=f"本机可用的：{usable}",
            fix="改小卡号，或把 --nproc_per_node 设为卡数",
        )
    return torch.device(f"{kind}:{number}")


def backend_for(device: torch.device) -> str:
    """这种设备的集合通信后端。"""
    return {"npu": "hccl", "cuda": "nccl"}.get(device.type, "gloo")


def module_of(device: torch.device) -> Any:
    """``torch.cuda`` / ``torch.npu`` / ``torch.mps``；CPU 返回 None。"""
    return None if device.type == "cpu" else getattr(torch, device.type)


def device_name(device: torch.device) -> str:
    """给人看的设备名。"""
    if device.type in ("cuda", "npu"):
        return f"{device}（{module_of(device).get_device_name(device)}）"
    if device.type == "cpu":
        return f"cpu（{torch.get_num_threads()} 线程）"
    return str(device)


def prepare_device(device: torch.device) -> None:
    """一次性的后端设置。

    CUDA：fp32 矩阵乘允许用 TF32（fp32 训练快 2 到 8 倍，尾数 10 位够用）。CPU：线程数不超过容器的配额，
    torch 只看得见核数；使用者用 OMP_NUM_THREADS 定了就听他的。
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.cuda.set_device(device)
    elif device.type == "npu":
        torch.npu.set_device(device)
    elif device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        limit = available_cpus()
        if limit < torch.get_num_threads():
            torch.set_num_threads(limit)


def reuse_threads(threads: int, say: Callable[[str], None]) -> None:
    """续训时沿用存档里的线程数：线程数决定求和的次序，不同就不再逐位相同；办不到时说一声。"""
    now = fair_share().most
    if threads == now:
        return
    if "OMP_NUM_THREADS" in os.environ or threads > available_cpus():
        say(f"注意：线程数由 {threads} 变为 {now}，求和次序不同，结果与没中断时只差舍入。")
    else:
        torch.set_num_threads(threads)
        fair_share().limit(threads)


def stat_dtype(device: torch.device) -> torch.dtype:
    """攒各种和用的精度：MPS 与 NPU 没有 float64。"""
    return torch.float32 if device.type in ("mps", "npu") else torch.float64


def synchronize(device: torch.device) -> None:
    """等设备上排队的工作做完；CPU 上无事可做。"""
    if device.type != "cpu":
        module_of(device).synchronize()


def peak_memory_bytes(device: torch.device) -> int:
    """显存占用的最高值（CUDA、NPU）；CPU 上是本进程常驻内存的最高值；问不到为 0。"""
    if device.type in ("cuda", "npu"):
        return int(module_of(device).max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows 没有 resource
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if os.uname().sysname == "Darwin" else peak * 1024


# ---------------------------------------------------------------- 精度


def autocast_context(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """半精度时的 autocast；fp32 时什么也不做。"""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device_type=device.type, dtype=dtype)


def make_scaler(device: torch.device, dtype: torch.dtype) -> torch.amp.GradScaler:
    """梯度缩放器；只有 float16 需要，其余精度下是直通的。"""
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def choose_dtype(
    name: str, device: torch.device, probe: Callable[[torch.dtype], None] | None = None
) -> torch.dtype:
    """``--dtype`` 变成实际精度。

    ``auto``：NPU 用 float16；CUDA 有 bf16 就用，没有用 float16；MPS 用 float32；CPU 用 ``probe``
    现场各跑一次真实的前向反向，取快的（AVX512 而无 BF16 指令的机器上 bf16 反而慢，1,178 比 1,915 词元/秒）。
    """
    if name != "auto":
        return DTYPES[name]
    if device.type == "npu":
        return torch.float16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu" and probe is not None:
        seconds = {dtype: time_call(lambda d=dtype: probe(d)) for dtype in (torch.float32, torch.bfloat16)}
        # 快不到一成就不值得：fp32 没有舍入之忧
        return torch.bfloat16 if seconds[torch.bfloat16] < 0.9 * seconds[torch.float32] else torch.float32
    return torch.float32


def time_call(call: Callable[[], None], repeats: int = 2) -> float:
    """预热一次，再取 ``repeats`` 次里最快的一次，单位秒。"""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def pick_threads(call: Callable[[], None]) -> int:
    """CPU 上用几个线程最快：从 1 起翻倍，快不到一成半就停；设好并返回线程数。

    机器正忙，或容器只给两个核却看得见几十个时，线程多了会在屏障前互相空等：四核机器负载到 15 时，
    4 线程实测比 1 线程慢一百倍。上限是 torch 的默认值（所以 OMP_NUM_THREADS 仍然管用）与容器的配额。测的时候有人来抢，
    选出的就只管眼下，空下来仍可加到上限。
    """
    start, queued = time.perf_counter(), queued_seconds()
    most, best, threads = min(torch.get_num_threads(), available_cpus()), float("inf"), 1
    candidate = 1
    while True:
        torch.set_num_threads(candidate)
        seconds = time_call(call)
        if seconds > best / 1.15:
            break
        best, threads = seconds, candidate
        if candidate == most:
            break
        candidate = min(2 * candidate, most)
    torch.set_num_threads(threads)
    waited = (queued_seconds() or 0.0) - (queued or 0.0)
    fair_share().limit(most if waited > CROWDED * (time.perf_counter() - start) else threads)
    return threads


def known_card(name: str) -> str | None:
    """设备的名字里写着 :data:`PEAK_TFLOPS` 的哪一张卡，取最长的；没有为 None。大小写、空格与连字符不计。

    末尾的数字后面不能再接数字：RTX A4000 不是 A40，A1000 不是 A100，T400 不是 T4（昇腾的 910_93xx 是一族）。
    """

    def inside(card: str) -> bool:
        words = r"[\s-]*".join(map(re.escape, card.split()))
        ends = r"(?!\d)" if card[-1].isdigit() and card != "Ascend910_93" else ""
        return bool(re.search(words + ends, name, re.IGNORECASE))

    return max(filter(inside, PEAK_TFLOPS), key=len, default=None)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """这台设备矩阵乘的峰值（FLOP/s）；查不到返回 None，此时不显示利用率。

    CPU 现测（约 0.3 秒，所用精度，方阵 1024；fp16 不测，没有专门指令的机器上一次就要 6 秒）；CUDA 与 NPU 查表。fp32 在卡上按 TF32 计，约为半精度的一半。
    """
    if device.type in ("cuda", "npu"):
        card = known_card(module_of(device).get_device_name(device))
        return card and PEAK_TFLOPS[card] * 1e12 * (0.5 if dtype == torch.float32 else 1.0)
    if device.type != "cpu" or dtype == torch.float16:
        return None
    from minimind.model.kernels import matmul_nt  # 与训练用同一个内核；设备模块自己不背上 transformers

    n = 1024
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    best, deadline = float("inf"), time.perf_counter() + PEAK_SECONDS
    while True:
        start = time.perf_counter()
        matmul_nt(a, b)
        now = time.perf_counter()
        best = min(best, now - start)
        if now > deadline:
            return 2 * n**3 / best


# ---------------------------------------------------------------- 随机


def seed_all(seed: int) -> None:
    """设定 Python、NumPy、torch（含各加速卡）的随机种子。"""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # 同时设定 CUDA、MPS 与已注册的 NPU


def mix_seeds(*parts: int) -> int:
    """把几个数散列成一个 32 位种子：相邻的进程、步数不会得到相关的随机数流。"""
    return int(np.random.SeedSequence([part % 2**64 for part in parts]).generate_state(1)[0])


def rng_state(device: torch.device) -> dict[str, Any]:
    """本进程全部随机数发生器的状态；只含张量与基本类型，可用 ``weights_only=True`` 读回。"""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "python": [version, list(internal), gauss_next],
    }
    if device.type in ("cuda", "npu", "mps"):
        module = module_of(device)
        state[device.type] = module.get_rng_state() if device.type == "mps" else module.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """还原 :func:`rng_state`；换了设备类型时，加速卡那一份略过。"""
    torch.set_rng_state(state["torch"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    if device.type in state:
        module = module_of(device)
        if device.type == "mps":
            module.set_rng_state(state["mps"])
        else:
            module.set_rng_state(state[device.type], device)


@contextlib.contextmanager
def preserved_rng(device: torch.device) -> Iterator[None]:
    """里面怎么用随机数都不影响外面：测速与验证不改变训练的结果。"""
    state = rng_state(device)
    try:
        yield
    finally:
        set_rng_state(state, device)
