"""工具：模型可以调用的几样小东西。都只算不做，不碰文件、网络与系统，输入再坏也只会得到一句错误。"""

from minimind.tools.base import Tool, Toolbox, ToolError
from minimind.tools.calculator import CALCULATOR
from minimind.tools.clock import CLOCK
from minimind.tools.glossary import GLOSSARY
from minimind.tools.units import UNITS

EXAMPLE_TOOLS = (CALCULATOR, CLOCK, UNITS, GLOSSARY)

__all__ = ["EXAMPLE_TOOLS", "Tool", "ToolError", "Toolbox"]
