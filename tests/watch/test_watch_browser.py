"""页面在真的浏览器里：比较、放大、拖动回看、语言、明暗、手机、边看边长、服务重启、恶意的名字。"""

from __future__ import annotations

import os
from contextlib import ExitStack
from urllib.parse import urlsplit

import pytest
from watch_logs import append, rows, samples
from watch_server import serving

expect = pytest.importorskip("playwright.sync_api", reason="没有装 playwright，跳过浏览器里的测试").expect

PHONE = {"width": 375, "height": 667}
EVIL = "<img src=x onerror=document.title='坏了'>"


@pytest.fixture
def logs(folder):
    return folder / "logs"


@pytest.fixture
def visit(browser):
    """``visit(url, ...)`` 打开页面；结束时核对控制台没有错、没有一个请求去了别处。"""
    with ExitStack() as opened:
        troubles, hosts, allowed = [], set(), {""}

        def open_page(url, language="zh-CN", offline=False, **options):
            allowed.add(urlsplit(url).netloc)
            context = opened.enter_context(browser.new_context(locale=language, **options))
            page = context.new_page()
            page.set_default_timeout(60_000)
            page.on("pageerror", lambda error: troubles.append(str(error)))
            page.on(
                "console",
                lambda line: line.type in ("error", "warning") and not offline and troubles.append(line.text),
            )
            page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
            page.goto(url)
            return page

        yield open_page
        assert not troubles
        assert hosts <= allowed


def tick(page, name, wanted=True):
    page.locator("#list li", has_text=name).locator("input").set_checked(wanted)


def chart(page, key="loss"):
    return page.locator(f'.chart[data-key="{key}"]')


def write_two(logs):
    append(logs / "a_64.jsonl", *rows(1, 100))
    append(logs / "b_64.jsonl", *rows(1, 60), {"step": 60, "val_loss": 1.5, "time": 30})
    os.utime(logs / "a_64.jsonl", (2e9, 2e9))  # 最新的是 a


def test_没有日志_说一声_有了就出现(visit, folder, logs):
    with serving(folder) as url:
        page = visit(url)
        expect(page.locator("#empty")).to_contain_text("还没有训练日志")
        append(logs / "a_64.jsonl", *rows(1, 3))
        expect(page.locator(".card")).to_contain_text("a_64")
        expect(page.locator("#empty")).to_be_hidden()


def test_头一次打开看最新的_再勾一个就一起比_指着看数(visit, folder, logs):
    write_two(logs)
    with serving(folder) as url:
        page = visit(url)
        expect(chart(page)).to_have_attribute("data-series", "1")
        expect(page.locator(".card h2 .name")).to_have_text("a_64")
        tick(page, "b_64")
        expect(chart(page)).to_have_attribute("data-series", "2")
        expect(chart(page)).to_have_attribute("data-points", "160")
        expect(chart(page, "val_loss")).to_have_attribute("data-series", "1")
        chart(page).locator("canvas").scroll_into_view_if_needed()
        chart(page).locator("canvas").hover()
        rows_shown = page.locator("#tip tr")
        expect(rows_shown).to_have_count(2)
        assert {row.split("\t")[-1] for row in rows_shown.all_inner_texts()} == {"a_64", "b_64"}
        tick(page, "a_64", False)
        expect(page.locator(".card")).to_have_count(1)
        page.reload()
        expect(page.locator(".card h2 .name")).to_have_text("b_64")


def test_画布上真的有两种颜色的线(visit, folder, logs):
    write_two(logs)
    with serving(folder) as url:
        page = visit(url)
        tick(page, "b_64")
        expect(chart(page)).to_have_attribute("data-series", "2")
        count = """(canvas) => {
            const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            const near = (i, [r, g, b]) => Math.abs(data[i] - r) + Math.abs(data[i + 1] - g) + Math.abs(data[i + 2] - b) < 30 && data[i + 3] > 200;
            const counts = [0, 0];
            for (let i = 0; i < data.length; i += 4) [[0, 114, 178], [213, 94, 0]].forEach((color, k) => (counts[k] += near(i, color)));
            return counts;
        }"""
        assert min(chart(page).locator("canvas").evaluate(count)) > 50


