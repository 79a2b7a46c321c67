"""看训练的页面的截图：对着真的日志起服务器，用无头 Chromium 存成 docs/images/watch_*.png。

    python benchmarks/screenshot_watch.py --save_dir out --runs grpo_192,full_sft_192

要 ``pip install -e '.[dev]' -c constraints.txt`` 与一个 Chromium。
"""

from __future__ import annotations

import argparse
import threading
import time
from pathlib import Path

from browser import HOW, find_browser

ROOT = Path(__file__).resolve().parents[1]
# 名字 → (明暗, 窗口, 先滚到哪里)
SCENES = {
    "curves": ("light", {"width": 1180, "height": 760}, None),
    "replay": ("dark", {"width": 1180, "height": 760}, "#replay"),
    "phone": ("light", {"width": 375, "height": 667}, None),
}


def start_server(save_dir: Path) -> str:
    """在后台线程里起服务器，返回它的地址。"""
    from minimind.watch.cli import make_server

    server = make_server(save_dir, "127.0.0.1", 0)
    threading.Thread(target=server.run, daemon=True).start()
    for _ in range(600):
        if server.started:
            return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        time.sleep(0.1)
    raise SystemExit("服务器一分钟还没起来")


def shoot(page, runs: list[str], target: str | None, back: float, path: Path) -> None:
    """勾选，等曲线，滑块拖到从头数 ``back``（0 到 1）处，拍下。"""
    page.wait_for_selector("#list li", state="attached")
    folded = page.locator("#runs").is_hidden()
    if folded:
        page.click("#menu")
    for item in page.locator("#list li").all():
        item.locator("input").set_checked(item.locator(".name").inner_text() in runs)
    if folded:
        page.click("#menu")
    page.wait_for_selector(f".chart[data-series='{len(runs)}']")
    if target:
        slider = page.locator("#moment")
        slider.evaluate(
            "(s, at) => { s.value = Math.round(at * s.max); s.dispatchEvent(new Event('input')); }", back
        )
        page.locator(target).evaluate("(node) => node.scrollIntoView()")
    page.wait_for_timeout(1000)
    page.screenshot(path=path)
    print(f"{path}：{path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save_dir", type=Path, default=Path("out"))
    parser.add_argument("--runs", required=True, help="比哪几次，逗号分隔，日志的名字")
    parser.add_argument(
        "--back", type=float, default=1.0, help="回看一张拖到哪里，0 是头一次样例，1 是最后一次"
    )
    parser.add_argument("--only", default=",".join(SCENES), help="哪几张，逗号分隔")
    parser.add_argument("--out_dir", type=Path, default=ROOT / "docs" / "images")
    args = parser.parse_args()

    from playwright.sync_api import sync_playwright

    url = start_server(args.save_dir.resolve())
    with sync_playwright() as playwright:
        path = find_browser(playwright)
        if path is None:
            raise SystemExit(f"没有浏览器；{HOW}")
        browser = playwright.chromium.launch(executable_path=path)
        for scene in args.only.split(","):
            scheme, size, target = SCENES[scene]
            context = browser.new_context(
                viewport=size, color_scheme=scheme, locale="zh-CN", device_scale_factor=1.5
            )
            page = context.new_page()
            page.goto(url)
            shoot(page, args.runs.split(","), target, args.back, args.out_dir / f"watch_{scene}.png")
            context.close()
        browser.close()


if __name__ == "__main__":
    main()
