"""说中文的 argparse：标题与报错都用中文，写错的参数名得到建议。"""

from __future__ import annotations

import argparse
import re
import sys
import typing

from minimind.errors import UserError
from minimind.public_flags import refusal, summary
from minimind.ranges import shown
from minimind.spelling import suggest_flag


class ChineseParser(argparse.ArgumentParser):
    """标题与报错都用中文的 argparse；报错是 :class:`UserError`，与别的错误同一种写法。

    ``fields``：这个命令有哪些参数，公共项目的叫法是否用得上由它决定。
    """

    # argparse 只把 -1、-1.5 当负数，-1e-3、-inf 当成参数名，于是说“没有给值”
    NEGATIVE = re.compile(r"^-(?:\d|\.\d|inf|nan)", re.IGNORECASE)

    def __init__(self, *args, fields: typing.Collection[str] = (), **kwargs):
        super().__init__(*args, add_help=False, exit_on_error=False, allow_abbrev=False, **kwargs)
        self.formatter_class = argparse.RawDescriptionHelpFormatter
        self.fields, self.epilog = fields, summary(fields)
        self._negative_number_matcher = self.NEGATIVE
        self._positionals.title, self._optionals.title = "位置参数", "选项"
        self.add_argument("-h", "--help", action="help", default=argparse.SUPPRESS, help="显示这份说明后退出")

    def format_help(self) -> str:
        return super().format_help().replace("usage: ", "用法：", 1)

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        """见 argparse。

        Raises:
            UserError: 不认识的参数、少了值、少了位置参数。
        """
        args = sys.argv[1:] if args is None else list(args)
        own = args[: args.index("--")] if "--" in args else args
        args[: len(own)] = own = [self._underscored(word) for word in own]
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

    def _underscored(self, word: str) -> str:
        """``--batch-size=4`` → ``--batch_size=4``；不认识的照原样，报错时才说得出写了什么。"""
        flag, *value = word.split("=", 1)
        plain = "--" + flag[2:].replace("-", "_")
        return "=".join([plain, *value]) if plain in self._option_string_actions else word

    def unknown(self, words: list[str]) -> UserError:
        """多出来的参数，各附一个最像的名字。"""
        fix = f"用 {self.prog} --help 查看全部参数"
        flags = list(dict.fromkeys(word.split("=")[0] for word in words if word.startswith("-")))
        if not flags:
            return UserError(
                f"多出来的 {shown(words[0])}", where=self.prog, expected="--参数 值 的写法", fix=fix
            )
        for flag in flags:
            if sentence := refusal(flag.lstrip("-"), self.fields):
                raise UserError("这是公共项目的参数，这里没有", where=shown_flag(flag), fix=sentence)
        actions = [action for action in self._actions if action.help != argparse.SUPPRESS]
        known = [option[2:] for action in actions for option in action.option_strings]
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
