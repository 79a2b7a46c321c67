"""导出测试的夹具。"""

from __future__ import annotations

import pytest
import torch
from export_helpers import save_small

from minimind.export.source import open_source


@pytest.fixture
def make_source(tmp_path):
    """``make_source("v2")`` → ``(打开的来源, 原模型)``。"""

    def make(kind: str, **overrides):
        model = save_small(tmp_path / "out", kind, **overrides)
        return open_source("tiny", str(tmp_path / "out")), model

    return make


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(20, 6400, (2, 40), generator=torch.Generator().manual_seed(3))
