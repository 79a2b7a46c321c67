"""监督微调：``python trainer/train_full_sft.py --epochs 2 --batch_size 16``；正文在 minimind/recipes/full_sft.py。"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from minimind.launch import launch

if __name__ == "__main__":
    launch("minimind.recipes.full_sft:main")
