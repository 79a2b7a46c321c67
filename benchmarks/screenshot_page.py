"""聊天页的截图：起一个真的服务器，用无头 Chromium 问几句，存成 docs/images/page_*.png。

    python benchmarks/screenshot_page.py --save_dir out --weight full_sft
    python benchmarks/screenshot_page.py --save_dir out/demo --tools 用计算器算84*7。 --only tools

要 ``pip install -e '.[dev]' -c constraints.txt`` 与一个 Chromium。
"""

from __future__ import annotations

import argparse
import socket
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from browser import HOW, find_browser

ROOT = Path(__file__).resolve().parents[1]
DESKTOP, PHONE = {"width": 1080, "height": 680}, {"width": 375, "height": 667}
# 名字 → (明暗, 窗口)
SCENES = {
    "light": ("light", DESKTOP),
    "dark": ("dark", DESKTOP),
    "phone": ("light", PHONE),
    "hover": ("light", {"width": 640, "height": 430}),
    "tools": ("light", {"width": 640, "height": 430}),
}


def start_server(save_dir: str, weight: str) -> str:
    """在后台线程里起服务器，模型载入好了返回它的地址。"""
    import uvicorn

    from minimind.serve.app import create_app
    from minimind.serve.cli import ServeArguments, model_table

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    app = create_app(lambda: model_table(ServeArguments(save_dir=save_dir, weight=weight)))
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    threading.Thread(target=server.run, daemon=True).start()
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            urllib.request.urlopen(f"{url}/health").close()
            return url
        except urllib.error.URLError:  # 还没监听，或还在载入（503）
            time.sleep(0.1)
    raise SystemExit("服务器一分钟还没起来")


def shoot(page, scene: str, questions: list[str], settings: dict[str, str], at: int, path: Path) -> None:
    """问完，摆好，拍下；``at`` 是 hover 一张指着第几个词。"""
    for name, value in settings.items():
        page.evaluate(
            "([id, value]) => { const f = document.getElementById(id); f.value = value; f.dispatchEvent(new Event('input')); }",
            [name, value],
        )
    page.evaluate(f"document.getElementById('tools').checked = {'true' if scene == 'tools' else 'false'}")
    if page.viewport_size["width"] < 1000 and page.locator("#settings").is_visible():
        page.click("#menu")
    for question in questions:
        page.fill("#input", question)
        page.keyboard.press("Enter")
        page.wait_for_selector("#send:visible", timeout=120_000)
    if scene == "hover":
        tokens = page.locator(".token:visible")
        token = tokens.nth(min(at, tokens.count() - 1))
        token.scroll_into_view_if_needed()
        page.wait_for_timeout(200)  # 滚动会收起提示，等它停下
        token.hover()
    page.screenshot(path=path)
    print(f"{path}：{path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save_dir", default="out")
    parser.add_argument("--weight", default="full_sft")
    parser.add_argument("--ask", nargs="+", default=["你好，请介绍一下你自己。"], help="依次问的话")
    parser.add_argument("--tools", nargs="+", default=["用计算器算84*7。"], help="tools 一张问的话")
    parser.add_argument("--at", type=int, default=4, help="hover 一张指着第几个词（从 0 数）")
    parser.add_argument("--only", default="light,dark,phone,hover", help="哪几张，逗号分隔")
    parser.add_argument("--set", nargs="*", default=["seed=0"], help="设置栏里的值，写成 temperature=0.3")
    parser.add_argument("--out_dir", type=Path, default=ROOT / "docs" / "images")
    args = parser.parse_args()

    from playwright.sync_api import sync_playwright

    url = start_server(args.save_dir, args.weight)
    settings = dict(pair.split("=", 1) for pair in args.set)
    with sync_playwright() as playwright:
        path = find_browser(playwright)
        if path is None:
            raise SystemExit(f"没有浏览器；{HOW}")
        browser = playwright.chromium.launch(executable_path=path)
        for scene in args.only.split(","):
            scheme, size = SCENES[scene]
            context = browser.new_context(
                viewport=size, color_scheme=scheme, locale="zh-CN", device_scale_factor=2
            )
            page = context.new_page()
            page.goto(url)
            page.wait_for_selector("#model option", state="attached")
            questions = args.tools if scene == "tools" else args.ask
            shoot(page, scene, questions, settings, args.at, args.out_dir / f"page_{scene}.png")
            context.close()
        browser.close()


if __name__ == "__main__":
    main()
