"""房间图：画的与 import 语句一致；没有往上的引用、没有循环、没有同名的公开类；数法自己先用小例子核对。"""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from minimind.errors import UserError


@pytest.fixture(scope="module")
def house(root_dir):
    spec = importlib.util.spec_from_file_location("house_map", root_dir / "scripts" / "map.py")
    module = sys.modules["house_map"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["house_map"]


@pytest.fixture(scope="module")
def modules(house, root_dir):
    return house.read_modules(root_dir)


@pytest.fixture
def build(house, tmp_path):
    """``build({"路径": "源码"})``：一所小房子，包的 ``__init__`` 自动补上。"""

    def make(files: dict[str, str]):
        for path, text in files.items():
            target = tmp_path / path
            target.parent.mkdir(parents=True, exist_ok=True)
            for folder in target.relative_to(tmp_path).parents:
                if folder.parts and folder.parts[0] == "minimind":
                    (tmp_path / folder / "__init__.py").touch()
            target.write_text(text, encoding="utf-8")
        return house.read_modules(tmp_path)

    return make


def test_文档里的图是最新的(house, modules, root_dir):
    page = (root_dir / house.PAGE).read_text(encoding="utf-8")
    assert house.page_with(house.draw(modules), page) == page, "运行 make map"


def test_没有往上的引用(house, modules):
    assert house.upward(modules) == []


def test_没有循环只为类型的也算(house, modules):
    assert house.circles(modules) == []


def test_公开的类不同名(house, modules):
    assert house.same_names(modules) == {}


@pytest.mark.parametrize("start", ["minimind.recipes.pretrain", "minimind.serve.app"])
def test_数出的闭包就是导入时载入的文件(house, modules, root_dir, start):
    code = f"import sys, {start}; print(*sorted(n for n in sys.modules if n.split('.')[0] == 'minimind'))"
    run = subprocess.run([sys.executable, "-c", code], cwd=root_dir, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert [module.name for module in house.closure(start, modules)] == run.stdout.split()


def test_三种引用分得清(house, build):
    modules = build(
        {
            "minimind/a.py": "from typing import TYPE_CHECKING\nfrom .model import m\n"
            "if TYPE_CHECKING:\n    import minimind.b\n"
            "def f():\n    from minimind.c import x\nTARGET = 'minimind.d:main'\n",
            "minimind/b.py": "",
            "minimind/c.py": "x = 1\n",
            "minimind/d.py": "def main(): ...\n",
            "minimind/model/m.py": "",
        }
    )
    assert modules["minimind.a"].imports == {
        "minimind.model.m": house.ON_LOAD,
        "minimind.b": house.FOR_TYPES,
        "minimind.c": house.ON_USE,
        "minimind.d": house.ON_USE,
    }
    names = [module.name for module in house.closure("minimind.a", modules)]
    assert names == ["minimind", "minimind.a", "minimind.model", "minimind.model.m"]


def test_往上的引用与循环找得到(house, build):
    modules = build(
        {
            "minimind/rl/policy.py": "def f():\n    from minimind.recipes import grpo\n",
            "minimind/recipes/grpo.py": "import minimind.rl.policy\n",
            "minimind/model/layer.py": "from minimind.errors import UserError\n",
            "minimind/errors.py": "class UserError(Exception): ...\n",
            "minimind/rl/one.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .two import T\n",
            "minimind/rl/two.py": "from . import one\nclass T: ...\nclass _Hidden: ...\n",
            "minimind/rl/three.py": "class T: ...\nclass _Hidden: ...\n",
        }
    )
    assert house.upward(modules) == [
        ("minimind.model.layer", "minimind.errors", house.ON_LOAD),
        ("minimind.rl.policy", "minimind.recipes.grpo", house.ON_USE),
    ]
    assert house.circles(modules) == [["minimind.rl.one", "minimind.rl.two"]]
    assert house.circles(modules, (house.ON_LOAD, house.ON_USE)) == [
        ["minimind.recipes.grpo", "minimind.rl.policy"]
    ]
    assert house.same_names(modules) == {"T": ["minimind.rl.three", "minimind.rl.two"]}


def test_跟着参数走数得对(house, build):
    modules = build(
        {
            "minimind/recipes/pretrain.py": "from minimind.trainer.run import Run, helper\n"
            "def run(args):\n    thing = Run(args)\n    helper(3)\n    return thing.go()\n",
            "minimind/trainer/run.py": "from minimind.trainer.log import note\n"
            "def helper(x):\n    return x\n"
            "class Run:\n    def __init__(self, args):\n        self.args = args\n        note(args)\n"
            "    def go(self):\n        return self.args.epochs\n",
            "minimind/trainer/log.py": "def note(args):\n    print(args.lr)\n",
        }
    )
    journey = house.Journey("minimind.recipes.pretrain", modules)
    assert [name for _, name in journey.places] == ["run", "Run.__init__", "note", "Run.go"]
    # 配方 → run.py → log.py → 回 run.py → 回配方 → 又进 run.py → 又回配方
    assert journey.returns == 4


def test_没有记号的页面指出来(house):
    with pytest.raises(UserError, match=r"记号"):
        house.page_with("图", "一页没有记号的文档")
