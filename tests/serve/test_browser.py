"""网页在真的浏览器里：流式、停止、思考、工具、概率、记住。无头 Chromium 对着真的服务器，模型写什么由 :mod:`scripted` 定。"""

from __future__ import annotations

import json
import math
import re

import pytest
from page_helpers import CALL, THOUGHT, answers, ask, expect, wait_done
from scripted import Script, scripted

from minimind.tools import CALCULATOR


def test_发送_文字一段段长出来(chat_server, visit):
    script = Script("床前明月光，疑是地上霜。", hold_at=4)
    page = visit()
    expect(page.locator("#welcome")).to_be_visible()
    with scripted(chat_server, script):
        ask(page, "背一首诗")
        body = answers(page).locator(".body")
        expect(body).to_contain_text("床")
        halfway = body.inner_text()
        assert script.text.startswith(halfway) and halfway != script.text
        expect(page.locator("#status")).to_have_text("正在写……")
        script.release()
        expect(body).to_have_text(script.text)
        wait_done(page)
    expect(page.locator("#messages > li.user .body")).to_have_text("背一首诗")
    assert re.search(r"\d+ 个词元，[\d.]+ 词元/秒", answers(page).locator(".meta").inner_text())
    expect(page.locator("#welcome")).to_be_hidden()
    expect(page.locator("#input")).to_be_focused()


@pytest.mark.parametrize("how", ["按钮", "Esc"])
def test_停止_写出的留下_槽位空出来(chat_server, visit, how):
    script = Script("从前有座山，" * 20, hold_at=6)
    page = visit()
    with scripted(chat_server, script):
        ask(page)
        expect(answers(page).locator(".body")).to_contain_text("从前")
        page.click("#stop") if how == "按钮" else page.keyboard.press("Escape")
        expect(answers(page).locator(".meta")).to_contain_text("已停止")
        script.release()
        chat_server.wait_idle()
    assert script.written < len(script.ids(chat_server.table.default.tokenizer))
    expect(page.locator("#input")).to_be_focused()
    with scripted(chat_server, Script("好的。")):
        ask(page, "再来")
        expect(answers(page).last.locator(".body")).to_have_text("好的。")


def test_写的时候清空_那一条不会混进之后的历史(chat_server, visit):
    script = Script("旧的回答，" * 20, hold_at=3)
    page = visit()
    with scripted(chat_server, script, Script("新的。")):
        ask(page, "旧的问题")
        expect(answers(page).locator(".body")).to_contain_text("旧")
        page.click("#clear")
        expect(page.locator("#send")).to_be_visible()
        script.release()
        with page.expect_request("**/v1/chat/completions") as sent:
            ask(page, "新的问题")
        expect(answers(page).locator(".body")).to_have_text("新的。")
    assert sent.value.post_data_json["messages"] == [{"role": "user", "content": "新的问题"}]


# ---------------------------------------------------------------- 思考、工具、概率


def test_思考_想的时候展开_作答时折起_点开再看(chat_server, visit):
    script = Script(THOUGHT, hold_at=3)
    page = visit()
    with scripted(chat_server, script):
        ask(page)
        box = answers(page).locator("details")
        expect(box).to_have_attribute("open", "")
        expect(box.locator("div")).to_contain_text("先")
        script.release()
        expect(answers(page).locator(".body")).to_have_text("想好了。")
        wait_done(page)
    assert box.get_attribute("open") is None
    assert not box.locator("div").is_visible()
    box.locator("summary").click()
    expect(box.locator("div")).to_have_text("先想一想")
    assert "<think>" not in page.locator("#messages").inner_text()


def test_工具调用_看得到_在页面里执行_结果交回模型(chat_server, visit):
    page = visit()
    page.check("#tools")
    bodies = []
    page.on("request", lambda r: bodies.append(r.post_data_json) if r.method == "POST" else None)
    with scripted(chat_server, Script(CALL), Script("结果是588。")):
        ask(page, "84*7 等于多少？")
        expect(answers(page).last.locator(".body")).to_have_text("结果是588。")
        wait_done(page)
    shown = answers(page).first.locator(".call")
    expect(shown).to_have_count(2)
    expect(shown.nth(0)).to_contain_text('calculator({"expression": "84*7"})')
    expect(shown.nth(1)).to_contain_text('{"result": "588"}')
    assert "tool_call" not in page.locator("#messages").inner_text()
    calculator, clock = bodies[0]["tools"]
    assert calculator == CALCULATOR.schema() and clock["function"]["name"] == "get_time"
    _, call, result = bodies[1]["messages"]
    assert json.loads(call["tool_calls"][0]["function"]["arguments"]) == {"expression": "84*7"}
    assert result == {
        "role": "tool",
        "tool_call_id": call["tool_calls"][0]["id"],
        "content": '{"result": "588"}',
    }


