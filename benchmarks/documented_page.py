"""一页文档里的命令：读出来，缩到几秒钟能走完，依次运行；服务开在后面，紧跟着的 curl 问它，然后关掉。"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

BLOCK = re.compile(r"^```bash\n(.*?)^```", re.M | re.S)
TRAIN = "--max_steps 1 --val_ratio 0 --batch_size 2 --device cpu --dtype float32"
ROLLOUT = "--accumulation_steps 1 --max_gen_len 6 --num_generations 2"
CHAT = "--prompt 你好 --max_new_tokens 6 --device cpu --dtype float32"
PORT = "8998"


def commands(page: Path) -> list[list[str]]:
    """``bash`` 块里的命令，一行一条，各拆成词。"""
    lines = [line for block in BLOCK.findall(page.read_text("utf-8")) for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def program(words: list[str]) -> tuple[str, list[str]]:
    """``("train_grpo", 参数)``、``("chat", 参数)``：脚本名或 ``minimind`` 的子命令。"""
    if words[0] == "python":
        return Path(words[1]).stem, words[2:]
    if words[0] == "minimind":
        size = 2 if words[1] in ("data", "export", "eval") else 1
        return " ".join(words[1 : 1 + size]), words[1 + size :]
    return words[0], words[1:]


def extras(words: list[str], hub: str, port: int) -> list[str]:
    """加在末尾、让这一条几秒走完的参数。"""
    name, _ = program(words)
    text = ""
    if name.startswith("train_"):
        text = TRAIN
        if name in ("train_grpo", "train_ppo", "train_spo", "train_agent"):
            text = f"{TRAIN} {ROLLOUT}"
    elif name in ("eval_llm", "chat"):
        text = CHAT
    elif name == "serve_openai_api":
        text = f"--port {port} --device cpu --dtype float32"
    elif name == "data download":
        text = f"--endpoint {hub}"
    return text.split()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Server:
    """后面开着的服务；``start`` 等到它答得出，``stop`` 照使用者按 Ctrl-C 那样关。"""

    def __init__(self, words: list[str], home: Path, port: int, env: dict[str, str]):
        self.url, self.log = f"http://127.0.0.1:{port}", home / "server.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(words, cwd=home, env=env, stdout=log, stderr=subprocess.STDOUT)

    def start(self, patience: float = 300.0) -> None:
        end = time.monotonic() + patience
        while time.monotonic() < end and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.2)
        raise RuntimeError(f"服务没有起来：\n{self.log.read_text()[-2000:]}")

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(120)


def run_page(page: Path, home: Path, hub: str) -> list[dict]:
    """在 ``home`` 里依次运行一页的全部命令；返回每条的退出码、用时与末尾的输出。"""
    env = {
        **os.environ,
        "PYTHONPATH": str(home),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "no_proxy": "127.0.0.1",
    }
    port, server, results = free_port(), None, []
    todo = commands(page)
    try:
        for words in todo:
            name, _ = program(words)
            line = [word.replace(PORT, str(port)) for word in [*words, *extras(words, hub, port)]]
            if words[0] in ("python", "minimind"):
                module = ["-m", "minimind"] if words[0] == "minimind" else []
                line = [sys.executable, *module, *line[1:]]
            start = time.monotonic()
            if name == "serve_openai_api":
                server = Server(line, home, port, env)
                server.start()
                code, tail = 0, server.log.read_text()[-300:]
            else:
                done = subprocess.run(line, cwd=home, env=env, capture_output=True, text=True, timeout=900)
                code, tail = done.returncode, (done.stdout + done.stderr)[-600:]
                if name == "curl":
                    code = code or int("choices" not in json.loads(done.stdout))
                    if server:
                        code, server = code or server.stop(), None
            shown = shlex.join(words)
            results.append(
                {"command": shown, "exit_code": code, "wall_s": round(time.monotonic() - start, 1)}
            )
            print(json.dumps(results[-1], ensure_ascii=False), flush=True)
            if code:
                print(tail, flush=True)
    finally:
        if server:
            server.stop()
    return results
