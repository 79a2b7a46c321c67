"""命令行参数：一个 dataclass 同时是 ``--help``、默认值、取值范围和文档的唯一来源。"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import re
import types
import typing
import unicodedata
from collections.abc import Callable
from typing import Any, TypeVar

from minimind.errors import UserError
from minimind.ranges import TEXTS, Range, name_fix, parse_number, shown

if typing.TYPE_CHECKING:  # 有命令行要读时才载入：从代码里建参数的用不着
    from minimind.chinese_parser import ChineseParser
    from minimind.public_flags import PublicFlag

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
    group: str | None = None,
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
        group: ``--help`` 里归在哪一组；不写就是类的那一组。
        limits: 数的范围：``low high above below multiple``，见 :class:`minimind.ranges.Range`。
    """
    metadata = {
        "help": help, "choices": choices, "range": Range(**limits), "text": text, "pattern": pattern,
        "metavar": metavar, "optional": optional, "resume": resume, "group": group,
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
    """各命令参数的共同祖先：不论从命令行还是从代码里建，取值都先查一遍，再做别的事。

    ``class GRPOArguments(RLArguments, group="GRPO")``：这个类新声明的参数在 ``--help`` 里归这一组。
    """

    def __init_subclass__(cls, group: str | None = None):
        super().__init_subclass__()
        for field in vars(cls).values():
            if isinstance(field, dataclasses.Field) and "help" in field.metadata:
                own = field.metadata["group"] or group
                field.metadata = types.MappingProxyType({**field.metadata, "group": own})

    def __post_init__(self):
        check(self)

    def check_written(self, names: frozenset[str]) -> None:
        """命令行上写了哪些参数：值与默认相同也看得出是写了的，有矛盾就在这里报错。"""


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
    from minimind.spelling import suggest_choice

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


def _base_type(annotation: Any) -> type:
    """``int | None`` → ``int``；其余原样。"""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next(a for a in typing.get_args(annotation) if a is not type(None))
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

    ``bool`` 字段是不带值的开关，``tuple[str, ...]`` 收下几个值。公共项目的叫法也收，见 :mod:`minimind.public_flags`。
    """
    from minimind.chinese_parser import ChineseParser
    from minimind.public_flags import accepted

    fields, about = [field.name for field in declared(cls)], (cls.__doc__ or "").split("\n")[0]
    parser = ChineseParser(prog=prog, description=description or about, fields=fields)
    positional = [field.metadata["metavar"] for field in declared(cls) if field.metadata["metavar"]]
    parser.usage = " ".join(["%(prog)s", *positional, "[--参数 值]…"])
    hints = typing.get_type_hints(cls)
    # 命令自己的组在前，越是共用的越往后
    names = dict.fromkeys(f.metadata["group"] for f in declared(cls) if not f.metadata["metavar"])
    groups = {name: parser.add_argument_group(name) if name else parser for name in reversed(names)}
    for field in declared(cls):
        rules, kind = field.metadata, _base_type(hints[field.name])
        many = typing.get_origin(kind) is tuple
        options: dict[str, Any] = {"help": help_of(field, kind), "default": field.default}
        if kind is bool:
            options["action"] = "store_true"
        else:
            options["type"] = _reader(field, str if many else kind)
            options["metavar"] = rules["metavar"] or (
                "{" + ",".join(map(str, rules["choices"])) + "}"
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
        if rules["metavar"]:
            parser.add_argument(field.name, **options)
        else:
            groups[rules["group"]].add_argument(f"--{field.name}", **options)
    for name, public in accepted(fields).items():
        field = _public_field(cls, name, public)
        reader = _reader(field, _base_type(hints[public.like]))
        parser.add_argument(
            f"--{name}", type=reader, dest=name, default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
    return parser


def _public_field(cls: type, name: str, public: PublicFlag) -> dataclasses.Field:
    """公共项目的叫法也是一个字段：类型与范围随 ``like``，报错时说的是写下的那个名字。"""
    field = copy.copy(cls.__dataclass_fields__[public.like])  # type: ignore[attr-defined]
    field.name = name
    if public.choices:
        field.metadata = {**field.metadata, "choices": public.choices}
    return field


def _reader(field: dataclasses.Field, kind: type) -> Callable[[str], Any]:
    return lambda text: convert(field, kind, text)


def parse_args(
    cls: type[T], argv: list[str] | None = None, prog: str | None = None, description: str | None = None
) -> T:
    """解析命令行，返回 ``cls`` 的实例。

    Raises:
        UserError: 有不认识的参数，或取值不对。
    """
    from minimind.public_flags import accepted, translate

    parser, written = build_parser(cls, prog, description), set()

    class Noting(argparse.Namespace):
        """记下写过哪些名字。"""

        def __setattr__(self, name: str, value: Any) -> None:
            written.add(name)
            super().__setattr__(name, value)

    filled = Noting()
    for action in parser._actions:  # 先填上默认值，此后记下的就是命令行上写了的
        if action.default is not argparse.SUPPRESS:
            setattr(filled, action.dest, action.default)
    written.clear()
    namespace = vars(parser.parse_args(argv, filled))
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in namespace.items()}
    defaults = {field.name: field.default for field in declared(cls)}
    public = accepted(defaults)
    given = {name: values.pop(name) for name in public if name in values}
    for name, value in given.items():
        check_value(_public_field(cls, name, public[name]), value)
    args = cls(**translate(given, values, defaults))
    if isinstance(args, Arguments):
        args.check_written(frozenset(written))
    return args
