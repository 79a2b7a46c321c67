"""一台真的服务器：两层小模型，uvicorn 在自己的线程里，客户端走真的 HTTP 或真的浏览器。"""

from __future__ import annotations

import threading

import torch
import uvicorn
from waiting import free_port, is_up, until

from minimind.inference.loading import Loaded, stop_ids
from minimind.model import MiniMindConfig, MiniMindForCausalLM
from minimind.serve.app import create_app
from minimind.serve.generation import Settings
from minimind.serve.models import ModelTable, ServedModel
from minimind.serve.runner import EngineRunner
from minimind.tokenizer import load_tokenizer

CONTEXT = 256


def tiny_loaded(seed: int = 0, context: int = CONTEXT) -> Loaded:
    torch.manual_seed(seed)
    config = MiniMindConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
    )
    return Loaded(MiniMindForCausalLM(config).eval().requires_grad_(False), load_tokenizer(), False, None)


def served(
    name: str, loaded: Loaded, parent: str | None = None, slots: int = 4, queue: int = 8, draft=None
) -> ServedModel:
    runner = EngineRunner(
        loaded.model,
        stop_ids(loaded.model, loaded.tokenizer),
        max_slots=slots,
        max_queue=queue,
        max_length=loaded.model.config.max_position_embeddings,
        draft=draft,
    )
    return ServedModel(name, loaded, runner, parent)


class LiveServer:
    """``with LiveServer(...) as server``：``server.url`` 是地址，``server.table`` 是模型表。"""

    def __init__(
        self,
        settings: Settings | None = None,
        slots: int = 4,
        queue: int = 8,
        context: int = CONTEXT,
        table: ModelTable | None = None,
    ):
        self.table = table or ModelTable(
            [
                served("minimind", tiny_loaded(0, context), slots=slots, queue=queue),
                served("lora_x", tiny_loaded(1, context), "minimind", slots, queue),
            ]
        )
        self.app = create_app(lambda: self.table, settings)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(self.app, port=self.port, log_level="warning")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self) -> LiveServer:
        self.thread.start()
        until(lambda: is_up(self.url), lambda: "服务器没有起来")
        return self

    def __exit__(self, *_) -> None:
        self.server.should_exit = True
        self.thread.join(20)

    @property
    def runner(self) -> EngineRunner:
        return self.table.default.runner

    def wait_idle(self) -> None:
        """槽位都空出来为止。"""
        until(
            lambda: self.runner.idle and not self.runner.engine.has_unfinished,
            lambda: f"还有 {self.runner.in_flight} 个样本没有放开槽位",
        )
