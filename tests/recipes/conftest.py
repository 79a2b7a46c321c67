"""各配方的测试共用：一份极小的微世界、随机初始化的起点权重、一个自己的目录。"""

from __future__ import annotations

import shutil

import pytest
from recipe_cases import make_base, make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """几十行的微世界；只读。"""
    return make_world(tmp_path_factory.mktemp("world") / "microworld")


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """起点权重、它的混合专家版本与一个更宽的教师；各测试各拷一份。"""
    folder = make_base(tmp_path_factory.mktemp("base"))
    make_base(folder, use_moe=True)
    return make_base(folder, "teacher", hidden_size=128)


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def cache(cache_folder, monkeypatch):
    """分词缓存放在临时目录里；按内容取用，各测试共一份。"""
    monkeypatch.setenv("MINIMIND_CACHE", str(cache_folder))


@pytest.fixture
def home(base, cache, tmp_path, monkeypatch):
    """有起点权重的目录，也是当前目录。"""
    monkeypatch.chdir(shutil.copytree(base, tmp_path / "home"))
    return tmp_path / "home"
