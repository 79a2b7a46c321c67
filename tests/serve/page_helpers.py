"""网页测试共用：打开页面、问一句、等写完；写定的回答。没有 playwright 时整个文件跳过。"""

from __future__ import annotations

import pytest

expect = pytest.importorskip("playwright.sync_api", reason="没有装 playwright，跳过浏览器里的测试").expect

PHONE = {"width": 375, "height": 667}
THOUGHT = "<think>\n先想一想\n</think>\n\n想好了。"
CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "84*7"}}\n</tool_call>'


def ask(page, text="你好"):
    page.fill("#input", text)
    page.keyboard.press("Enter")


def answers(page):
    return page.locator("#messages > li.assistant")


def wait_done(page):
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator("#messages > li").last.locator(".meta")).to_be_visible()
