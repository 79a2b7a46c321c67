"""命令的起跑线：先装好退出信号，再导入要几秒的库；只导入标准库，自己几毫秒就绪。"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from typing import NoReturn

from minimind import signals


def launch(target: str) -> NoReturn:
    """运行 ``模块:函数``，以它的返回值退出。

    torchrun 之下、或收到过信号之后，刷出输出就用 ``os._exit`` 离开：该存的已经存好，而解释器的收尾要逐个析构
    通信后端与读数据的子进程，哪一个在等别的进程都会卡住，torchrun 要三十秒后才来收尸。
    """
    with signals.watching() as watch:
        with signals.leaving_at_once():
            module, function = target.split(":")
            main = getattr(importlib.import_module(module), function)
        try:
            code = main()
        except SystemExit as error:  # argparse 的 --help 与报错
            if isinstance(error.code, str):
                print(error.code, file=sys.stderr)
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except Exception:
            if "RANK" not in os.environ:
                raise
            traceback.print_exc()
            code = 1
        if watch.signum or "RANK" in os.environ:
            for stream in (sys.stdout, sys.stderr):
                try:
                    stream.flush()
                except (OSError, ValueError):  # 管道那头、终端已经关了
                    continue
            signals.leave(code or 0)
    raise SystemExit(code)


def main() -> NoReturn:
    """``minimind …`` 与 ``python -m minimind …``。"""
    launch("minimind.cli:main")
