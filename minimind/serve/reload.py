"""不重启就换上新的权重：强化学习把训练中的策略送来采样（:mod:`minimind.rl.remote`）。

接口与 vLLM 的开发模式相同：``POST /collective_rpc`` 的 ``reload_weights``，``POST /reset_prefix_cache``。
只有启动时写明了 ``--reload_dir`` 才有这两个地址；读的总是那个目录，请求里不能另指。只认 safetensors，里面没有代码可执行。
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict
from starlette.concurrency import run_in_threadpool
from torch import Tensor, nn

from minimind.errors import UserError
from minimind.serve.models import ModelTable

WEIGHTS = "model.safetensors"


class RpcRequest(BaseModel):
    """``POST /collective_rpc``；vLLM 的别的字段（``timeout``、``args``）收下不用。"""

    model_config = ConfigDict(extra="allow")

    method: Literal["reload_weights"]


def add_reload(app: FastAPI, folder: Path, table_of: Any) -> None:
    """加上两个地址；换的是底座，叠在它上面的各份 LoRA 用的是同一份权重，随之都叠在新的上面。"""

    @app.post("/collective_rpc")
    async def collective_rpc(body: RpcRequest) -> dict[str, Any]:
        table: ModelTable = table_of(app)
        state = await run_in_threadpool(read_weights, table.default.loaded.model, folder)
        async with AsyncExitStack() as stopped:  # 权重是共用的：都停下才换。底座最后停，少等一会儿
            for runner in reversed(table.runners):
                await stopped.enter_async_context(runner.paused())
            await table.default.runner.call(lambda: swap(table, state))
        return {"results": [None]}

    @app.post("/reset_prefix_cache")
    async def reset_prefix_cache() -> dict[str, Any]:
        for runner in table_of(app).runners:
            await runner.when_idle(lambda runner=runner: runner.engine.refresh())
        return {}


def read_weights(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """读出来并逐项核对，一项不对就整份不要。

    Returns:
        参数名 → 张量；与词嵌入共用的输出层不在里面。

    Raises:
        UserError: 没有文件、文件损坏，或名字、形状、数值不对。
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"读不到新的权重（{error}）", where=str(path)) from error
    wanted = dict(model.named_parameters())
    names = set(state) - (set(model.state_dict()) - set(wanted))  # 共用的那份写不写都行
    if names != set(wanted):
        odd = sorted(names ^ set(wanted))[0]
        raise UserError(f"新的权重与正在用的结构不同：{odd} 只有一边有", where=str(path))
    for name, value in wanted.items():
        if state[name].shape != value.shape:
            shapes = f"{list(state[name].shape)}，正在用的是 {list(value.shape)}"
            raise UserError(f"新的权重里 {name} 的形状是 {shapes}", where=str(path))
        if not torch.isfinite(state[name]).all():
            raise UserError(f"新的权重里 {name} 有无穷或不是数的值", where=str(path))
    return {name: state[name] for name in wanted}


def swap(table: ModelTable, state: dict[str, Tensor]) -> None:
    """在底座的引擎线程里、哪个引擎都停着的时候换上；合并过的投影与各自的前缀库随之重来。"""
    with torch.no_grad():
        for name, value in table.default.loaded.model.named_parameters():
            value.copy_(state[name])
    for runner in table.runners:  # 底座在最前：它重新合并，别的跟着用
        runner.engine.refresh()
