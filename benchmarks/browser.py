"""找一个能用的 Chromium：网页的测试与截图共用。"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "microsoft-edge")
HOW = "装一个：apt-get install chromium fonts-noto-cjk，或 playwright install chromium，或用环境变量 MINIMIND_BROWSER 指明"


def find_browser(playwright: Any) -> str | None:
    """依次看环境变量 ``MINIMIND_BROWSER``、playwright 自己下载的、系统里装的；都没有是 ``None``。"""
    own = playwright.chromium.executable_path
    candidates = [os.environ.get("MINIMIND_BROWSER"), own, *map(shutil.which, NAMES)]
    return next((path for path in candidates if path and Path(path).exists()), None)
