"""全体测试共用：小线程数、可选的参考数据目录。"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if hasattr(signal, "SIGHUP"):  # 在 nohup 下跑：忽略会传给子进程，子进程照规矩不理它，断线的测试就等不到
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def root_dir() -> Path:
    """仓库根目录。"""
    return ROOT


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """仓库旁边的参考数据；没有就跳过，项目本身不依赖它。"""
    if not SHARED.is_dir():
        pytest.skip("仓库旁边没有 ../shared，跳过依赖参考数据的测试")
    return SHARED


@pytest.fixture(scope="module")
def browser(root_dir):
    """无头 Chromium；没有就跳过。

    只活一个文件那么久：playwright 的事件循环开着时，同一进程里别的测试不能 ``asyncio.run``。
    """
    playwright_api = pytest.importorskip(
        "playwright.sync_api", reason="没有装 playwright，跳过浏览器里的测试"
    )

    sys.path.insert(0, str(root_dir / "benchmarks"))
    try:
        from browser import HOW, find_browser
    finally:
        sys.path.remove(str(root_dir / "benchmarks"))
    playwright_api.expect.set_options(timeout=30_000)
    with playwright_api.sync_playwright() as playwright:
        path = find_browser(playwright)
        if path is None:
            pytest.skip(f"没有浏览器，跳过网页的测试；{HOW}")
        with playwright.chromium.launch(executable_path=path) as chromium:
            yield chromium
