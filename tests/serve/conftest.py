"""服务的测试共用：一台开着的服务器；无头浏览器与打开的页面。"""

from __future__ import annotations

from contextlib import ExitStack
from urllib.parse import urlsplit

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

import torch
from live_server import LiveServer
from processes import save_small


@pytest.fixture(scope="session")
def live():
    torch.set_num_threads(1)
    with LiveServer() as server:
        yield server


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """有 ``full_sft_64.pth`` 的目录，给真的进程用；只读。"""
    folder = tmp_path_factory.mktemp("weights")
    save_small(folder)
    return folder


# ---------------------------------------------------------------- 浏览器


@pytest.fixture(scope="module")
def chat_server():
    with LiveServer(context=2048) as server:  # 工具的说明就要两百多个词元
        yield server


@pytest.fixture
def visit(browser, chat_server):
    """``visit(...)`` 打开页面；结束时核对控制台没有错、没有一个请求去了别处。

    ``expected`` 是意料之中的控制台错误里的一段字：浏览器自己会把 401、503 与连不上记成错误。
    """
    with ExitStack() as opened:
        troubles, hosts, allowed = [], set(), {""}  # "" 是 data: 的图标

        def note(text, expected):
            if not (expected and expected in text):
                troubles.append(text)

        def open_page(url=chat_server.url, expected="", language="zh-CN", **options):
            allowed.add(urlsplit(url).netloc)
            context = opened.enter_context(browser.new_context(locale=language, **options))
            page = context.new_page()
            page.set_default_timeout(30_000)
            page.on("pageerror", lambda error: note(str(error), ""))
            page.on("console", lambda line: line.type in ("error", "warning") and note(line.text, expected))
            page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
            page.goto(url)
            if not expected:
                page.wait_for_selector("#model option", state="attached")
            return page

        yield open_page
        assert not troubles
        assert hosts <= allowed
