"""网页在真的浏览器里：无头 Chromium，对着真的服务器；模型写什么由 :mod:`scripted` 定。"""

from __future__ import annotations

import json
import re
import sys
from contextlib import ExitStack
from urllib.parse import urlsplit

import pytest
from conftest import LiveServer
from scripted import Script, scripted

from minimind.serve.generation import Settings
from minimind.tools import CALCULATOR

sync_api = pytest.importorskip("playwright.sync_api", reason="没有装 playwright，跳过浏览器里的测试")
expect = sync_api.expect

PHONE = {"width": 375, "height": 667}
THOUGHT = "<think>\n先想一想\n</think>\n\n想好了。"
CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "84*7"}}\n</tool_call>'


@pytest.fixture(scope="module")
def browser(root_dir):
    sys.path.insert(0, str(root_dir / "benchmarks"))
    try:
        from browser import HOW, find_browser
    finally:
        sys.path.remove(str(root_dir / "benchmarks"))
    expect.set_options(timeout=30_000)
    # 只活在这个文件里：它的事件循环开着时，同一进程里别的测试不能 asyncio.run
    with sync_api.sync_playwright() as playwright:
        path = find_browser(playwright)
        if path is None:
            pytest.skip(f"没有浏览器，跳过网页的测试；{HOW}")
        with playwright.chromium.launch(executable_path=path) as chromium:
            yield chromium


@pytest.fixture(scope="module")
def live():
    with LiveServer(context=2048) as server:  # 工具的说明就要两百多个词元
        yield server


@pytest.fixture
def visit(browser, live):
    """``visit(...)`` 打开页面；结束时核对控制台没有错、没有一个请求去了别处。"""
    with ExitStack() as opened:
        troubles, hosts = [], set()

        def open_page(url=live.url, expected="", language="zh-CN", **options):
            context = opened.enter_context(browser.new_context(locale=language, **options))
            page = context.new_page()
            page.set_default_timeout(30_000)
            page.on("pageerror", lambda error: troubles.append(str(error)))

            def note(message):
                if message.type in ("error", "warning") and not (expected and expected in message.text):
                    troubles.append(message.text)

            page.on("console", note)
            page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
            page.goto(url)
            expect(page.locator("#model option")).not_to_have_count(0) if not expected else None
            open_page.hosts = {urlsplit(url).netloc, ""}  # "" 是 data: 的图标
            return page

        yield open_page
        assert not troubles
        assert hosts <= open_page.hosts


def ask(page, text="你好"):
    page.fill("#input", text)
    page.keyboard.press("Enter")


def answers(page):
    return page.locator("#messages > li.assistant")


def wait_done(page):
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator("#messages > li").last.locator(".meta")).to_be_visible()


# ---------------------------------------------------------------- 流式与停止


def test_发送_文字一段段长出来(live, visit):
    script = Script("床前明月光，疑是地上霜。", hold_at=4)
    page = visit()
    expect(page.locator("#welcome")).to_be_visible()
    with scripted(live, script):
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
def test_停止_写出的留下_槽位空出来(live, visit, how):
    script = Script("从前有座山，" * 20, hold_at=6)
    page = visit()
    with scripted(live, script):
        ask(page)
        expect(answers(page).locator(".body")).to_contain_text("从前")
        page.click("#stop") if how == "按钮" else page.keyboard.press("Escape")
        expect(answers(page).locator(".meta")).to_contain_text("已停止")
        script.release()
        live.wait_idle()
    assert script.written < len(script.ids(live.table.default.tokenizer))
    expect(page.locator("#input")).to_be_focused()
    with scripted(live, Script("好的。")):
        ask(page, "再来")
        expect(answers(page).last.locator(".body")).to_have_text("好的。")


def test_写的时候清空_那一条不会混进之后的历史(live, visit):
    script = Script("旧的回答，" * 20, hold_at=3)
    page = visit()
    with scripted(live, script, Script("新的。")):
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


def test_思考_想的时候展开_作答时折起_点开再看(live, visit):
    script = Script(THOUGHT, hold_at=3)
    page = visit()
    with scripted(live, script):
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


def test_工具调用_看得到_在页面里执行_结果交回模型(live, visit):
    page = visit()
    page.check("#tools")
    bodies = []
    page.on("request", lambda r: bodies.append(r.post_data_json) if r.method == "POST" else None)
    with scripted(live, Script(CALL), Script("结果是588。")):
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


def test_一直调用工具_到轮数上限就停并说明(live, visit):
    page = visit()
    page.check("#tools")
    with scripted(live, *(Script(CALL) for _ in range(5))):
        ask(page)
        expect(page.locator("#status")).to_have_text("工具调用到了轮数上限")
    expect(answers(page)).to_have_count(5)


def shares_of(reply) -> list[tuple[str, list[float]]]:
    """一次流式响应里各词元与它的候选（百分数，与页面同一写法）。"""
    lines = [line[6:] for line in reply.text().splitlines() if line.startswith("data: {")]
    choices = [choice for line in lines for choice in json.loads(line)["choices"]]
    return [token for choice in choices for token in ((choice["logprobs"] or {}).get("content") or ())]


