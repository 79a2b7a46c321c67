"""``Console`` 的替身。"""

from __future__ import annotations

import sys
from typing import Any


class Console:
    """``print`` 原样打印到 stdout 或 stderr；别的选项不认。"""

    is_terminal = False
    width = 120

    def __init__(self, *, stderr: bool = False, file: Any = None, **options: Any):
        self.file = file or (sys.stderr if stderr else sys.stdout)

    def print(self, *objects: Any, **options: Any) -> None:
        print(*objects, file=self.file, flush=True)
