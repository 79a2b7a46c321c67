"""看训练的页面的测试共用。"""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")


@pytest.fixture
def folder(tmp_path):
    """``save_dir``：还是空的。"""
    return tmp_path / "out"
