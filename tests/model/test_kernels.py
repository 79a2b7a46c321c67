"""结构与内核分在两个文件里：读结构不必看私有算子；从前的名字都还能引用。"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from minimind.model import kernels, model_minimind

PRIVATE = re.compile(r"\btorch(?:\.\w+)*\._\w+|\btorch\.ops\b|cpuinfo")


def test_结构文件不长_不用私有算子_不看处理器():
    text = Path(model_minimind.__file__).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 650
    with_private = {
        path.name
        for path in Path(kernels.__file__).parent.glob("*.py")
        if PRIVATE.search(path.read_text("utf-8"))
    }
    assert with_private == {"kernels.py", "cpu_attention.py"}
    classes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef)]
    assert not [c.name for c in classes if "autograd" in ast.unparse(c)]


MOVED = (
    "AttentionPlan", "attention", "compute_dtype", "linear", "linear_cross_entropy", "matmul_nt", "segment_attention",
    "varlen_attention", "varlen_available", "refuse_wrapped",
)  # fmt: skip


@pytest.mark.parametrize("name", MOVED)
def test_搬走的名字照旧能从结构文件引用(name):
    assert getattr(model_minimind, name) is getattr(kernels, name)


def test_没有的名字说没有():
    with pytest.raises(AttributeError, match="没有 no_such_name"):
        model_minimind.no_such_name  # noqa: B018
