"""带工具的强化学习：``python trainer/train_agent.py --epochs 1 --batch_size 2``；正文在 minimind/recipes/agent.py。"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from minimind.launch import launch

if __name__ == "__main__":
    launch("minimind.recipes.agent:main")
