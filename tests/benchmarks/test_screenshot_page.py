"""网页的截图：浏览器找得对；真的拍一张（没有浏览器时跳过）。"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minimind.model import MiniMindConfig, MiniMindForCausalLM
from minimind.runtime.checkpoint import config_dict, save_weights, weights_path


@pytest.fixture
def load(monkeypatch, root_dir):
    monkeypatch.syspath_prepend(str(root_dir / "benchmarks"))
    return importlib.import_module


def test_依次看环境变量_自带的_系统里的(load, tmp_path, monkeypatch):
    find = load("browser").find_browser
    own, system, chosen = (tmp_path / name for name in ("own", "chromium", "chosen"))
    system.touch(mode=0o755)
    playwright = SimpleNamespace(chromium=SimpleNamespace(executable_path=str(own)))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("MINIMIND_BROWSER", str(chosen))
    assert find(playwright) == str(system), "指明的与自带的都不在"
    own.touch()
    assert find(playwright) == str(own)
    chosen.touch()
    assert find(playwright) == str(chosen)
    for path in (own, system, chosen):
        path.unlink()
    assert find(playwright) is None


def test_起服务器_问一句_拍一张(load, tmp_path, monkeypatch):
    sync_api = pytest.importorskip("playwright.sync_api", reason="没有装 playwright，跳过截图的测试")
    pytest.importorskip("fastapi")
    with sync_api.sync_playwright() as playwright:
        if load("browser").find_browser(playwright) is None:
            pytest.skip(f"没有浏览器，跳过截图的测试；{load('browser').HOW}")
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=1))
    save_weights(
        model, weights_path(model.config, "full_sft", tmp_path), {"config": config_dict(model.config)}
    )
    flags = {"--save_dir": tmp_path, "--out_dir": tmp_path, "--only": "hover", "--at": 1}
    argv = [str(part) for pair in flags.items() for part in pair]
    monkeypatch.setattr(
        sys, "argv", ["screenshot_page.py", *argv, "--ask", "你好", "--set", "max_tokens=16", "seed=1"]
    )
    load("screenshot_page").main()
    picture = Path(tmp_path / "page_hover.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
