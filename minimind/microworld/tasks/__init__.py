"""全部任务家族的登记处。"""

from __future__ import annotations

from ..core import Task
from . import (
    arithmetic,
    calendar,
    compare,
    dialogue,
    dictionary,
    facts,
    identity,
    lists,
    multistep,
    numbers,
    stories,
    tales,
    tools,
)

MODULES = (
    facts,
    tales,
    dictionary,
    arithmetic,
    compare,
    lists,
    numbers,
    calendar,
    stories,
    dialogue,
    identity,
    tools,
    multistep,
)


def build_tasks(seed: int = 42) -> dict[str, Task]:
    """``{名字: 任务}``；种子只影响划分，世界的真相不变。"""
    tasks: dict[str, Task] = {}
    for module in MODULES:
        for task in module.make_tasks():
            task.seed = seed
            task.prepare()
            tasks[task.name] = task
    return tasks


TASKS = build_tasks()

__all__ = ["MODULES", "TASKS", "build_tasks"]