def test_横着拖一段就放大_取的是那一段的点_双击复原(visit, folder, logs):
    append(logs / "a_64.jsonl", *rows(1, 3000))
    with serving(folder) as url:
        page = visit(url)
        expect(chart(page)).to_have_attribute("data-points", "500")
        canvas = chart(page).locator("canvas")
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        y = box["y"] + 80
        page.mouse.move(box["x"] + 100, y)
        page.mouse.down()
        page.mouse.move(box["x"] + 120, y, steps=4)
        page.mouse.up()
        expect(page.locator("#reset")).to_be_visible()
        expect(chart(page)).not_to_have_attribute("data-points", "500")  # 三百步以内，原样的点
        assert 50 < int(chart(page).get_attribute("data-points")) < 500
        canvas.dblclick()
        expect(chart(page)).to_have_attribute("data-points", "500")
        expect(page.locator("#reset")).to_be_hidden()


def test_换横轴_平滑_对数_都不出错(visit, folder, logs):
    write_two(logs)
    with serving(folder) as url:
        page = visit(url)
        expect(chart(page)).to_be_visible()
        for axis in ("time", "tokens", "step"):
            with page.expect_response(lambda answer, axis=axis: f"axis={axis}" in answer.url):
                page.select_option("#axis", axis)
        page.fill("#smooth", "0.9")
        page.check("#log")
        page.locator("#more summary").click()
        expect(chart(page, "time")).to_be_visible()
        expect(chart(page)).to_have_attribute("data-points", "100")


