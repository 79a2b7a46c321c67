"""一组分词子进程：按提交次序交回结果，子进程不导入主程序。

不用 multiprocessing 的 spawn：它在每个子进程里重新导入主脚本，而训练脚本会导入 torch，每个子进程多占
约 300 MB、晚几秒，主脚本没有 ``__main__`` 保护时还会递归。这里的子进程只导入分词器（约 65 MB、0.7 秒），
从交互环境、笔记本或 ``python -`` 里调用也一样。主进程消失时管道关闭，子进程随之退出。
"""

from __future__ import annotations

import collections
import contextlib
import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from minimind.dataset.jsonl import DataError
from minimind.errors import UserError
from minimind.signals import SIGNALS

PACKAGE_PARENT = Path(__file__).resolve().parent.parent.parent


def _send(stream: BinaryIO, message: Any) -> None:
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    stream.write(struct.pack("<Q", len(data)))
    stream.write(data)
    stream.flush()


def _receive(stream: BinaryIO) -> Any:
    header = stream.read(8)
    if len(header) < 8:
        raise EOFError
    data = stream.read(struct.unpack("<Q", header)[0])
    return pickle.loads(data)  # 两头都是本程序自己的进程


class WorkerPool:
    """``with WorkerPool(4, setup) as pool: for result in pool.map(tasks): …``

    Args:
        num_workers: 子进程数。
        setup: 每个子进程启动时收到一次的东西，见 :func:`_handle`。
    """

    def __init__(self, num_workers: int, setup: dict[str, Any]):
        self.num_workers, self.setup = num_workers, setup
        self.local = threading.local()
        self.lock = threading.Lock()
        self.processes: list[subprocess.Popen] = []
        self.closed = False
        # 每个线程管一个子进程：线程只是等管道，不占 GIL
        self.threads = ThreadPoolExecutor(num_workers, thread_name_prefix="tokenize")

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *exc) -> None:
        self.closed = True
        self.threads.shutdown(wait=False, cancel_futures=True)
        with self.lock:
            for process in self.processes:
                process.kill()
        self.threads.shutdown(wait=True)
        for process in self.processes:
            process.wait()
            for stream in (process.stdin, process.stdout):
                with contextlib.suppress(BrokenPipeError):  # 没送完的任务不要了
                    stream.close()

    def map(self, tasks: Iterable[tuple]) -> Iterator[Any]:
        """按次序给出每个任务的结果；同时在途的任务不超过子进程数的两倍，内存因此有上限。

        Raises:
            DataError, UserError: 子进程报告的错误；子进程意外退出也是 UserError。
        """
        window: collections.deque[Future] = collections.deque()
        for task in tasks:
            window.append(self.threads.submit(self._run, task))
            if len(window) >= 2 * self.num_workers:
                yield window.popleft().result()
        while window:
            yield window.popleft().result()

    def _process(self) -> subprocess.Popen:
        process = getattr(self.local, "process", None)
        if process is None:
            environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
            with self.lock:
                if self.closed:
                    raise RuntimeError("已经关闭")
                process = subprocess.Popen(
                    [sys.executable, "-m", "minimind.dataset.workers"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=environment,
                    cwd=PACKAGE_PARENT,  # 保证导入的是同一份代码，不受当前目录里同名文件的影响
                )
                self.processes.append(process)
            self.local.process = process
            _send(process.stdin, self.setup)
        return process

    def _run(self, task: tuple) -> Any:
        process = None
        try:
            process = self._process()
            _send(process.stdin, task)
            status, value = _receive(process.stdout)
        except (EOFError, OSError) as error:
            code = process.wait() if process else None
            raise UserError(
                f"分词子进程意外退出（退出码 {code}，任务 {task}）",
                fix="退出码 -9 多半是内存不足：用 --num_workers 减少并行的进程数",
            ) from error
        if status == "ok":
            return value
        if status == "data":
            raise DataError.from_dict(value)
        raise UserError(f"分词子进程出错：{value}")


def _handle(setup: dict[str, Any], task: tuple) -> Any:
    """子进程里执行一个任务：``(动作, 起, 止)``。"""
    from minimind.dataset.encode import encode_chunk, scan_chunk

    action, start, end = task
    if action == "scan":
        return scan_chunk(setup["path"], start, end, setup["kind"])
    return encode_chunk(setup["path"], start, end, setup["kind"], setup["tokenizer"], setup["options"])


def run_inline(setup: dict[str, Any], tasks: Iterable[tuple]) -> Iterator[Any]:
    """不开子进程，直接在本进程里做；小文件用它，省下启动时间。"""
    for task in tasks:
        yield _handle(setup, task)


def main() -> None:
    """子进程的入口：从标准输入收任务，往标准输出写结果。"""
    for signum in SIGNALS:  # 终端与作业系统发给整个进程组；由主进程处理，它会结束我们
        signal.signal(signum, signal.SIG_IGN)
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # 库里的 print 不该混进结果
    try:
        setup = _receive(source)
        while True:
            task = _receive(source)
            try:
                reply = ("ok", _handle(setup, task))
            except DataError as error:
                reply = ("data", error.to_dict())
            except Exception:
                reply = ("crash", traceback.format_exc())
            _send(sink, reply)
    except (EOFError, BrokenPipeError):
        pass


if __name__ == "__main__":
    main()
