"""云川百科：小镇、人物、动物、物产、节日。"""

from __future__ import annotations

from ..core import Task
from ..world import KINDS
from .base import FactTask


def make_tasks() -> list[Task]:
    return [
        FactTask(
            name=f"fact_{kind.name}",
            title=f"{kind.title}百科",
            kind=kind,
        )
        for kind in KINDS
    ]
