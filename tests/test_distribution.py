"""怎么装、装到什么：每一处安装命令都装这个仓库，锁定的版本齐全，环境里有别人的 minimind 会说。"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from itertools import product

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from minimind import distribution
from minimind.distribution import DISTRIBUTION, install_command, other_minimind
from minimind.errors import UserError, guard

try:
    import tomllib
except ImportError:  # Python 3.10；pytest 在那里带着 tomli
    import tomli as tomllib

PIP = "pip install"
INSTALL = re.compile(r"pip3?(?:\.exe)?[\"',\s]+install\b([^\n`#（）]*)")
FOREIGN = re.compile(r"(?<![\w./-])minimind(?:\[[\w,\s-]*\])?(?=$|[\s\"'=<>~!,，。；）)])")
SPEC = re.compile(r"(?<![\w-])minimind\[[a-z,\s]+\]")
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
SYSTEMS = [("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"), ("win32", "AMD64")]


def wrong_installs(text: str) -> list[str]:
    """文字里装了别人的 ``minimind``、或装这个仓库却不用锁定版本的安装命令。"""
    found = SPEC.findall(text)
    for match in INSTALL.finditer(text):
        line = match[1]
        whole = re.search(r"-e\s*[\"']?\.(?![\w/])", line)
        if FOREIGN.search(line) or (whole and "-c constraints.txt" not in line):
            found.append(match[0])
    return found


@pytest.mark.parametrize(
    "line",
    [
        f"{PIP} minimind",
        f"python -m {PIP} 'minimind'",
        f"{PIP} -U minimind==0.6",
        f'uv {PIP} "minimind>=0.1"',
        f"{PIP} -e .",
        f"python -m {PIP} -e '.[dev]'",
        "'" + "minimind" + "[serve]'",
    ],
)
def test_认得出写错的安装命令(line):
    assert wrong_installs(f"先 {line}，再用")


@pytest.mark.parametrize(
    "line",
    [
        "python -m pip install -c constraints.txt -e .",
        install_command(),
        install_command("serve"),
        "pip install 'llama-cpp-python[server]'",
        "pip install gguf",
        "pip uninstall minimind",
    ],
)
def test_写对的安装命令不误报(line):
    assert not wrong_installs(f"先 {line}，再用")


def test_每一处安装命令都装这个仓库并用锁定的版本(root_dir):
    pages = [
        root_dir / name for name in ("README.md", "README_en.md", ".ci/run", "eval_llm.py", "pyproject.toml")
    ]
    for folder in ("docs", "benchmarks", "minimind", "tests", "trainer", "scripts"):
        pages += [
            p for p in (root_dir / folder).rglob("*") if p.suffix in (".md", ".py", ".sh", ".html", ".js")
        ]
    assert len(pages) > 100
    wrong = {
        str(p.relative_to(root_dir)): found for p in pages if (found := wrong_installs(p.read_text("utf-8")))
    }
    assert not wrong
    readme = (root_dir / "README.md").read_text("utf-8")
    assert len(INSTALL.findall(readme)) >= 3  # 这里真的有可查的


@pytest.fixture(scope="module")
def project(root_dir):
    return tomllib.loads((root_dir / "pyproject.toml").read_text("utf-8"))


@pytest.fixture(scope="module")
def pins(root_dir):
    lines = (root_dir / "constraints.txt").read_text("utf-8").splitlines()
    return [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]


def environments():
    for python, (system, machine) in product(PYTHONS, SYSTEMS):
        name = {"linux": "Linux", "darwin": "Darwin", "win32": "Windows"}[system]
        yield default_environment() | {
            "python_version": python,
            "python_full_version": f"{python}.1",
            "sys_platform": system,
            "platform_system": name,
            "platform_machine": machine,
            "os_name": "nt" if system == "win32" else "posix",
        }


def pinned(pins, environment) -> dict[str, str]:
    """这个环境里生效的锁定版本：名字到版本。"""
    live = [pin for pin in pins if pin.marker is None or pin.marker.evaluate(environment)]
    table = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in live}
    assert len(table) == len(live), "同一个环境里一个包锁了两个版本"
    return table


def direct(project, *extras) -> list[Requirement]:
    """pyproject.toml 里直接写着的依赖，自己引用自己的可选依赖展开。"""
    wanted = [Requirement(line) for line in project["project"]["dependencies"]]
    for extra in extras:
        for line in project["project"]["optional-dependencies"][extra]:
            requirement = Requirement(line)
            own = requirement.name == DISTRIBUTION
            wanted += (
                direct(project, *requirement.extras)[len(project["project"]["dependencies"]) :]
                if own
                else [requirement]
            )
    return wanted


def test_锁定文件只有名字_版本与环境标记(root_dir, pins):
    text = (root_dir / "constraints.txt").read_text("utf-8")
    assert "://" not in text and "--" not in text and str(root_dir) not in text
    for pin in pins:  # pip 的约束文件不收方括号；不是 == 就没有锁住
        assert not pin.extras and not pin.url
        assert [s.operator for s in pin.specifier] == ["=="] and "*" not in str(pin.specifier)
    assert len(pins) > 80


def test_每个系统与_Python_版本都锁住全部直接依赖_且在声明的范围之内(project, pins):
    wanted = direct(project, "dev")
    assert {"torch", "transformers", "fastapi", "gguf", "pytest"} <= {r.name for r in wanted}
    for environment in environments():
        table = pinned(pins, environment)
        for requirement in wanted:
            version = table.get(canonicalize_name(requirement.name))
            assert version, (
                f"{environment['sys_platform']} {environment['python_version']} 没有锁住 {requirement.name}"
            )
            assert version in requirement.specifier, f"{requirement} 不含锁定的 {version}"


def test_构建用的_setuptools_与_torch_的版本各处一致(project, pins, root_dir):
    table = pinned(pins, default_environment())
    assert project["build-system"]["requires"] == [f"setuptools=={table['setuptools']}"]
    assert f"\nTORCH = torch=={table['torch']}\n" in (root_dir / "Makefile").read_text("utf-8")


def test_会破坏接口的库有上限(project):
    specifiers = {r.name: str(r.specifier) for r in direct(project)}
    assert "<" in specifiers["transformers"] and "<" in specifiers["torch"]


def closure(requirements) -> dict[str, str]:
    """这个环境里装着的、``requirements`` 直接与间接要的全部包：名字到版本。"""
    found, queue = {}, [(r, "") for r in requirements]
    while queue:
        requirement, extra = queue.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        visited = name in found
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if visited and not requirement.extras:
            continue
        for line in metadata.requires(name) or []:
            queue += [(Requirement(line), extra) for extra in (requirement.extras or {""})]
    return found


def test_按锁定装的环境里_每个包都是锁定的版本(project, pins):
    table = pinned(pins, default_environment())
    installed = closure(direct(project, "dev"))
    strict = os.environ.get("MINIMIND_LOCKED") == "1"  # .ci/run 设置：那里必须是按锁定装的
    if not strict and any(
        installed.get(name) != table[name] for name in ("transformers", "tokenizers", "numpy")
    ):
        pytest.skip("这个环境不是按 constraints.txt 装的")
    assert len(installed) > 30
    loose = {name: version for name, version in installed.items() if name not in table}
    assert not loose, "装了、却没有锁住"
    if strict:
        differ = {n: v for n, v in installed.items() if v.split("+")[0] != table[n]}
        assert not differ, "装上的版本不是锁定的"


def test_发行名不是公共索引上的那个_导入名不变(project):
    assert project["project"]["name"] == DISTRIBUTION != "minimind"
    assert project["project"]["scripts"] == {"minimind": "minimind_command:main"}
    assert distribution.PACKAGE.name == "minimind"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """搜索路径只剩一个空目录，当前目录也在别处。"""
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    site.mkdir(), elsewhere.mkdir()
    monkeypatch.setattr(sys, "path", [str(site)])
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(elsewhere / "a" / "b.py"), raising=False)
    monkeypatch.chdir(elsewhere)
    return site


def add_package(folder, distribution=None, version="0.6.0"):
    (folder / "minimind").mkdir()
    (folder / "minimind" / "__init__.py").write_text("")
    if distribution:
        info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "top_level.txt").write_text("minimind\n")
        return info


def test_没有别的_minimind_时不说话_也不查元数据(folder, monkeypatch, root_dir):
    monkeypatch.setattr(metadata, "packages_distributions", lambda: pytest.fail("不该查"))
    (folder / "minimind").mkdir()  # 没有 __init__.py 的同名目录（例如克隆所在的上一级）不算
    (folder / "bin").mkdir()
    (folder / "bin" / "minimind").write_text("#!/bin/sh\n")  # 装好的命令自己也不算
    sys.path.append(str(folder / "bin"))
    (folder / "minimind_train-0.1.0.dist-info").mkdir()
    sys.path.append(str(root_dir))
    assert other_minimind() is None


def test_装着别人的_minimind_说出版本与去掉的办法(folder):
    add_package(folder, "minimind")
    said = other_minimind()
    assert "minimind-0.6.0" in said and "别人的包" in said and "pip uninstall minimind" in said
    assert install_command() in said and said.count("。") == 1


def test_用旧名装过的说出从哪里装的(folder, root_dir):
    info = add_package(folder, "minimind", "0.1.0")
    (info / "direct_url.json").write_text(
        json.dumps({"url": root_dir.as_uri(), "dir_info": {"editable": True}})
    )
    said = other_minimind()
    assert root_dir.as_uri() in said and "pip uninstall minimind" in said and "别人的包" not in said


def test_别的发行也带着_minimind_包_说出它的名字(folder):
    add_package(folder, "tiny-models")
    said = other_minimind()
    assert str(folder / "minimind") in said and "pip uninstall tiny-models" in said


@pytest.mark.parametrize("where", ["当前目录", "脚本的上一级"])
def test_当前目录或脚本旁边是另一份仓库_说出正在用哪一份(folder, tmp_path, monkeypatch, where):
    clone = tmp_path / "clone"
    (clone / "trainer").mkdir(parents=True)
    add_package(clone)
    if where == "当前目录":
        monkeypatch.chdir(clone)
    else:
        monkeypatch.setattr(sys.modules["__main__"], "__file__", str(clone / "trainer" / "train.py"))
    said = other_minimind()
    assert str(clone / "minimind") in said and str(distribution.PACKAGE) in said and "uninstall" not in said


def test_入口处只说一次_多卡时只有第一个进程说(folder, monkeypatch, capsys):
    add_package(folder, "minimind")
    command = guard(lambda: 0)
    monkeypatch.setenv("RANK", "1")
    distribution.warn_other_minimind.cache_clear()
    assert command() == 0 and capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    distribution.warn_other_minimind.cache_clear()
    assert command() == 0 and command() == 0
    assert capsys.readouterr().err.count("pip uninstall minimind") == 1
    distribution.warn_other_minimind.cache_clear()


def test_真的命令在有别人的_minimind_的环境里照常运行并说出来(tmp_path, root_dir):
    add_package(tmp_path, "minimind")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    script = [sys.executable, str(root_dir / "scripts" / "convert_model.py"), "hf", "--help"]
    done = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("pip uninstall minimind") == 1


def test_装好的命令在别人的_minimind_挡在前面时运行的仍是这里的代码(tmp_path, root_dir):
    """``minimind`` 命令就是导入 minimind_command；可编辑安装的目录排在 site-packages 之后，别人的包会先被找到。"""
    add_package(tmp_path, "minimind")
    (tmp_path / "minimind" / "__init__.py").write_text("raise SystemExit('运行了别人的代码')")
    (tmp_path / "run.py").write_text(
        "import sys; sys.argv = ['minimind', '--version']; from minimind_command import main; main()"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(root_dir)])}
    done = subprocess.run([sys.executable, "run.py"], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0 and done.stdout.startswith("minimind "), done.stderr
    assert done.stderr.count("pip uninstall minimind") == 1


def test_没装服务的库时_错误里的命令装的是这个仓库(monkeypatch):
    from minimind.serve import cli

    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(UserError, match=re.escape("-e '.[serve]'")):
        cli.run(None)


@pytest.fixture
def fake_make(root_dir, tmp_path):
    """用假的 python 跑 Makefile 的安装：带约束的那一次失败；返回运行它的函数。"""
    if shutil.which("make") is None:
        pytest.skip("没有 make")
    (tmp_path / "bin").mkdir()
    python, log = tmp_path / "bin" / "python", tmp_path / "log"
    python.write_text(f'#!/bin/sh\necho "$@" >> {log}\ncase "$*" in *"-c constraints.txt"*) exit 1;; esac\n')
    python.chmod(0o755)

    def run(*arguments):
        command = ["make", "-s", f"VENV={tmp_path}", *arguments, str(tmp_path / ".installed-dev")]
        # 全部测试本身就是 make test 起的：外层 make 的参数（如 LOCKED=1）不该传进来
        env = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
        env.pop("LOCKED", None)
        done = subprocess.run(command, cwd=root_dir, capture_output=True, text=True, env=env)
        return done, log.read_text().splitlines()

    return run


def test_锁定的版本装不上时退回声明的范围_并且说出来(fake_make):
    done, calls = fake_make()
    assert done.returncode == 0 and "锁定的版本装不上，改用" in done.stderr
    installs = [line for line in calls if " install " in f" {line} "]
    assert "-c constraints.txt" in installs[0] and "constraints" not in installs[1] and len(installs) == 2


def test_持续集成里锁定的版本装不上就是失败(fake_make, root_dir):
    done, calls = fake_make("LOCKED=1")
    assert done.returncode != 0 and "错误：constraints.txt 锁定的版本装不上" in done.stderr
    assert len([line for line in calls if " install " in f" {line} "]) == 1
    assert "make test LOCKED=1" in (root_dir / ".ci" / "run").read_text("utf-8")
