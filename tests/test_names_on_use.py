"""``dataset``、``tokenizer`` 的名字用到时才导入：个个取得到，没有的说没有，只要几个名字时不载入 torch。"""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest


@pytest.mark.parametrize("package", ["minimind.dataset", "minimind.tokenizer"])
def test_列出的名字都取得到_就是那个文件里的(package):
    whole = importlib.import_module(package)
    assert whole.__all__ == list(whole._HOMES)
    for name, home in whole._HOMES.items():
        assert getattr(whole, name) is getattr(importlib.import_module(f"{package}.{home}"), name)


@pytest.mark.parametrize("package", ["minimind.dataset", "minimind.tokenizer"])
def test_没有的名字说是哪个包没有(package):
    with pytest.raises(AttributeError, match=f"模块 {package} 没有 no_such_name"):
        importlib.import_module(package).no_such_name  # noqa: B018


def test_取一个名字只载入它要的():
    code = (
        "import sys, minimind.tokenizer; from minimind.dataset import DataError, detect_kind;"
        "names = sorted(n for n in sys.modules if n.startswith(('minimind.', 'torch')));"
        "sys.exit(str({'torch', 'minimind.dataset.packed', 'minimind.tokenizer.chat'} & set(names) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == ""
