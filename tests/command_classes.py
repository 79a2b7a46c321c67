"""命令 → 它的参数类：真的去运行每个命令，看它用哪个类建解析器。"""

from __future__ import annotations

import importlib
from functools import lru_cache

import pytest

from minimind import arguments, cli


class Caught(Exception):
    """命令用的参数类，截在建解析器的那一刻。"""


@lru_cache(maxsize=1)
def argument_classes() -> dict[str, type]:
    """每个命令的参数类。"""
    real, found = arguments.build_parser, {}

    def spy(cls, *args, **kwargs):
        raise Caught(cls)

    arguments.build_parser = spy
    try:
        for name, command in cli.COMMANDS.items():
            module, function = command.target.split(":")
            main = getattr(importlib.import_module(module), function)
            with pytest.raises(Caught) as caught:
                main(["--help"])
            found[name] = caught.value.args[0]
    finally:
        arguments.build_parser = real
    return found
