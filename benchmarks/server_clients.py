"""服务基准的两头：把一个服务当子进程开起来，再用一群流式的客户端去问。

客户端直接写 HTTP，不用 httpx 一类的库：32 路流式时那些库自己就占半个核，测出来的是客户端。
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from minimind.errors import UserError


@dataclass
class Answer:
    """一次流式回答；时刻都是 ``time.perf_counter`` 的秒。"""

    start: float
    first: float
    end: float
    tokens: int

    @property
    def first_token(self) -> float:
        """从发出请求到第一段文字，秒。"""
        return self.first - self.start


class Service:
    """一个子进程里的服务：``with Service(命令, 端口, 日志) as service``。

    Args:
        command: 含 ``{port}`` 的命令行。
        ready: 探活的地址，答 200 就算起来了。
        log: 子进程的输出写到这个文件。
    """

    def __init__(self, command: Sequence[str], ready: str, log: Path, environment: dict[str, str]):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.command = [part.format(port=self.port) for part in command]
        self.ready, self.log, self.environment = ready, log, environment

    def __enter__(self) -> Service:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                self.command, stdout=output, stderr=subprocess.STDOUT, env=self.environment
            )
        try:
            deadline = time.perf_counter() + 180
            while time.perf_counter() < deadline and self.process.poll() is None:
                if asyncio.run(status_of(self.port, self.ready)) == 200:
                    return self
                time.sleep(0.2)
            tail = self.log.read_text("utf-8", "replace")[-1000:]
            raise UserError(f"服务没有起来：{tail}", where=" ".join(self.command), fix=f"看 {self.log}")
        except BaseException:  # 也包括等的时候被打断：还没进 with，没有别人替它收尾
            self.__exit__()
            raise

    def __exit__(self, *_: Any) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def cpu_seconds(self) -> float:
        """子进程到现在用掉的处理器时间，秒。"""
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system


async def status_of(port: int, path: str) -> int:
    """``GET`` 的状态码；还没监听时 0。"""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
        line = await reader.readline()
        writer.close()
        return int(line.split()[1]) if line else 0
    except OSError:
        return 0


async def ask(port: int, body: dict[str, Any]) -> Answer:
    """问一次聊天接口，读到流结束。

    词元数：服务给了用量就用它；没有时，写满的按 ``max_tokens``，自己停下的按段数（一段一个词元）。

    Raises:
        RuntimeError: 服务没有答 200，或中途报错。
    """
    data = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Connection: close\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    writer.write(head.encode() + data)
    status = await reader.readline()
    if b" 200 " not in status:
        raise RuntimeError(f"服务答复 {status.decode().strip()}：{(await reader.read(2000)).decode()}")
    first, pieces, tokens, reason = 0.0, 0, 0, None
    async for line in reader:
        # 各家都是一个事件一块，块的长度各占一行，跳过就是
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if "error" in event:
            raise RuntimeError(f"服务中途报错：{event['error']}")
        if usage := event.get("usage"):
            tokens = usage["completion_tokens"]
        for choice in event.get("choices", ()):
            delta = choice.get("delta") or {}
            if delta.get("content") or delta.get("reasoning_content"):
                first = first or time.perf_counter()
                pieces += 1
            reason = choice.get("finish_reason") or reason
    end = time.perf_counter()
    writer.close()
    return Answer(start, first or end, end, tokens or (body["max_tokens"] if reason == "length" else pieces))


async def crowd(
    port: int, bodies: Sequence[Sequence[dict[str, Any]]], gap: float, ask: Callable[..., Awaitable] = ask
) -> list[Answer]:
    """几个客户端同时问：第 i 个等 ``i·gap`` 秒进场，依次问完自己的 ``bodies[i]``。"""

    async def one(index: int) -> list[Answer]:
        await asyncio.sleep(index * gap)
        return [await ask(port, body) for body in bodies[index]]

    return [answer for answers in await asyncio.gather(*map(one, range(len(bodies)))) for answer in answers]
