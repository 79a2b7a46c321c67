"""训练命令的 ``--watch 1``：另起一个进程开页面，训练完了它也走。

页面只读日志，不在训练的进程里：不占它的解释器锁，出了什么错都与训练无关；在 POSIX 上还让出优先级。
它从标准输入知道训练还在不在：训练不论怎么结束，管道都会断。
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from minimind.console import is_main_process, say
from minimind.distribution import PACKAGE, install_command
from minimind.errors import UserError, guard
from minimind.paths import resolve_path

NICENESS = 10


@contextlib.contextmanager
def page_beside(save_dir: str | Path, wanted: bool = True) -> Iterator[None]:
    """训练期间开着页面，只在主进程；开不成就说一声，训练照常。"""
    process = start_page(resolve_path(save_dir)) if wanted and is_main_process() else None
    try:
        yield
    finally:
        if process is not None:
            stop_page(process)


def start_page(folder: Path) -> subprocess.Popen | None:
    """起页面的进程，它自己报地址；起不来说一声，返回 None。"""
    if missing := [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]:
        say(
            f"留意：没有装页面要用的库（{'、'.join(missing)}），训练照常；要看页面：{install_command('serve')}"
        )
        return None
    path = os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH"))))
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "minimind.watch.beside", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C 是给训练的
        )
    except OSError as error:
        say(f"留意：页面没有开成（{error.strerror}），训练照常。")
        return None


def stop_page(process: subprocess.Popen) -> None:
    """断开管道，页面的进程随之退出；两秒还没走就结束它。"""
    with contextlib.suppress(OSError):
        process.stdin.close()
    try:
        process.wait(2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# ---------------------------------------------------------------- 页面的进程


def already_open(folder: Path, port: int) -> bool:
    """这个端口上已经有一个页面在看同一个目录。"""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/health")
        answer = json.loads(connection.getresponse().read(4096))
        return isinstance(answer, dict) and answer.get("folder") == str(folder)
    except (OSError, ValueError, http.client.HTTPException):
        return False
    finally:
        connection.close()


@guard
def main(argv: list[str]) -> None:
    """``python -m minimind.watch.beside 目录``；由 :func:`start_page` 启动。"""
    from minimind.serve.cli import check_address
    from minimind.watch.cli import PORT, make_server

    if hasattr(os, "nice"):
        os.nice(NICENESS)
    folder, port = Path(argv[0]), PORT
    try:
        check_address("127.0.0.1", port)
    except UserError:
        if already_open(folder, port):
            say(f"训练的页面已经开着：http://127.0.0.1:{port} 。")
            return
        port = 0
    server = make_server(folder, "127.0.0.1", port)

    def leave_with_parent() -> None:
        sys.stdin.buffer.read()
        server.should_exit = True

    threading.Thread(target=leave_with_parent, daemon=True).start()
    server.run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
