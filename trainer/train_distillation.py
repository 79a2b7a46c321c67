"""知识蒸馏：``python trainer/train_distillation.py --epochs 6 --batch_size 32``；正文在 minimind/recipes/distillation.py。"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from minimind.launch import launch

if __name__ == "__main__":
    launch("minimind.recipes.distillation:main")
