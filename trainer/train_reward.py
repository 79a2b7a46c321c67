"""奖励模型：``python trainer/train_reward.py --epochs 1 --batch_size 16``；正文在 minimind/recipes/reward.py。"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from minimind.launch import launch

if __name__ == "__main__":
    launch("minimind.recipes.reward:main")
