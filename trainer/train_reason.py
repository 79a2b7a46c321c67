"""推理微调：``python trainer/train_reason.py --epochs 1 --batch_size 8``；正文在 minimind/recipes/reason.py。"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from minimind.launch import launch

if __name__ == "__main__":
    launch("minimind.recipes.reason:main")