def test_一直调用工具_到轮数上限就停并说明(chat_server, visit):
    page = visit()
    page.check("#tools")
    with scripted(chat_server, *(Script(CALL) for _ in range(5))):
        ask(page)
        expect(page.locator("#status")).to_have_text("工具调用到了轮数上限")
    expect(answers(page)).to_have_count(5)


def tokens_of(reply) -> list[dict]:
    """一次流式响应里报的各词元，按写出的次序。"""
    lines = [line[6:] for line in reply.text().splitlines() if line.startswith("data: {")]
    choices = [choice for line in lines for choice in json.loads(line)["choices"]]
    return [token for choice in choices for token in ((choice["logprobs"] or {}).get("content") or ())]


def percent(entry: dict) -> str:
    share = math.exp(entry["logprob"])
    return "<0.1%" if share < 0.0005 else f"{100 * share:.1f}%"


def test_指着一个词_看它的概率与候选_与服务器报的一致(chat_server, visit):
    page = visit()
    with (
        scripted(chat_server, Script("春风又绿江南岸")),
        page.expect_response("**/v1/chat/completions") as answered,
    ):
        ask(page)
        wait_done(page)
    token = tokens_of(answered.value)[2]
    span = answers(page).locator(".token").nth(2)
    assert span.inner_text() == token["token"]
    assert page.locator("#tip").is_hidden()
    span.scroll_into_view_if_needed()
    span.hover()
    tip = page.locator("#tip")
    expect(tip).to_be_visible()
    rows = [row.locator("td").all_inner_texts() for row in tip.locator("tr").all()]
    listed = token["top_logprobs"]
    expected = listed if token["token"] in [one["token"] for one in listed] else [*listed, token]
    assert [row[1] for row in rows] == [percent(one) for one in expected]
    chosen = tip.locator("tr.chosen")
    expect(chosen).to_have_count(1)
    expect(chosen).to_contain_text("写的这个")
    page.mouse.move(5, 5)
    expect(tip).to_be_hidden()


def test_不要概率_就不请求_也不留词元(chat_server, visit):
    page = visit()
    page.uncheck("#probabilities")
    with scripted(chat_server, Script("好。")), page.expect_request("**/v1/chat/completions") as sent:
        ask(page)
        wait_done(page)
    assert "logprobs" not in sent.value.post_data_json
    expect(answers(page).locator(".token")).to_have_count(0)


# ---------------------------------------------------------------- 记住


def test_刷新之后对话与设置都在_接着聊(chat_server, visit):
    page = visit()
    page.check("#tools")
    page.fill("#system", "你很简短")
    page.fill("#temperature", "0.3")
    with scripted(chat_server, Script(CALL), Script(THOUGHT)):
        ask(page, "84*7？")
        expect(answers(page).last.locator(".body")).to_have_text("想好了。")
        wait_done(page)
    page.reload()
    expect(answers(page)).to_have_count(2)
    expect(answers(page).first.locator(".call")).to_have_count(2)
    expect(answers(page).last.locator("details div")).to_have_text("先想一想")
    expect(page.locator("#temperature")).to_have_value("0.3")
    with scripted(chat_server, Script("嗯。")), page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "然后呢？")
        expect(answers(page).last.locator(".body")).to_have_text("嗯。")
        wait_done(page)
    body = sent.value.post_data_json
    assert [m["role"] for m in body["messages"]] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
        "user",
    ]
    assert body["messages"][0]["content"] == "你很简短" and body["temperature"] == 0.3
    page.click("#clear")
    page.reload()
    expect(page.locator("#messages > li")).to_have_count(0)


def test_模型写的标记只当文字(chat_server, visit):
    page = visit()
    text = "<img src=x onerror=alert(1)><b>粗</b>"
    with scripted(chat_server, Script(text)):
        ask(page, text)
        expect(answers(page).locator(".body")).to_have_text(text)
        wait_done(page)
    assert page.locator("#messages img, #messages b").count() == 0
