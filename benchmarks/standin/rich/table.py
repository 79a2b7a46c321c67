"""``Table`` 的替身：一行一行，格子之间两个空格。"""

from __future__ import annotations

from typing import Any


class Table:
    """收下标题、列名与各行，打印成文字。"""

    def __init__(self, *headers: str, title: str | None = None, caption: str | None = None, **options: Any):
        self.title, self.caption = title, caption
        self.lines: list[list[str]] = [list(headers)]

    def add_column(self, header: str = "", **options: Any) -> None:
        self.lines[0].append(header)

    def add_row(self, *cells: Any, **options: Any) -> None:
        self.lines.append([str(cell) for cell in cells])

    def add_section(self) -> None:
        self.lines.append([])

    def __str__(self) -> str:
        parts = [self.title or "", *("  ".join(line) for line in self.lines), self.caption or ""]
        return "\n".join(part for part in parts if part)
