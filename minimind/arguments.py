"""命令行参数：一个 dataclass 同时是 ``--help``、默认值和文档的唯一来源。"""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from typing import Any, TypeVar

T = TypeVar("T")


def arg(default: Any, help: str, choices: tuple | None = None) -> Any:
    """声明一个命令行参数（dataclass 字段）。

    Args:
        default: 默认值；``None`` 表示由程序决定，说明里要写清怎么决定。
        help: 中文说明。
        choices: 允许的取值。
    """
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


def override(parent: type, name: str, default: Any) -> Any:
    """子类只换默认值：``epochs: int = override(TrainArguments, "epochs", 2)``，说明与取值沿用父类的。"""
    metadata = parent.__dataclass_fields__[name].metadata  # type: ignore[attr-defined]
    return dataclasses.field(default=default, metadata=dict(metadata))


class ChineseFormatter(argparse.HelpFormatter):
    """说明后面附中文的默认值；默认值为 None 时由说明文字自己讲清。"""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.option_strings and action.default not in (None, argparse.SUPPRESS):
            return f"{action.help}（默认 %(default)s）"
        return action.help or ""


class ChineseParser(argparse.ArgumentParser):
    """标题与报错都用中文的 argparse。"""

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("formatter_class", ChineseFormatter)
        super().__init__(*args, add_help=False, **kwargs)
        self._positionals.title, self._optionals.title = "位置参数", "选项"
        self.add_argument("-h", "--help", action="help", default=argparse.SUPPRESS, help="显示这份说明后退出")

    def format_help(self) -> str:
        return super().format_help().replace("usage:", "用法：", 1)

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"错误：参数不对（{message}）；用 {self.prog} --help 查看全部参数。\n")


def _base_type(annotation: Any) -> type:
    """``int | None`` → ``int``；其余原样。"""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        inner = [a for a in typing.get_args(annotation) if a is not type(None)]
        return inner[0]
    return annotation


def _converter(annotation: Any, choices: tuple | None) -> Any:
    """文字 → 值；取值有数有字（``0``、``1``、``auto``）时按写法对上哪个就是哪个。"""
    if choices and len({type(choice) for choice in choices}) > 1:
        by_text = {str(choice): choice for choice in choices}
        return lambda text: by_text.get(text, text)
    return _base_type(annotation)


def build_parser(cls: type, prog: str | None = None, description: str | None = None) -> ChineseParser:
    """由 dataclass 生成解析器；``--flag_name`` 与 ``--flag-name`` 都接受，{0,1} 的开关（可以另有 auto）不写值即为 1。"""
    parser = ChineseParser(
        prog=prog, description=description or (cls.__doc__ or "").split("\n")[0], allow_abbrev=False
    )
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if "help" not in field.metadata:
            continue
        flags = [f"--{field.name}"]
        if "_" in field.name:
            flags.append(f"--{field.name.replace('_', '-')}")
        parser.add_argument(
            *flags,
            dest=field.name,
            type=_converter(hints[field.name], field.metadata["choices"]),
            default=field.default,
            choices=field.metadata["choices"],
            help=field.metadata["help"].replace("%", "%%"),
            **({"nargs": "?", "const": 1} if (field.metadata["choices"] or ())[:2] == (0, 1) else {}),
            metavar=None if field.metadata["choices"] else _base_type(hints[field.name]).__name__.upper(),
        )
    return parser


def parse_args(
    cls: type[T], argv: list[str] | None = None, prog: str | None = None, description: str | None = None
) -> T:
    """解析命令行，返回 ``cls`` 的实例。"""
    namespace = build_parser(cls, prog, description).parse_args(argv)
    return cls(**vars(namespace))
