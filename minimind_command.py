"""装好之后的 ``minimind`` 命令：先把这个目录放到最前面，环境里有别人的同名包时运行的仍是这里的代码。"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from minimind.launch import main

__all__ = ["main"]