def test_拖着滑块看同一个提示越答越好(visit, folder, logs):
    path = logs / "a_64.jsonl"
    for step in range(10, 101, 10):
        append(path, *rows(step - 9, step), samples(step, "好" * (step // 10), EVIL))
    with serving(folder) as url:
        page = visit(url)
        answer = page.locator(".exchange dd").first
        expect(answer).to_have_text("好" * 10)
        slider = page.locator("#moment")
        slider.scroll_into_view_if_needed()
        box = slider.bounding_box()
        page.mouse.move(box["x"] + box["width"] - 6, box["y"] + box["height"] / 2)
        page.mouse.down()
        page.mouse.move(box["x"] + 4, box["y"] + box["height"] / 2, steps=15)
        expect(answer).to_have_text("好")
        page.mouse.up()
        expect(page.locator("#at")).to_have_text("第 10 步")
        page.keyboard.press("ArrowRight")
        expect(answer).to_have_text("好好")
        append(path, samples(110, "新的", "x"))  # 停在哪一步就还在哪一步
        expect(slider).to_have_attribute("max", "10")
        expect(answer).to_have_text("好好")
        page.keyboard.press("End")
        expect(answer).to_have_text("新的")
        append(path, samples(120, "更新的", "x"))  # 停在最右边就跟着走
        expect(answer).to_have_text("更新的")


def test_几次训练的回答并排(visit, folder, logs):
    append(logs / "a_64.jsonl", *rows(1, 10), samples(10, "甲答"))
    append(logs / "b_64.jsonl", *rows(1, 10), samples(5, "乙答"))
    with serving(folder) as url:
        page = visit(url)
        for name in ("a_64", "b_64"):
            tick(page, name)
        expect(page.locator(".column")).to_have_count(2)
        assert {text for text in page.locator(".exchange dd").all_inner_texts()} == {"甲答", "乙答"}


def test_强化学习的回答与分项_专家负载_各任务(visit, folder, logs):
    parts = {"auto": 1.0, "format": 0.5, "length": -0.25}
    rollouts = [
        {"kind": kind, "prompt": "84*7？", "answer": kind, "reward": reward, "parts": parts}
        for kind, reward in (("best", 1.5), ("median", 0.5), ("worst", -0.25))
    ]
    record = {
        "step": 9,
        "rollouts": rollouts,
        "expert_load": [[0.1, 0.9], [0.5, 0.5]],
        "tasks": {"add": 0.75, EVIL: 0.5},
    }
    append(logs / "grpo_64.jsonl", *rows(1, 9, reward=0.5, reward_auto=0.4), record)
    with serving(folder) as url:
        page = visit(url)
        expect(page.locator(".rollout")).to_have_count(3)
        expect(page.locator(".rollout b")).to_have_text(
            ["最好 · 奖励 1.5", "居中 · 奖励 0.5", "最差 · 奖励 -0.25"]
        )
        expect(page.locator(".rollout").first.locator(".parts td:nth-child(2)")).to_have_text(
            ["1", "0.5", "-0.25"]
        )
        expect(page.locator(".heat td")).to_have_text(["10%", "90%", "50%", "50%"])
        expect(page.locator("#tasks tbody tr")).to_have_count(2)
        expect(page.locator("#tasks tbody tr").first).to_contain_text("75.0%")
        expect(page.locator("#tasks tbody tr").nth(1)).to_contain_text(EVIL)
        expect(chart(page, "reward_auto")).to_be_visible()


def test_边看边长_体征的话_还要多久_走完了(visit, folder, logs):
    path = logs / "a_64.jsonl"
    append(path, *rows(1, 10))
    path.with_suffix(".card.json").write_text('{"total_steps": 30}')
    with serving(folder) as url:
        page = visit(url)
        card = page.locator(".card")
        expect(chart(page)).to_have_attribute("data-points", "10")
        expect(card).to_contain_text("10 / 30 步")
        expect(card).to_contain_text("剩余 10 秒")
        expect(card).to_contain_text("体征正常")
        append(path, *rows(11, 20), *rows(21, 21, notes=["损失没有在降"]))
        expect(chart(page)).to_have_attribute("data-points", "21")
        expect(card).to_contain_text("第 21 步：损失没有在降")
        append(path, *rows(22, 29), '{"step": 30, "loss": 0.')  # 写到一半
        expect(chart(page)).to_have_attribute("data-points", "29")
        append(path, '25, "time": 15}\n')
        expect(chart(page)).to_have_attribute("data-points", "30")
        expect(card).to_contain_text("完成")
        path.unlink()
        append(path, *rows(1, 4))  # 重新训练
        expect(chart(page)).to_have_attribute("data-points", "4")


def test_体征_同一句只写一遍带着各步_最近的两句_更早的折起来(visit, folder, logs):
    said = [(1, "甲"), (2, "乙"), (3, "甲"), (4, "丙")] + [(n, "丁") for n in range(5, 11)]
    append(logs / "a_64.jsonl", *({**row, "notes": [text]} for n, text in said for row in rows(n, n)))
    with serving(folder) as url:
        page = visit(url)
        expect(page.locator(".vitals > p")).to_have_text(["第 …, 7, 8, 9, 10 步：丁", "第 4 步：丙"])
        page.locator(".vitals summary").click()
        expect(page.locator(".vitals details p")).to_have_text(["第 1, 3 步：甲", "第 2 步：乙"])
        append(logs / "a_64.jsonl", *rows(11, 11))  # 刷新之后还开着
        expect(chart(page)).to_have_attribute("data-points", "11")
        expect(page.locator(".vitals details p").first).to_be_visible()


def test_服务重启_页面说连不上_回来了接着看(visit, folder, logs):
    path = logs / "a_64.jsonl"
    append(path, *rows(1, 10))
    with serving(folder) as url:
        page = visit(url, offline=True)
        expect(chart(page)).to_have_attribute("data-points", "10")
    expect(page.locator("#status")).to_contain_text("连不上")
    append(path, *rows(11, 12))
    with serving(folder, port=urlsplit(url).port):
        expect(chart(page)).to_have_attribute("data-points", "12")
        expect(page.locator("#status")).to_contain_text("更新")


def test_换语言_换明暗_刷新之后还是(visit, folder, logs):
    write_two(logs)
    with serving(folder) as url:
        page = visit(url, color_scheme="light")
        expect(chart(page).locator("figcaption")).to_have_text("训练损失")
        page.click("#language")
        expect(chart(page).locator("figcaption")).to_have_text("train loss")
        expect(page.locator(".card")).to_contain_text("vital signs normal")
        background = "getComputedStyle(document.body).backgroundColor"
        light = page.evaluate(background)
        page.click("#theme")
        dark = page.evaluate(background)
        assert dark != light and sum(map(int, dark[4:-1].split(","))) < 150
        page.reload()
        expect(chart(page).locator("figcaption")).to_have_text("train loss")
        assert page.evaluate(background) == dark
        english = visit(url, language="en-US")
        expect(english.locator("h1")).to_have_text("Training")


@pytest.mark.parametrize("saved", ['"x"', "5", '{"a": 1}', "不是 JSON", "[1, 2]", '[["id"]]', "null"])
def test_存着的勾选不成样子_照样打开_像头一次(visit, folder, logs, saved):
    """同一个端口从前可能是别的页面。"""
    append(logs / "a_64.jsonl", *rows(1, 10))
    with serving(folder) as url:
        page = visit(url)
        page.evaluate("text => localStorage.setItem('minimind.watch.selected', text)", saved)
        page.reload()
        expect(page.locator("#list li input")).to_be_checked()
        expect(chart(page)).to_be_visible()


def test_数很大而范围很窄_刻度数得完(visit, folder, logs):
    """k 加一还是它自己：不设上限，页面就再也不动了。"""
    with serving(folder) as url:
        page = visit(url)
        counts = page.evaluate(
            """async () => {
              const { ticks } = await import("/static/chart.js");
              return [[9e15, 9e15 + 2, 8], [1, 1 + 2.3e-16, 4], [0, 8, 4], [-5, 5, 5]].map((one) => ticks(...one).length);
            }"""
        )
    assert all(count <= 17 for count in counts) and counts[2:] == [5, 5]


def test_手机上不横着溢出_清单点开点上(visit, folder, logs):
    write_two(logs)
    append(logs / "a_64.jsonl", samples(100, "很长的回答" * 50))
    with serving(folder) as url:
        page = visit(url, viewport=PHONE)
        expect(chart(page)).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        assert page.evaluate("document.getElementById('scroll').scrollWidth") <= PHONE["width"]
        expect(page.locator("#list")).to_be_hidden()
        page.click("#menu")
        tick(page, "b_64")
        page.click("#menu")
        expect(page.locator(".card")).to_have_count(2)


def test_名字与日志里的标记只当文字(visit, folder, logs):
    append(
        logs / f"{EVIL}.jsonl", *rows(1, 5, notes=[EVIL], **{EVIL: 1.0, "__proto__": 2.0, "constructor": 3.0})
    )
    append(
        logs / f"{EVIL}.jsonl",
        {"step": 5, "samples": [{"prompt": EVIL, "answer": EVIL}, 3, None, {"prompt": {}, "answer": [1]}]},
    )
    append(
        logs / f"{EVIL}.jsonl",
        {
            "step": 5,
            "rollouts": [{"kind": EVIL, "parts": {EVIL: 1, "x": "y"}}, "x"],
            "expert_load": [1, [None, "x"], {}],
        },
    )
    with serving(folder) as url:
        page = visit(url)
        expect(page.locator(".card h2 .name")).to_have_text(EVIL)
        expect(page.locator(".vitals")).to_contain_text(EVIL)
        expect(page.locator(".exchange dd").first).to_have_text(EVIL)
        expect(page.locator(".rollout").first).to_contain_text(EVIL)
        page.locator("#more summary").click()
        expect(page.locator("#morecharts figcaption").filter(has_text=EVIL)).to_be_visible()
        chart(page).locator("canvas").hover()
        expect(page.locator("#tip")).to_contain_text(EVIL)
        assert page.locator("img").count() == 0 and page.title() == "MiniMind"


def test_至多比十二个_按名字找(visit, folder, logs):
    for n in range(14):
        append(logs / f"run{n:02}_64.jsonl", *rows(1, 3))
    with serving(folder) as url:
        page = visit(url)
        expect(page.locator("#list li")).to_have_count(14)
        expect(page.locator("#list input:checked")).to_have_count(1)  # 最新的
        for box in page.locator("#list input:not(:checked)").all()[
            ::-1
        ]:  # 倒着点：前面的点了，后面的序号会变
            box.click()
        expect(page.locator("#list input:checked")).to_have_count(12)
        page.fill("#filter", "run07")
        expect(page.locator("#list li")).to_have_count(1)
