"""全体测试共用：小线程数、可选的参考数据目录。"""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

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
