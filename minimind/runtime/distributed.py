"""多进程：由 torchrun 的环境变量建进程组；单进程时所有函数都是空操作，调用处不必分情况。"""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from minimind.errors import UserError
from minimind.runtime.device import backend_for, resolve_device

T = TypeVar("T")

# 集合通信最长等这么久：足够最慢的一次存盘或验证，又不至于一个进程死了其余的等一夜
TIMEOUT = timedelta(minutes=30)


def init_distributed_mode(device: str = "auto") -> int:
    """在 torchrun 之下建进程组并绑定本进程的卡；不在 torchrun 之下什么也不做。

    NPU 用 hccl，CUDA 用 nccl，其余用 gloo。

    Args:
        device: ``--device`` 的值；``auto`` 时按 :func:`minimind.runtime.device.resolve_device` 的次序找。

    Returns:
        本机内的进程序号 ``local_rank``（单进程为 0）。
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return 0
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if dist.is_initialized():
        return local_rank
    target = resolve_device(device, local_rank)
    if target.type in ("cuda", "npu"):
        getattr(torch, target.type).set_device(target)
    backend = backend_for(target)
    try:
        dist.init_process_group(backend, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"建立 {backend} 进程组失败（{str(error).splitlines()[0]}）",
            where=f"进程 {os.environ['RANK']}/{os.environ['WORLD_SIZE']}",
            fix="用 torchrun --nproc_per_node N 启动；端口被占用时加 --master_port",
        ) from error
    return local_rank


def shutdown_distributed(error: BaseException | None = None) -> None:
    """拆掉进程组；没有就算了。

    DDP 必须先析构：它若活得比进程组久，到解释器退出时才析构的归约器会拿着 GIL 去等通信线程，而通信线程在等 GIL，
    谁也走不了。它与自己的钩子互相引用，要垃圾回收才走；异常的调用栈里也留着它。

    Args:
        error: 正在抛出的异常，清掉它调用栈上各层的局部变量。
    """
    if not dist.is_initialized():
        return
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    gc.collect()
    dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    return rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """各进程求和，就地写回并返回；单进程原样返回。"""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def any_process(flag: bool, device: torch.device) -> bool:
    """只要有一个进程为真就都为真；单进程不通信。"""
    if not dist.is_initialized():
        return flag
    return bool(all_reduce_sum(torch.tensor(float(flag), device=device)) > 0)


def broadcast_object(value: Any) -> Any:
    """主进程的 ``value`` 发给所有进程（用于“只测一次”的决定，各进程必须一致）。"""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def broadcast_state(value: Any, device: torch.device) -> Any:
    """主进程的状态字典（可以嵌套、几个 GB）发给所有进程：结构作为对象发，张量逐个发，谁也不必多占一份。

    Args:
        value: 字典、列表、张量与基本类型；其余进程给什么都行。
        device: 通信后端能用的设备；得到的张量都在内存里。
    """
    if not dist.is_initialized():
        return value
    tensors: list[torch.Tensor] = []

    def outline(part: Any) -> Any:
        if isinstance(part, torch.Tensor):
            tensors.append(part)
            return _Slot(part.shape, part.dtype)
        if isinstance(part, dict):
            return {key: outline(inner) for key, inner in part.items()}
        return [outline(inner) for inner in part] if isinstance(part, list) else part

    def fill(part: Any) -> Any:
        if isinstance(part, _Slot):
            source = next(given) if is_main_process() else torch.empty(part.shape, dtype=part.dtype)
            if not source.numel():
                return source
            # 逐字节地发：各后端认得的类型不一样
            data = source.contiguous().reshape(-1).view(torch.uint8).to(device)
            dist.broadcast(data, src=0)
            return data.cpu().view(part.dtype).reshape(part.shape)
        if isinstance(part, dict):
            return {key: fill(inner) for key, inner in part.items()}
        return [fill(inner) for inner in part] if isinstance(part, list) else part

    skeleton = broadcast_object(outline(value) if is_main_process() else None)
    given = iter(tensors)
    return fill(skeleton)


@dataclass(frozen=True)
class _Slot:
    """:func:`broadcast_state` 里一个张量的位置。"""

    shape: torch.Size
    dtype: torch.dtype


def gather_objects(value: Any) -> list[Any]:
    """收集各进程的 ``value``，按进程序号排列，人人都拿到全部。"""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_main(work: Callable[[], T]) -> T | None:
    """只在主进程做的事（存盘、开日志）；做不成就让所有进程一起停，而不是留下别的进程干等。

    Returns:
        主进程上是 ``work()`` 的结果，其余进程上是 None。

    Raises:
        UserError: 主进程上原样抛出。
        SystemExit: 其余进程以同样的退出码安静退出。
    """
    result, error = None, None
    if is_main_process():
        try:
            result = work()
        except UserError as caught:
            error = caught
    failed = broadcast_object(error is not None)
    if error is not None:
        raise error
    if failed:
        raise SystemExit(UserError.exit_code)
    return result
