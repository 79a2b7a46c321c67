"""MiniMind：从空目录到能对话的小语言模型，每一行都用纯 PyTorch 写成。"""

__version__ = "0.1.0"
