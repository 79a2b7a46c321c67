"""``Progress`` 与各列的替身：不画进度条。"""

from __future__ import annotations

from typing import Any


class _Column:
    def __init__(self, *args: Any, **options: Any):
        """样式用不上。"""


BarColumn = MofNCompleteColumn = TextColumn = TimeElapsedColumn = TimeRemainingColumn = _Column


class Progress:
    """``with Progress(...) as bar`` 照常，只是什么也不画。"""

    finished = False

    def __init__(self, *columns: Any, **options: Any):
        """各列用不上。"""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: Any) -> None:
        """没有要收的。"""

    start = stop = lambda self: None

    def add_task(self, *args: Any, **options: Any) -> int:
        return 0

    def update(self, *args: Any, **options: Any) -> None:
        """不画。"""

    advance = update
