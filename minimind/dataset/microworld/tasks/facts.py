"""云川百科：小镇、人物、动物、物产、节日。"""

from __future__ import annotations

from ..core import Task
from ..world import KINDS
from .base import FactTask


def make_tasks() -> list[Task]:
    shares = {"place": 3.0, "person": 2.6, "animal": 2.0, "product": 1.6, "festival": 1.2}
    return [
        FactTask(
            name=f"fact_{kind.name}",
            title=f"{kind.title}百科",
            pretrain=4 * shares[kind.name],
            sft=shares[kind.name],
            kind=kind,
        )
        for kind in KINDS
    ]
