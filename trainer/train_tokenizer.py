"""训练分词器；参数见 --help，内容见 minimind/tokenizer/train.py。"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from minimind.launch import launch

if __name__ == "__main__":
    launch("minimind.tokenizer.train:main_train")
