"""NPU 的替身：``import npu_standin`` 之后 torch 像是有一张昇腾卡，张量其实都在 CPU 上。

注册假的 ``torch_npu`` 与 ``torch.npu``，把交给 torch 的 ``npu`` 设备（连同 autocast 的）一律换成 ``cpu``。环境变量
``STANDIN_AUTOCAST=0`` 时像一张不理会 autocast 的卡。
"""

import importlib.machinery
import os
import sys
import types

import torch
from torch.overrides import TorchFunctionMode

import minimind.model.hf  # noqa: F401  transformers 看见 torch_npu 就要它的融合算子，所以先导入

npu = types.ModuleType("npu")
npu.is_available = lambda: True
npu.device_count = lambda: 1
npu.set_device = lambda device: None
npu.current_device = lambda: 0
npu.get_device_name = lambda device=None: "Ascend910B2"
npu.max_memory_allocated = lambda device=None: 3 * 2**30
npu.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
npu.is_bf16_supported = lambda: True
npu.synchronize = lambda device=None: None
npu.get_rng_state = lambda device: torch.get_rng_state()
npu.set_rng_state = lambda state, device: torch.set_rng_state(state)
npu._is_in_bad_fork = lambda: False
npu.manual_seed_all = lambda seed: None
torch.utils.rename_privateuse1_backend("npu")
torch._register_device_module("npu", npu)
sys.modules["torch_npu"] = types.ModuleType("torch_npu")
sys.modules["torch_npu"].__version__ = "2.9.0"
sys.modules["torch_npu"].__spec__ = importlib.machinery.ModuleSpec("torch_npu", None)  # accelerate 会找它


def on_cpu(value):
    if isinstance(value, torch.device) and value.type == "npu":
        return torch.device("cpu")
    if isinstance(value, str) and value.partition(":")[0] == "npu":
        return "cpu"
    return value


class OnCPU(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.device:  # 造设备对象：照样是 npu
            return func(*args, **(kwargs or {}))
        kwargs = {key: on_cpu(value) for key, value in (kwargs or {}).items()}
        return func(*map(on_cpu, args), **kwargs)


class Autocast(torch.autocast):
    def __init__(self, device_type, *args, **kwargs):
        super().__init__(on_cpu(device_type), *args, **kwargs)


if os.environ.get("STANDIN_AUTOCAST") != "0":
    torch.autocast = Autocast
OnCPU().__enter__()