def test_指着一个词_看它的概率与候选_与服务器报的一致(live, visit):
    page = visit()
    with scripted(live, Script("春风又绿江南岸")), page.expect_response("**/v1/chat/completions") as answered:
        ask(page)
        wait_done(page)
    token = shares_of(answered.value)[2]
    span = answers(page).locator(".token").nth(2)
    assert span.inner_text() == token["token"]
    assert page.locator("#tip").is_hidden()
    span.scroll_into_view_if_needed()
    span.hover()
    tip = page.locator("#tip")
    expect(tip).to_be_visible()
    rows = [row.locator("td").all_inner_texts() for row in tip.locator("tr").all()]
    percent = lambda entry: f"{100 * 2.718281828459045 ** entry['logprob']:.1f}%"  # noqa: E731
    listed = token["top_logprobs"]
    expected = listed if token["token"] in [one["token"] for one in listed] else [*listed, token]
    assert [row[1] for row in rows] == [percent(one) for one in expected]
    chosen = tip.locator("tr.chosen")
    expect(chosen).to_have_count(1)
    expect(chosen).to_contain_text("写的这个")
    page.mouse.move(5, 5)
    expect(tip).to_be_hidden()


def test_不要概率_就不请求_也不留词元(live, visit):
    page = visit()
    page.uncheck("#probabilities")
    with scripted(live, Script("好。")), page.expect_request("**/v1/chat/completions") as sent:
        ask(page)
        wait_done(page)
    assert "logprobs" not in sent.value.post_data_json
    expect(answers(page).locator(".token")).to_have_count(0)


# ---------------------------------------------------------------- 键盘与输入法


def test_回车发送_Shift回车换行(live, visit):
    page = visit()
    with scripted(live, Script("好。")):
        page.locator("#input").press_sequentially("第一行")
        page.keyboard.press("Shift+Enter")
        page.locator("#input").press_sequentially("第二行")
        expect(page.locator("#messages > li")).to_have_count(0)
        page.keyboard.press("Enter")
        expect(page.locator("#messages > li.user .body")).to_have_text("第一行\n第二行")
        wait_done(page)
    expect(page.locator("#input")).to_have_value("")


def test_输入法选字时的回车不发送_Esc不停止(live, visit):
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

    with scripted(live, script):
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
    with scripted(live, Script("你也好。")):
        page.keyboard.press("Enter")
        expect(answers(page).last.locator(".body")).to_have_text("你也好。")


def focused(page) -> str:
    return page.evaluate(
        "document.activeElement.id || document.activeElement.className || document.activeElement.localName"
    )


def test_Tab的次序_焦点看得见_一条回答只占一站(live, visit):
    page = visit()
    with scripted(live, Script("一二三四五六七八九十")):
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


def test_方向键逐词看概率_斜线回到输入框(live, visit):
    page = visit()
    with scripted(live, Script("春风又绿江南岸")):
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


def test_换语言_页面与已有的消息都换_刷新还记得(live, visit):
    page = visit()
    with scripted(live, Script(THOUGHT)):
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
def test_明暗随系统_可以改_刷新还记得_字都看得清(live, visit, scheme):
    page = visit(color_scheme=scheme)
    page.check("#tools")
    with scripted(live, Script(CALL), Script(THOUGHT)):
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


def test_手机宽度_不横着滚_设置盖上来再收起(live, visit):
    page = visit(viewport=PHONE, has_touch=True, is_mobile=True)
    expect(page.locator("#settings")).to_be_hidden()
    with scripted(live, Script("https://example.com/" + "很长很长的地址" * 8 + "x" * 60)):
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


# ---------------------------------------------------------------- 出错与记住


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


def test_写到一半引擎出错_说明白(live, visit, monkeypatch):
    page = visit()

    def broken(*_):
        raise RuntimeError("内部机密")

    monkeypatch.setattr(live.runner.engine.decoder, "decode", broken)
    ask(page)
    expect(page.locator("#messages > li.error")).to_contain_text("服务器内部错误")
    assert "机密" not in page.locator("#messages").inner_text()
    live.wait_idle()
    with scripted(live, Script("又好了。")):
        ask(page)
        expect(answers(page).last.locator(".body")).to_have_text("又好了。")


def test_服务器关了_说连不上(visit):
    with LiveServer() as server:
        page = visit(server.url, expected="ERR_")
        expect(page.locator("#model option")).to_have_count(2)
    ask(page, "还在吗")
    expect(page.locator("#messages > li.error")).to_contain_text("连不上服务器")


def test_刷新之后对话与设置都在_接着聊(live, visit):
    page = visit()
    page.check("#tools")
    page.fill("#system", "你很简短")
    page.fill("#temperature", "0.3")
    with scripted(live, Script(CALL), Script(THOUGHT)):
        ask(page, "84*7？")
        expect(answers(page).last.locator(".body")).to_have_text("想好了。")
        wait_done(page)
    page.reload()
    expect(answers(page)).to_have_count(2)
    expect(answers(page).first.locator(".call")).to_have_count(2)
    expect(answers(page).last.locator("details div")).to_have_text("先想一想")
    expect(page.locator("#temperature")).to_have_value("0.3")
    with scripted(live, Script("嗯。")), page.expect_request("**/v1/chat/completions") as sent:
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


def test_模型写的标记只当文字(live, visit):
    page = visit()
    text = "<img src=x onerror=alert(1)><b>粗</b>"
    with scripted(live, Script(text)):
        ask(page, text)
        expect(answers(page).locator(".body")).to_have_text(text)
        wait_done(page)
    assert page.locator("#messages img, #messages b").count() == 0
