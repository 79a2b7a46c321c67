"""网页：文件都拿得到、不引用外面的东西、两种语言齐全、来路不明的文字不当标记。"""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import httpx
import pytest
from watch_server import serving

from minimind.watch.app import SHARED, STATIC


def scripts() -> str:
    return "".join(file.read_text("utf-8") for file in [*sorted(STATIC.glob("*.js")), SHARED / "page.js"])


def page() -> str:
    return (STATIC / "index.html").read_text("utf-8")


def test_页面与它引用的文件都拿得到(folder):
    with serving(folder) as url:
        answer = httpx.get(f"{url}/")
        assert answer.status_code == 200 and "default-src 'self'" in answer.headers["content-security-policy"]
        links = re.findall(r'(?:src|href)="(/[^"]+)"', answer.text) + re.findall(
            r'from "(/[^"]+)"', scripts()
        )
        links += [f"/static/{name}" for name in re.findall(r'from "\./([^"]+)"', scripts())]
        assert len(links) > 8
        for path in links:
            assert httpx.get(f"{url}{path}").status_code == 200, path


def test_不引用外面的东西_不把文字当标记():
    for file in STATIC.iterdir():
        text = file.read_text("utf-8")
        assert not re.search(
            r"https?://|\beval\(|new Function|innerHTML|outerHTML|insertAdjacentHTML|document\.write", text
        ), file.name


def test_脚本用到的元素页面上都有():
    ids = set(re.findall(r'id="(\w+)"', page()))
    assert set(re.findall(r'\$\("(\w+)"\)', scripts())) <= ids


@pytest.mark.skipif(shutil.which("node") is None, reason="没有 node")
def test_页面用到的话两种语言都有(tmp_path):
    (tmp_path / "words.mjs").write_text((STATIC / "words.js").read_text("utf-8"), "utf-8")
    code = (
        'import {WORDS} from "./words.mjs";'
        "console.log(JSON.stringify(['zh', 'en'].map((l) => [Object.keys(WORDS[l]), Object.keys(WORDS[l].names)])))"
    )
    (tmp_path / "main.mjs").write_text(code, "utf-8")
    done = subprocess.run(["node", tmp_path / "main.mjs"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    zh, en = json.loads(done.stdout)
    assert zh == en
    used = set(re.findall(r'data-(?:text|label|placeholder)="(\w+)"', page()))
    used |= set(re.findall(r"\bwords\.(?!js)(\w+)", scripts()))
    assert used <= set(zh[0])
