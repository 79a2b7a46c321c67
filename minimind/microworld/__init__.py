"""微世界“云川”：由代码写成的小语料，有标准答案，每个训练阶段的效果都量得出来。"""

from .graders import grade
from .make import ensure_microworld, main_make, make_microworld
from .tasks import TASKS, build_tasks

__all__ = ["TASKS", "build_tasks", "ensure_microworld", "grade", "main_make", "make_microworld"]
