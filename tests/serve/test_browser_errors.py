"""网页在真的浏览器里：出错时说人话，之后还能接着用。"""

from __future__ import annotations

from live_server import LiveServer
from page_helpers import PHONE, answers, ask, expect, wait_done
from scripted import Script, scripted

from minimind.serve.generation import Settings


def test_要密钥_说人话_填对就好(visit):
    with LiveServer(Settings(api_key="secret")) as server:
        page = visit(server.url, expected="401", viewport=PHONE)
        expect(page.locator("#status")).to_have_text("服务器要密钥：请在左侧设置里填对")
        expect(page.locator("#api_key")).to_be_visible()
        page.fill("#api_key", "secret")
        page.keyboard.press("Tab")
        expect(page.locator("#model option")).to_have_count(2)
        expect(page.locator("#status")).to_have_text("")
        page.click("#menu")
        with scripted(server, Script("你好。")):
            ask(page)
            expect(answers(page).locator(".body")).to_have_text("你好。")
            wait_done(page)
        assert page.evaluate("localStorage.getItem('minimind.api_key')") is None


def test_还在载入是503_说明白_好了自己接上(visit):
    with LiveServer() as server:
        table, server.app.state.table = server.app.state.table, None
        page = visit(server.url, expected="503")
        expect(page.locator("#status")).to_have_text("模型还在载入，稍等")
        ask(page, "在吗")
        expect(page.locator("#messages > li.error")).to_contain_text("模型还在载入")
        expect(page.locator("#input")).to_have_value("在吗")
        server.app.state.table = table
        expect(page.locator("#model option")).to_have_count(2)
        with scripted(server, Script("在。")), page.expect_request("**/v1/chat/completions") as sent:
            page.click("#send")
            expect(answers(page).last.locator(".body")).to_have_text("在。")
            wait_done(page)
        assert sent.value.post_data_json["messages"] == [{"role": "user", "content": "在吗"}]


def test_写到一半引擎出错_说明白(chat_server, visit, monkeypatch):
    page = visit()

    def broken(*_):
        raise RuntimeError("内部机密")

    monkeypatch.setattr(chat_server.runner.engine.decoder, "decode", broken)
    ask(page)
    expect(page.locator("#messages > li.error")).to_contain_text("服务器内部错误")
    assert "机密" not in page.locator("#messages").inner_text()
    chat_server.wait_idle()
    with scripted(chat_server, Script("又好了。")):
        ask(page)
        expect(answers(page).last.locator(".body")).to_have_text("又好了。")


def test_服务器关了_说连不上(visit):
    with LiveServer() as server:
        page = visit(server.url, expected="ERR_")
        expect(page.locator("#model option")).to_have_count(2)
    ask(page, "还在吗")
    expect(page.locator("#messages > li.error")).to_contain_text("连不上服务器")
