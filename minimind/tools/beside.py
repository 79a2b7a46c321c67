"""使用者的工具在另一个进程里执行：跑不完、崩溃、改了全局状态，都只是一句错误，训练照走。

进程用到时才起，跑不完就结束它，下次再起一个；里面只载入使用者的文件。
"""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace
from functools import partial
from typing import Any

from minimind.tools.base import Tool, ToolError
from minimind.tools.from_file import read_tools

# 起进程、载入使用者的文件要这么久以内；它可能 import 大的库
START_SECONDS = 120.0


def _serve(file: str, pipe: Any) -> None:
    """另一个进程里：收 ``(名字, 参数)``，回 ``("result" 或 "error", 内容)``。"""
    functions = {tool.name: tool.function for tool in read_tools(file)}
    pipe.send(("ready", None))
    while True:
        try:
            name, values = pipe.recv()
        except EOFError:
            return
        try:
            result = functions[name](**values)
            result = result if isinstance(result, dict) else {"result": result}
            # 写不成 JSON 的（nan 也是）在这里就报；传的是文字，使用者自己的类在那边不必认得
            text = json.dumps(result, ensure_ascii=False, allow_nan=False)
        except ToolError as error:
            pipe.send(("error", _words(error)))
        except BaseException as error:  # 使用者的函数什么都可能抛，SystemExit 也不该带走这个进程
            pipe.send(("error", f"工具出错了（{type(error).__name__}：{_words(error)[:200]}）"))
        else:
            pipe.send(("result", text))


def _words(error: BaseException) -> str:
    """异常的那句话；使用者的异常类连 ``str()`` 都可能抛。"""
    try:
        return str(error)
    except Exception:
        return "说不出原因"


class ToolProcess:
    """执行一个文件里的工具的那个进程。

    Args:
        file: 使用者的 ``.py`` 文件。
        timeout: 一次调用最多几秒。
    """

    def __init__(self, file: str, timeout: float):
        self.file, self.timeout = file, timeout
        self.process: Any = None
        self.pipe: Any = None

    def __call__(self, name: str, **values: Any) -> dict[str, Any]:
        """执行一次。

        Raises:
            ToolError: 工具抛了异常、超时，或进程没了。
        """
        try:
            if self.process is None or not self.process.is_alive():
                self._start()
            self.pipe.send((name, values))
            if not self.pipe.poll(self.timeout):
                self.close()
                raise ToolError(f"工具 {self.timeout:g} 秒没有返回")
            kind, content = self.pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.close()
            raise ToolError("工具让它的进程退出了") from None
        if kind == "error":
            raise ToolError(content)
        return json.loads(content)

    def _start(self) -> None:
        self.close()
        context = multiprocessing.get_context("spawn")  # fork 会把引擎的线程与锁一起带过去
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(self.file, theirs), daemon=True)
        self.process.start()
        theirs.close()
        if not self.pipe.poll(START_SECONDS):
            self.close()
            raise ToolError(f"工具的进程 {START_SECONDS:g} 秒没有起来")
        self.pipe.recv()

    def close(self) -> None:
        """结束它；没有起过也可以。"""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.pipe.close()
        self.process = None


def tools_beside(file: str, timeout: float) -> list[Tool]:
    """文件里的工具，各由同一个另外的进程执行。"""
    process = ToolProcess(file, timeout)
    return [replace(tool, function=partial(process, tool.name)) for tool in read_tools(file)]
