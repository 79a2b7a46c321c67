"""网页：文件都拿得到、不引用外面的东西、两种语言齐全、算式不靠 eval。"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest

import minimind.serve
from minimind.tools.clock import read_clock

STATIC = Path(minimind.serve.__file__).parent / "static"


def test_页面与它引用的文件都拿得到(live):
    page = httpx.get(f"{live.url}/")
    assert page.status_code == 200 and "default-src 'self'" in page.headers["content-security-policy"]
    for path in re.findall(r'(?:src|href)="(/[^"]+)"', page.text):
        assert httpx.get(f"{live.url}{path}").status_code == 200, path
    assert httpx.get(f"{live.url}/static/../app.py").status_code == 404


def test_不引用外面的东西_脚本里没有eval():
    for file in STATIC.iterdir():
        text = file.read_text("utf-8")
        assert not re.search(r"https?://|\beval\(|new Function|innerHTML", text), file.name


def page_and_scripts() -> tuple[str, str]:
    scripts = "".join(file.read_text("utf-8") for file in sorted(STATIC.glob("*.js")))
    return (STATIC / "index.html").read_text("utf-8"), scripts


def test_脚本用到的元素页面上都有():
    page, script = page_and_scripts()
    ids = set(re.findall(r'id="(\w+)"', page))
    assert set(re.findall(r'\$\("(\w+)"\)', script)) <= ids


needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="没有 node")


def run_node(code: str, tmp_path: Path):
    for name in ("tools.js", "words.js"):
        (tmp_path / name.replace(".js", ".mjs")).write_text((STATIC / name).read_text("utf-8"), "utf-8")
    (tmp_path / "main.mjs").write_text(code, "utf-8")
    done = subprocess.run(["node", tmp_path / "main.mjs"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_node
def test_页面用到的话两种语言都有(tmp_path):
    code = 'import {WORDS} from "./words.mjs"; console.log(JSON.stringify([Object.keys(WORDS.zh), Object.keys(WORDS.en)]))'
    zh, en = run_node(code, tmp_path)
    assert zh == en
    page, script = page_and_scripts()
    used = set(re.findall(r'data-(?:text|label|placeholder)="(\w+)"', page)) | set(
        re.findall(r"\bwords\.(?!js)(\w+)", script)
    )
    assert used <= set(zh)


@needs_node
def test_页面的计算器(tmp_path):
    cases = ["1+2*3", "-(4-6)^2/8", "2^3^2", "347×28", "1/0", "2+", "(1", "alert(1)", "0.1+0.2"]
    code = (
        'import {calculate} from "./tools.mjs";'
        f"console.log(JSON.stringify({json.dumps(cases)}.map((c) => {{"
        "try { return calculate(c) } catch { return null } })))"
    )
    assert run_node(code, tmp_path) == [7, -0.5, 512, 9716, None, None, None, None, 0.1 + 0.2]


@needs_node
def test_页面执行工具_结果的写法同训练数据_写坏的得到一句错误(tmp_path):
    calls = [
        ["calculator", '{"expression": "0.1+0.2"}'],
        ["calculator", '{"expression": "84*'],
        ["rm", "{}"],
        ["toString", "{}"],
        ["get_time", ""],
    ]
    code = f'import {{runTool}} from "./tools.mjs"; console.log(JSON.stringify({json.dumps(calls)}.map((c) => runTool(...c))))'
    sums, broken, unknown, inherited, clock = run_node(code, tmp_path)
    assert sums == json.dumps({"result": "0.3"})
    assert all("error" in json.loads(text) for text in (broken, unknown, inherited))
    assert set(json.loads(clock)) == set(read_clock())
