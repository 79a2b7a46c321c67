"""``--reward 文件.py:函数``：载入使用者自己的奖励函数，写错了在训练开始之前就说。"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minimind.errors import UserError
from minimind.paths import resolve_path
from minimind.rl.reward_rules import Sample

# 函数声明了这些名字的参数就一并传给它
EXTRAS = ("messages", "record", "truncated", "conversation")
_SIGNATURE = "f(prompt, response, reference) -> float"


class RewardFunctionError(Exception):
    """使用者的函数抛了异常；``where`` 是 ``文件:行号``，原来的异常在 ``__cause__``。"""

    def __init__(self, where: str):
        super().__init__(where)
        self.where = where


def load_function(file: str, name: str) -> Callable[[Sample], Any]:
    """载入 ``file`` 里的函数 ``name``，包成只收一个样本的样子。

    函数按位置收到 ``prompt``（最后一条消息的文字）、``response``、``reference``，都是字符串；声明了
    ``messages``、``record``、``truncated``、``conversation`` 的还会按名字收到它们。文件所在的目录进 ``sys.path``，
    所以它可以导入旁边的文件。

    Raises:
        UserError: 没有这个文件、文件导入失败、没有这个函数、它收不下三个参数。
    """
    path = resolve_path(file)
    where = f"--reward {file}:{name}"
    if not path.is_file():
        raise UserError("没有这个文件", where=f"{where}（{path}）", expected="一个 .py 文件", fix="检查路径")
    module = import_file(path, where)
    function = getattr(module, name, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if inspect.isfunction(value) and key[0] != "_"]
        near = difflib.get_close_matches(name, names, 1)
        raise UserError(
            f"文件里没有函数 {name}" if function is None else f"{name} 不是函数",
            where=where,
            expected=f"其中之一：{'、'.join(names)}" if names else f"文件里定义 {_SIGNATURE}",
            fix=f"改成 {file}:{near[0] if near else names[0]}" if names else f"在文件里写 def {name}(…)",
        )
    extras = _check_signature(function, where)

    def score(sample: Sample) -> Any:
        more = {key: getattr(sample, key) for key in extras}
        try:
            return function(sample.prompt, sample.response, sample.reference, **more)
        except Exception as error:
            raise RewardFunctionError(_last_line_in(path, error)) from error

    return score


def import_file(path: Path, where: str) -> Any:
    """执行使用者的 ``.py`` 文件，得到模块；``where`` 是哪个参数让它载入的，报错用。"""
    spec = importlib.util.spec_from_file_location(f"minimind_user_{path.stem}", path)
    if spec is None:  # 后缀不是 Python 的
        raise UserError(
            "不是 Python 文件", where=f"{where}（{path}）", expected="一个 .py 文件", fix="检查路径"
        )
    module = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    sys.modules[module.__name__] = module  # 平常的 import 也是这样；dataclass、pickle 按模块名找回定义处
    try:
        spec.loader.exec_module(module)
    except (
        Exception,
        SystemExit,
    ) as error:  # 语法错误、缺库、顶层语句出错；脚本顶层的 sys.exit() 也不该结束训练
        del sys.modules[module.__name__]
        line = error.lineno if isinstance(error, SyntaxError) else None
        at = f"{path}:{line}" if line else _last_line_in(path, error)
        raise UserError(
            f"文件导入失败（{type(error).__name__}：{str(error).splitlines()[0] if str(error) else ''}）",
            where=f"{where}（{at}）",
            fix=f"先让 python {path.name} 能跑通",
        ) from error
    return module


def _check_signature(function: Callable, where: str) -> list[str]:
    """三个位置参数都收得下；返回它另外要的名字。"""
    try:
        signature = inspect.signature(function)
    except ValueError:  # 少数内建函数没有签名，只好到时候再说
        return []
    parameters = signature.parameters
    extras = [key for key in EXTRAS if key in parameters]
    try:
        signature.bind("", "", "", **dict.fromkeys(extras))
    except TypeError:
        raise UserError(
            f"参数是 {signature}",
            where=where,
            expected=f"{_SIGNATURE}，另可声明 {'、'.join(EXTRAS)}",
            fix="改成收三个字符串、返回一个数的函数",
        ) from None
    return extras


def _last_line_in(path: Path, error: BaseException) -> str:
    """异常在使用者文件里最深的一行。"""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == path]
    return f"{path}:{frames[-1].lineno}" if frames else str(path)
