"""文档：链接与图片都在，指到代码的名字在那个文件里真的有，图片不太大。"""

from __future__ import annotations

import re

import pytest

LINK = re.compile(r'\]\(([^)\s]+)\)|src="([^"]+)"')
NAMED = re.compile(r"\[`([\w.]+)`\]\(([^)\s]+\.py)\)")


@pytest.fixture(scope="module", params=["README.md", "README_en.md", "CONTRIBUTING.md", "docs"])
def pages(request, root_dir):
    path = root_dir / request.param
    return sorted(path.glob("*.md")) if path.is_dir() else [path]


def test_链接与图片都在(pages):
    missing = []
    for page in pages:
        for match in LINK.finditer(page.read_text("utf-8")):
            target = (match[1] or match[2]).split("#")[0]
            if target and "://" not in target and not (page.parent / target).exists():
                missing.append(f"{page.name}：{target}")
    assert not missing


def test_指到代码的名字那个文件里有(pages):
    missing = []
    for page in pages:
        for name, target in NAMED.findall(page.read_text("utf-8")):
            if name.endswith(".py"):
                assert target.endswith(name), f"{page.name}：{name} 指到 {target}"
                continue
            code = (page.parent / target).read_text("utf-8")
            missing += [
                f"{page.name}：{target} 里没有 {part}"
                for part in name.split(".")
                if not re.search(rf"\b{part}\b", code)
            ]
    assert not missing


def test_图片都小于300kB(root_dir):
    large = {p.name: p.stat().st_size for p in (root_dir / "docs" / "images").iterdir()}
    assert {name: size for name, size in large.items() if size >= 300_000} == {}
