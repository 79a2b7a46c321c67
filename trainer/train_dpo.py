"""直接偏好优化：``python trainer/train_dpo.py --epochs 1 --batch_size 4``；正文在 minimind/recipes/dpo.py。"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from minimind.launch import launch

if __name__ == "__main__":
    launch("minimind.recipes.dpo:main")
