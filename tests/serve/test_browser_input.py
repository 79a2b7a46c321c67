"""网页在真的浏览器里：键盘与输入法、两种语言、明暗、手机。"""

from __future__ import annotations

import re

import pytest
from page_helpers import CALL, PHONE, THOUGHT, answers, ask, expect, wait_done
from scripted import Script, scripted


def test_回车发送_Shift回车换行(chat_server, visit):
    page = visit()
    with scripted(chat_server, Script("好。")):
        page.locator("#input").press_sequentially("第一行")
        page.keyboard.press("Shift+Enter")
        page.locator("#input").press_sequentially("第二行")
        expect(page.locator("#messages > li")).to_have_count(0)
        page.keyboard.press("Enter")
        expect(page.locator("#messages > li.user .body")).to_have_text("第一行\n第二行")
        wait_done(page)
    expect(page.locator("#input")).to_have_value("")


def test_输入法选字时的回车不发送_Esc不停止(chat_server, visit):
    script = Script("一个字一个字慢慢写", hold_at=4)
    page = visit()
    keyboard = page.context.new_cdp_session(page)

    def press(key, code):  # 真的输入法会吃掉这个键，所以只有按下，没有打出的字
        keyboard.send(
            "Input.dispatchKeyEvent", {"type": "rawKeyDown", "key": key, "windowsVirtualKeyCode": code}
        )

    def compose():
        page.fill("#input", "")
        keyboard.send("Input.imeSetComposition", {"text": "nihao", "selectionStart": 5, "selectionEnd": 5})

    with scripted(chat_server, script):
        ask(page, "先问一句")
        expect(answers(page).locator(".body")).not_to_be_empty()
        compose()
        press("Escape", 27)
        script.release()
        wait_done(page)
    expect(answers(page).locator(".meta")).not_to_contain_text("已停止")
    compose()
    press("Enter", 13)
    keyboard.send("Input.insertText", {"text": "你好"})
    press("Enter", 229)  # Safari 在选完之后才送来
    expect(page.locator("#input")).to_have_value("你好")
    expect(page.locator("#messages > li")).to_have_count(2)
    with scripted(chat_server, Script("你也好。")):
        page.keyboard.press("Enter")
        expect(answers(page).last.locator(".body")).to_have_text("你也好。")


def focused(page) -> str:
    return page.evaluate(
        "document.activeElement.id || document.activeElement.className || document.activeElement.localName"
    )


def test_Tab的次序_焦点看得见_一条回答只占一站(chat_server, visit):
    page = visit()
    with scripted(chat_server, Script("一二三四五六七八九十")):
        ask(page)
        wait_done(page)
    page.focus("#menu")
    page.keyboard.press("Shift+Tab")  # 绕到页面末尾之后，从头开始
    order = []
    for _ in range(18):
        page.keyboard.press("Tab")
        order.append(focused(page))
        outline = page.evaluate(
            "(({outlineStyle, outlineWidth}) => [outlineStyle, parseFloat(outlineWidth)])(getComputedStyle(document.activeElement))"
        )
        assert outline[0] != "none" and outline[1] >= 1, order[-1]
        if order[-1] == "send":
            break
    head = ["menu", "model", "clear", "theme", "language", "system"]
    assert order[: len(head)] == head and order[-3:] == ["token", "input", "send"]
    assert order.count("token") == 1


def test_方向键逐词看概率_斜线回到输入框(chat_server, visit):
    page = visit()
    with scripted(chat_server, Script("春风又绿江南岸")):
        ask(page)
        wait_done(page)
    tokens = answers(page).locator(".token")
    page.keyboard.press("Shift+Tab")
    expect(tokens.nth(0)).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(1)).to_be_focused()
    expect(page.locator("#tip")).to_be_visible()
    assert tokens.nth(1).get_attribute("aria-describedby") == "tip"
    page.keyboard.press("ArrowLeft")
    expect(tokens.nth(0)).to_be_focused()
    page.keyboard.press("/")
    expect(page.locator("#input")).to_be_focused()
    expect(page.locator("#input")).to_have_value("")
    expect(page.locator("#tip")).to_be_hidden()


