"""命令行参数：一个 dataclass 同时是 ``--help``、默认值、取值范围和文档的唯一来源。"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import types
import typing
import unicodedata
from typing import Any, TypeVar

from minimind.errors import UserError
from minimind.ranges import TEXTS, Range, name_fix, shown
from minimind.spelling import suggest_choice, suggest_flag

T = TypeVar("T")
RANGE_NAMES = tuple(field.name for field in dataclasses.fields(Range))
TRUE_WORDS = dict.fromkeys(("true", "yes", "on", "y", "是", "开"), 1)
# 从存档续训时这个参数变了怎么办
RESUME = {
    "compared": "决定结果，必须与存档相同（没有声明的都是）",
    "content": "看它所指的内容（结构、数据、权重文件），不看写法；内容由续训存档的 config 与 identity 核对",
    "noted": "可以换，说出新旧与后果",
    "rounding": "可以换，只差舍入，说一声",
    "harmless": "与训练出的权重无关",
}
FALSE_WORDS = dict.fromkeys(("false", "no", "off", "n", "否", "关"), 0)


def arg(
    default: Any,
    help: str,
    choices: tuple | None = None,
    *,
    text: str | None = None,
    pattern: tuple[str, ...] | None = None,
    metavar: str | None = None,
    optional: bool = False,
    resume: str = "compared",
    **limits: float,
) -> Any:
    """声明一个命令行参数（dataclass 字段）。

    Args:
        default: 默认值；``None`` 表示由程序决定，说明里要写清怎么决定。
        help: 中文说明。
        choices: 允许的取值；字段是数或文字都可以。
        text: 文字的种类，见 :data:`minimind.ranges.TEXTS`。
        pattern: ``(正则, 期望的说法, 不合时怎么称呼)``，文字要整个合乎它。
        metavar: 给了就是位置参数，这是它在说明里的名字；默认值是 ``""`` 或 ``()`` 的必须写出。
        optional: ``tuple`` 的位置参数可以一个也不写。
        resume: 训练命令的参数在续训时变了怎么办，:data:`RESUME` 之一。
        limits: 数的范围：``low high above below multiple``，见 :class:`minimind.ranges.Range`。
    """
    metadata = {
        "help": help, "choices": choices, "range": Range(**limits), "text": text, "pattern": pattern,
        "metavar": metavar, "optional": optional, "resume": resume,
    }  # fmt: skip
    return dataclasses.field(default=default, metadata=metadata)


def override(parent: type, name: str, default: Any, **changes: Any) -> Any:
    """子类只换默认值：``epochs: int = override(TrainArguments, "epochs", 2)``，说明与取值沿用父类的。

    Args:
        changes: 另外要换的，例如 ``low=2`` 或 ``help="…"``。
    """
    metadata = dict(parent.__dataclass_fields__[name].metadata)  # type: ignore[attr-defined]
    limits = {key: changes.pop(key) for key in RANGE_NAMES if key in changes}
    metadata["range"] = dataclasses.replace(metadata["range"], **limits)
    return dataclasses.field(default=default, metadata={**metadata, **changes})


@dataclasses.dataclass
class Arguments:
    """各命令参数的共同祖先：不论从命令行还是从代码里建，取值都先查一遍，再做别的事。"""

    def __post_init__(self):
        check(self)


def declared(cls: type) -> list[dataclasses.Field]:
    """用 :func:`arg` 声明的字段。"""
    return [field for field in dataclasses.fields(cls) if "help" in field.metadata]


def flag_of(field: dataclasses.Field) -> str:
    """报错里的称呼：``--epochs``，位置参数是它的名字。"""
    return field.metadata["metavar"] or f"--{field.name}"


def check(args: Any) -> None:
    """各字段都在声明的范围里。

    Raises:
        UserError: 说出是哪个参数、看到什么、期望什么、怎么修。
    """
    for field in declared(type(args)):
        value = getattr(args, field.name)
        for one in value if isinstance(value, tuple) else [value]:
            if one is not None:
                check_value(field, one)


def check_value(field: dataclasses.Field, value: Any) -> None:
    """一个值合不合它的声明；报错见 :func:`check`。"""
    rules, flag = field.metadata, flag_of(field)
    if rules["choices"]:
        if value not in rules["choices"]:
            raise wrong_choice(field, value)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        if value not in rules["range"]:
            raise UserError(
                f"值是 {shown(value)}", where=flag, expected=rules["range"].words(), fix=_fix(field)
            )
    elif isinstance(value, str):
        test, expected = TEXTS[rules["text"] or "filled"]
        if problem := test(value):
            fix = name_fix(value, flag) if rules["text"] == "name" else None
            seen = problem if problem == "是空的" else f"{shown(value)} {problem}"
            raise UserError(seen, where=flag, expected=expected, fix=fix or _fix(field))
        if rules["pattern"]:
            regex, expected, called = rules["pattern"]
            if not re.fullmatch(regex, value):
                raise UserError(f"{called}{shown(value)}", where=flag, expected=expected, fix=_fix(field))


def _fix(field: dataclasses.Field) -> str:
    if field.metadata["metavar"]:
        return "改正它"
    default = field.default
    usual = "" if default in (None, dataclasses.MISSING) else f"用默认的 {default}"
    return f"改正它，或去掉 {flag_of(field)} {usual}".rstrip()


def wrong_choice(field: dataclasses.Field, value: Any) -> UserError:
    """不在可选的值里；大小写、近似的拼写与 True、False 给出建议。"""
    choices = field.metadata["choices"]
    near = suggest_choice(str(value), [str(choice) for choice in choices])
    if near is None and {0, 1} <= set(choices):
        near = (TRUE_WORDS | FALSE_WORDS).get(str(value).strip().lower())
    return UserError(
        f"值是 {shown(value)}",
        where=flag_of(field),
        expected="、".join(map(str, choices)),
        fix=_fix(field) if near is None else f"改成 {near}",
    )


def convert(field: dataclasses.Field, kind: type, text: str) -> Any:
    """命令行上的文字 → 字段的类型。

    Raises:
        UserError: 不是这种类型。
    """
    if choices := field.metadata["choices"]:
        known = {str(choice): choice for choice in choices}
        if text.strip() not in known:
            raise wrong_choice(field, text)
        return known[text.strip()]
    if kind not in (int, float):
        return text
    number = parse_number(text, kind)
    if number is not None:
        return number
    expected = {int: "整数", float: "数"}[kind]
    # 全角数字、1e4、3.0：意思清楚的说出该怎么写
    plain = unicodedata.normalize("NFKC", text)
    near = parse_number(plain, kind)
    if near is None and kind is int:
        value = parse_number(plain, float)
        near = int(value) if value is not None and value.is_integer() and abs(value) < 1e15 else None
    raise UserError(
        f"值是 {shown(text)}",
        where=flag_of(field),
        expected=f"{expected}，{field.metadata['range'].words()}",
        fix=_fix(field) if near is None else f"改成 {near}",
    )


def parse_number(text: str, kind: type) -> int | float | None:
    """半角写法的数，``-0.0`` 就是 0；不是数返回 None。"""
    if not text.isascii():
        return None
    try:
        return kind(text) + kind(0)
    except ValueError:  # 不是数，或整数长到 Python 不肯读
        return None


class ChineseParser(argparse.ArgumentParser):
    """标题与报错都用中文的 argparse；报错是 :class:`UserError`，与别的错误同一种写法。"""

    # argparse 只把 -1、-1.5 当负数，-1e-3、-inf 当成参数名，于是说“没有给值”
    NEGATIVE = re.compile(r"^-(?:\d|\.\d|inf|nan)", re.IGNORECASE)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, add_help=False, exit_on_error=False, allow_abbrev=False, **kwargs)
        self._negative_number_matcher = self.NEGATIVE
        self._positionals.title, self._optionals.title = "位置参数", "选项"
        self.add_argument("-h", "--help", action="help", default=argparse.SUPPRESS, help="显示这份说明后退出")

    def format_help(self) -> str:
        return super().format_help().replace("usage:", "用法：", 1)

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        """见 argparse。

        Raises:
            UserError: 不认识的参数、少了值、少了位置参数。
        """
        args = sys.argv[1:] if args is None else list(args)
        own = args[: args.index("--")] if "--" in args else args
        # 单横线的长名字：argparse 会把 -hidden_size 读成 -h
        if typos := [
            word for word in own if re.match(r"-[A-Za-z]\w", word) and not self.NEGATIVE.match(word)
        ]:
            raise self.unknown(typos)
        try:
            namespace, extra = self.parse_known_args(args, namespace)
        except argparse.ArgumentError as error:
            self.error(str(error), error.argument_name)
        if extra:
            raise self.unknown(extra)
        return namespace

    def unknown(self, words: list[str]) -> UserError:
        """多出来的参数，各附一个最像的名字。"""
        fix = f"用 {self.prog} --help 查看全部参数"
        flags = list(dict.fromkeys(word.split("=")[0] for word in words if word.startswith("-")))
        if not flags:
            return UserError(
                f"多出来的 {shown(words[0])}", where=self.prog, expected="--参数 值 的写法", fix=fix
            )
        known = [option[2:] for action in self._actions for option in action.option_strings]
        near = {flag: suggest_flag(flag.lstrip("-"), known) for flag in flags}
        if len(flags) == 1 and near[flags[0]]:
            return UserError(
                f"没有这个参数；是不是 --{near[flags[0]]}？（{fix}）", where=shown_flag(flags[0])
            )
        parts = [shown_flag(flag) + (f"（是不是 --{name}）" if name else "") for flag, name in near.items()]
        return UserError("没有这个参数", where="、".join(parts), fix=fix)

    def error(self, message: str, argument: str | None = None) -> typing.NoReturn:
        """argparse 自己发现的：少了值、给开关写了值、少了位置参数。"""
        fix = f"用 {self.prog} --help 查看全部参数"
        if argument is None:
            raise UserError(f"少了位置参数 {message.split(': ')[-1]}", where=self.prog, fix=fix)
        flag = next((part for part in argument.split("/") if part.startswith("--")), argument)
        action = self._option_string_actions.get(flag)
        if action is not None and action.nargs == 0:
            raise UserError("这个开关不带值", where=flag, fix=f"只写 {flag}")
        raise UserError(
            "没有给值", where=flag, expected=f"{flag} 值", fix=f"补上值；值以 - 开头时写成 {flag}=-…"
        )


def shown_flag(flag: str) -> str:
    """报错里写的参数名，太长的省略。"""
    return shown(flag, 60).strip("'")


def _base_type(annotation: Any) -> type:
    """``int | None`` → ``int``；其余原样。"""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        inner = [a for a in typing.get_args(annotation) if a is not type(None)]
        return inner[0]
    return annotation


def help_of(field: dataclasses.Field, kind: Any) -> str:
    """说明，后面附默认值与范围；默认值为 None 时由说明自己讲清。"""
    rules, default = field.metadata, field.default
    if isinstance(default, tuple):
        default = " ".join(default)
    notes = [f"默认 {default}"] if kind is not bool and default not in (None, "") else []
    if kind in (int, float) and not rules["choices"] and (hint := rules["range"].hint()):
        notes.append(hint)
    text = f"{rules['help']}（{'；'.join(notes)}）" if notes else rules["help"]
    return text.replace("%", "%%")


def build_parser(cls: type, prog: str | None = None, description: str | None = None) -> ChineseParser:
    """由 dataclass 生成解析器；``--flag_name`` 与 ``--flag-name`` 都接受，{0,1} 的开关不写值即为 1。

    ``bool`` 字段是不带值的开关，``tuple[str, ...]`` 收下几个值。
    """
    parser = ChineseParser(prog=prog, description=description or (cls.__doc__ or "").split("\n")[0])
    hints = typing.get_type_hints(cls)
    for field in declared(cls):
        rules, kind = field.metadata, _base_type(hints[field.name])
        many = typing.get_origin(kind) is tuple
        options: dict[str, Any] = {"help": help_of(field, kind), "default": field.default}
        if kind is bool:
            options["action"] = "store_true"
        else:
            options["type"] = _reader(field, str if many else kind)
            options["metavar"] = rules["metavar"] or (
                _choice_names(rules["choices"])
                if rules["choices"]
                else (str if many else kind).__name__.upper()
            )
        if rules["metavar"]:
            options["nargs"] = (
                ("*" if rules["optional"] else "+") if many else None if field.default == "" else "?"
            )
        elif many:
            options["nargs"] = "+"
        elif rules["choices"] and {0, 1} <= set(rules["choices"]):
            options |= {"nargs": "?", "const": 1}
        names = [field.name] if rules["metavar"] else [f"--{field.name}"]
        if "_" in field.name and not rules["metavar"]:
            names.append(f"--{field.name.replace('_', '-')}")
        parser.add_argument(*names, **options, **({} if rules["metavar"] else {"dest": field.name}))
    return parser


def _choice_names(choices: tuple) -> str:
    return "{" + ",".join(map(str, choices)) + "}"


def _reader(field: dataclasses.Field, kind: type):
    return lambda text: convert(field, kind, text)


def parse_args(
    cls: type[T], argv: list[str] | None = None, prog: str | None = None, description: str | None = None
) -> T:
    """解析命令行，返回 ``cls`` 的实例。

    Raises:
        UserError: 有不认识的参数，或取值不对。
    """
    namespace = build_parser(cls, prog, description).parse_args(argv)
    values = vars(namespace).items()
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values})
