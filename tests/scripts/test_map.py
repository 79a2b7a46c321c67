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
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    yield module
    del sys.modules["house_map"]


@pytest.fixture(scope="module")
def graph(house):
    """数的那一半：``scripts/source_imports.py``，随 map.py 一起载入。"""
    return sys.modules["source_imports"]


@pytest.fixture(scope="module")
def modules(graph, root_dir):
    return graph.read_modules(root_dir)


@pytest.fixture
def build(graph, tmp_path):
    """``build({"路径": "源码"})``：一所小房子，包的 ``__init__`` 自动补上。"""

    def make(files: dict[str, str]):
        for path, text in files.items():
            target = tmp_path / path
            target.parent.mkdir(parents=True, exist_ok=True)
            for folder in target.relative_to(tmp_path).parents:
                if folder.parts and folder.parts[0] == "minimind":
                    (tmp_path / folder / "__init__.py").touch()
            target.write_text(text, encoding="utf-8")
        return graph.read_modules(tmp_path)

    return make


def test_文档里的图是最新的(house, modules, root_dir):
    page = (root_dir / house.PAGE).read_text(encoding="utf-8")
    assert house.page_with(house.draw(modules), page) == page, "运行 make map"


def test_没有往上的引用(graph, modules):
    assert graph.upward(modules) == []


def test_没有循环只为类型的也算(graph, modules):
    assert graph.circles(modules) == []


def test_公开的类不同名(graph, modules):
    assert graph.same_names(modules) == {}


@pytest.mark.parametrize("start", ["minimind.recipes.pretrain", "minimind.serve.app"])
def test_数出的闭包就是导入时载入的文件(graph, modules, root_dir, start):
    code = f"import sys, {start}; print(*sorted(n for n in sys.modules if n.split('.')[0] == 'minimind'))"
    run = subprocess.run([sys.executable, "-c", code], cwd=root_dir, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert [module.name for module in graph.closure(start, modules)] == run.stdout.split()


def test_导入预训练至多五十个文件(graph, modules):
    """只做一次最简单的预训练，用不着的（样例、编译、续训、别的数据格式、别人的模板、看训练的页面）用到才载入。"""
    names = [module.name for module in graph.closure("minimind.recipes.pretrain", modules)]
    assert len(names) <= 50, names


def test_必读至多十二个文件_两千四百行_README里写着(house, modules, root_dir):
    files, lines = house.figures(modules)["必读"]
    assert files <= 12 and lines <= 2400
    page = (root_dir / "README.md").read_text(encoding="utf-8")
    part = page[page.index("## 从哪里读起") : page.index("| 想知道 | 打开 |")]
    paths = [modules[name].path.relative_to(root_dir).as_posix() for name in house.MUST_READ]
    found = [part.find(f"]({path})") for path in paths]
    assert -1 not in found and found == sorted(found), "README 的“从哪里读起”与 MUST_READ 要一致，次序也是"


def test_参数路过的地方不多(graph, modules):
    """各函数要几个值就收几个值，不收整个 args；用到才载入的文件也算。"""
    assert len(graph.Journey("minimind.recipes.pretrain", modules).places) < 32


def test_三种引用分得清(graph, build):
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
        "minimind.model.m": graph.ON_LOAD,
        "minimind.b": graph.FOR_TYPES,
        "minimind.c": graph.ON_USE,
        "minimind.d": graph.ON_USE,
    }
    names = [module.name for module in graph.closure("minimind.a", modules)]
    assert names == ["minimind", "minimind.a", "minimind.model", "minimind.model.m"]


def test_往上的引用与循环找得到(graph, build):
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
    assert graph.upward(modules) == [
        ("minimind.model.layer", "minimind.errors", graph.ON_LOAD),
        ("minimind.rl.policy", "minimind.recipes.grpo", graph.ON_USE),
    ]
    assert graph.circles(modules) == [["minimind.rl.one", "minimind.rl.two"]]
    assert graph.circles(modules, (graph.ON_LOAD, graph.ON_USE)) == [
        ["minimind.recipes.grpo", "minimind.rl.policy"]
    ]
    assert graph.same_names(modules) == {"T": ["minimind.rl.three", "minimind.rl.two"]}


def test_跟着参数走数得对(graph, build):
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
    journey = graph.Journey("minimind.recipes.pretrain", modules)
    assert [name for _, name in journey.places] == ["run", "Run.__init__", "note", "Run.go"]
    # 配方 → run.py → log.py → 回 run.py → 回配方 → 又进 run.py → 又回配方
    assert journey.returns == 4


def test_用到才载入的文件_参数照样跟进去(graph, build):
    modules = build(
        {
            "minimind/recipes/pretrain.py": "def run(args):\n    from minimind.trainer.late import late\n    late(args)\n",
            "minimind/trainer/late.py": "def late(args):\n    return args.lr\n",
        }
    )
    assert "minimind.trainer.late" not in [
        m.name for m in graph.closure("minimind.recipes.pretrain", modules)
    ]
    journey = graph.Journey("minimind.recipes.pretrain", modules)
    assert [name for _, name in journey.places] == ["run", "late"]


def test_没有记号的页面指出来(house):
    with pytest.raises(UserError, match=r"记号"):
        house.page_with("图", "一页没有记号的文档")