# ---------------------------------------------------------------- 语言、明暗、手机


def test_换语言_页面与已有的消息都换_刷新还记得(chat_server, visit):
    page = visit()
    with scripted(chat_server, Script(THOUGHT)):
        ask(page)
        wait_done(page)
    page.click("#language")
    expect(page.locator("#send")).to_have_text("Send")
    expect(page.locator("html")).to_have_attribute("lang", "en")
    expect(page.locator("#input")).to_have_attribute("placeholder", "Ask something…")
    expect(answers(page).locator("summary")).to_have_text("Reasoning")
    expect(answers(page).locator(".meta")).to_contain_text("tokens/s")
    frame = " ".join(page.locator("header, aside, form").all_inner_texts())
    assert not re.search(r"[\u4e00-\u9fff]", frame.replace("中文", "")), frame
    page.reload()
    expect(page.locator("#send")).to_have_text("Send")
    page.click("#language")
    expect(page.locator("#send")).to_have_text("发送")


def test_浏览器是英文的_一打开就是英文(visit):
    expect(visit(language="en-US").locator("#send")).to_have_text("Send")


CONTRAST = """
() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = (color) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
                           return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255).map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
                               .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => { for (let n = node; n; n = n.parentElement) { const c = rgb(getComputedStyle(n).backgroundColor); if (c[3] === 255) return c; } };
  const nodes = [...document.querySelectorAll("button, .body, .meta, .hint, summary, .call .label, aside label, output")].filter((n) => n.checkVisibility());
  return nodes.map((node) => {
    const [a, b] = [light(rgb(getComputedStyle(node).color)), light(behind(node))].sort((x, y) => y - x);
    return [node.id || node.className || node.localName, (a + 0.05) / (b + 0.05)];
  });
}
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_明暗随系统_可以改_刷新还记得_字都看得清(chat_server, visit, scheme):
    page = visit(color_scheme=scheme)
    page.check("#tools")
    with scripted(chat_server, Script(CALL), Script(THOUGHT)):
        ask(page)
        expect(answers(page).last.locator(".body")).to_have_text("想好了。")
        wait_done(page)

    def brightness():
        color = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(float, re.findall(r"[\d.]+", color)[:3]))

    before = brightness()
    assert (before > 600) == (scheme == "light")
    for name, ratio in page.evaluate(CONTRAST):
        assert ratio >= 4.5, f"{scheme} 下 {name} 的对比度只有 {ratio:.2f}"
    page.click("#theme")
    assert (brightness() > 600) != (scheme == "light")
    page.reload()
    assert (brightness() > 600) != (scheme == "light")


def test_手机宽度_不横着滚_设置盖上来再收起(chat_server, visit):
    page = visit(viewport=PHONE, has_touch=True, is_mobile=True)
    expect(page.locator("#settings")).to_be_hidden()
    with scripted(chat_server, Script("https://example.com/" + "很长很长的地址" * 8 + "x" * 60)):
        ask(page, "没有空格的一长串" * 10)
        wait_done(page)

    def overflow():
        return page.evaluate("document.documentElement.scrollWidth - innerWidth")

    assert overflow() <= 0
    answers(page).locator(".token").last.tap()
    tip = page.locator("#tip").bounding_box()
    assert tip["x"] >= 0 and tip["x"] + tip["width"] <= PHONE["width"]
    assert tip["y"] >= 0 and tip["y"] + tip["height"] <= PHONE["height"]
    page.tap("#menu")
    expect(page.locator("#settings")).to_be_visible()
    expect(page.locator("#menu")).to_have_attribute("aria-expanded", "true")
    assert overflow() <= 0
    for name in ("send", "menu", "clear"):
        box = page.locator(f"#{name}").bounding_box()
        assert box["x"] + box["width"] <= PHONE["width"] and box["height"] >= 32
    page.keyboard.press("Escape")
    expect(page.locator("#settings")).to_be_hidden()
