"""OpenAI 兼容的服务：``python scripts/serve_openai_api.py``；正文在 minimind/serve/。"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from minimind.launch import launch

if __name__ == "__main__":
    launch("minimind.serve.cli:main")
