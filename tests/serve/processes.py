"""真的进程：``python scripts/serve_openai_api.py`` 开在空闲的端口上，随机的小权重。"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import torch
from waiting import free_port, is_up, until

from minimind.model import MiniMindConfig, MiniMindForCausalLM
from minimind.runtime.checkpoint import config_dict, save_weights, weights_path
from minimind.tokenizer import load_tokenizer, tokenizer_fingerprint

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"hidden_size": 64, "num_hidden_layers": 2}


def save_small(folder: Path, name: str = "full_sft", seed: int = 0) -> MiniMindForCausalLM:
    """``folder/full_sft_64.pth`` 与旁注；返回同一个模型。"""
    torch.manual_seed(seed)
    model = MiniMindForCausalLM(MiniMindConfig(**SMALL)).eval()
    sidecar = {
        "config": config_dict(model.config),
        "tokenizer_hash": tokenizer_fingerprint(load_tokenizer()),
        "recipe": "full_sft",
    }
    save_weights(model, weights_path(model.config, name, folder), sidecar)
    return model


def long_answer(tokens: int, **more) -> dict:
    """写满 ``tokens`` 个也不停的请求：禁掉两个结束符。"""
    messages = [{"role": "user", "content": "说"}]
    return {"messages": messages, "max_tokens": tokens, "logit_bias": {"2": -100, "0": -100}, **more}


class ServerProcess:
    """``with ServerProcess("--save_dir", …) as server``：就绪才进来，出去时一定结束。"""

    def __init__(self, *arguments: object, folder: Path):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        script = ROOT / "scripts" / "serve_openai_api.py"
        self.command = [sys.executable, str(script), "--port", str(self.port), "--device", "cpu"]
        self.command += [str(value) for value in arguments]
        self.log = folder / f"server-{self.port}.log"

    def __enter__(self) -> ServerProcess:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                self.command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT
            )
        try:
            until(lambda: is_up(self.url) or self.process.poll() is not None, self.output)
            assert self.process.poll() is None, f"服务没有起来：{self.output()}"
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(30)

    def output(self) -> str:
        return self.log.read_text("utf-8", "replace")

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        return float(re.search(rf"^{name} (\S+)$", text, re.M)[1])

    def wait_idle(self) -> None:
        """槽位都空出来为止。"""
        until(
            lambda: self.metric("minimind_samples_in_flight") == 0,
            lambda: f"还有 {self.metric('minimind_samples_in_flight')} 个样本没有放开槽位",
        )
