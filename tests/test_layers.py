"""引用只朝下：推理与导出不引用训练；权重只有一扇门。"""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

import minimind

PACKAGE = Path(minimind.__file__).parent


def imported(path) -> set[str]:
    """一个文件引用的模块，函数里的、只为类型的都算。"""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{name.name}" for name in node.names}
    return found


@pytest.mark.parametrize(
    ("room", "above"),
    [
        ("inference", "trainer rl recipes serve evaluate report export demo"),
        ("export", "trainer rl recipes serve evaluate report demo"),
        ("runtime", "trainer rl recipes serve evaluate report export demo inference objectives"),
        ("tokenizer", "trainer rl recipes serve evaluate report export demo inference objectives runtime"),
    ],
)
def test_不朝上引用(room, above):
    names = tuple(f"minimind.{name}" for name in above.split())
    files = sorted((PACKAGE / room).glob("*.py"))
    assert len(files) > 3
    bad = {
        f"{path.name} → {module}"
        for path in files
        for module in imported(path)
        if any(module == name or module.startswith(name + ".") for name in names)
    }
    assert not bad


def test_权重的文件名只在一处认():
    """同样的规矩写三遍，改一处就有两处不认得。"""
    pattern = re.compile(r"_\(\\d\+\)\(_moe\)\?")
    where = [path.name for path in PACKAGE.rglob("*.py") if pattern.search(path.read_text(encoding="utf-8"))]
    assert where == ["checkpoint.py"]


def test_测试文件不重名(root_dir):
    """测试按文件名导入：两个文件夹里各有一个 ``test_x.py``，后收集的那个就导入不了。"""
    names = Counter(path.name for path in (root_dir / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
