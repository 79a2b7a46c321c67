"""依赖版本对照：每行建一个临时环境，跑 ``compat`` 测试，把结果写进 docs/compat.md。

make matrix                                            # 全部，一行一行来；环境用完就删，同时最多占 7 GB
make matrix ARGS="--only 最低 --only 锁定"             # 只重做这几行，别的行留着上次的结果
python scripts/matrix.py --python .venv/bin/python     # 在现成的环境里跑一遍，不装东西，不写文件
python scripts/matrix.py --newest                      # 锁定的环境叠上最新的 transformers（持续集成用），失败只警告
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from minimind.console import format_duration
from minimind.distribution import DISTRIBUTION, PACKAGE
from minimind.errors import UserError, guard

try:
    import tomllib
except ImportError:  # Python 3.10；pytest 在那里带着 tomli
    import tomli as tomllib

ROOT = PACKAGE.parent
RESULTS = ROOT / "benchmarks" / "results" / "compat.json"
PAGE = ROOT / "docs" / "compat.md"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
SHOWN = ("torch", "transformers", "numpy", "tokenizers")
LIMIT = 600  # 秒；一个环境的测试平常两三分钟，到这里就是卡住了


@dataclass(frozen=True)
class Row:
    """一个环境：``pins`` 是要对照的版本，其余的包取范围里最新的；``python`` 没有时用正在运行的。"""

    name: str
    python: str
    pins: tuple[str, ...] = ()
    floors: bool = False  # 全部直接依赖取声明的下限
    locked: bool = False  # 全部包取 constraints.txt


ROWS = (
    Row("最低", "3.10", floors=True),
    Row("torch 2.11，旧", "3.11", ("torch==2.11.0", "transformers==5.17.0")),
    Row("torch 2.11，新", "3.11", ("torch==2.11.0", "transformers==5.24.0")),
    Row("torch 2.13，旧", "3.11", ("torch==2.13.0", "transformers==5.0.0")),
    Row("torch 2.13，上一版", "3.12", ("torch==2.13.0", "transformers==5.23.0")),
    Row("锁定", "3.11", locked=True),
    Row("最新", "3.13"),
)


def requirements(*extras: str) -> list[Requirement]:
    """pyproject.toml 里直接写着的依赖；自己引用自己的可选依赖展开。"""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines, queue = list(project["dependencies"]), list(extras)
    while queue:
        for line in project["optional-dependencies"][queue.pop()]:
            own = Requirement(line)
            if own.name == DISTRIBUTION:
                queue += own.extras
            else:
                lines.append(line)
    return [Requirement(line) for line in lines]


def floors() -> list[str]:
    """每个直接依赖声明的下限，写成 ``名字==版本``。"""
    found = []
    for requirement in requirements("dev"):
        lowest = [s.version for s in requirement.specifier if s.operator in (">=", "==")]
        found.append(f"{requirement.name}=={lowest[0]}")
    return found


def find_python(version: str) -> str | None:
    """PATH 上真能运行的 ``python3.N``；有的只是版本管理器的空壳，所以逐个问。"""
    for folder in os.get_exec_path():
        path = shutil.which(f"python{version}", path=folder)
        code = "import sys; print('%d.%d' % sys.version_info[:2])"
        if (
            path
            and subprocess.run([path, "-c", code], capture_output=True, text=True).stdout.strip() == version
        ):
            return path
    return None


def call(command: list[str], log: Path, **options) -> None:
    """运行一步，输出写进 ``log``。

    Raises:
        UserError: 失败；带上最后几行。
    """
    with log.open("w", encoding="utf-8") as out:
        if subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, **options).returncode:
            tail = log.read_text("utf-8", errors="replace").strip().splitlines()[-5:]
            raise UserError("没有成功：" + "\n".join(tail), where=" ".join(command[1:6]))


def build(row: Row, folder: Path) -> Path:
    """建好这一行的环境，返回它的 python。已经有的（``--envs``）直接用。"""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if python.exists():
        return python
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "-e", ".[dev]", *row.pins]
    if row.locked:
        pip += ["-c", "constraints.txt"]
    if row.floors:
        bounds = folder.with_name(folder.name + ".floors")
        bounds.write_text("\n".join(floors()) + "\n", "utf-8")
        pip += ["-c", str(bounds)]
    log = folder.with_name(folder.name + ".log")
    call([find_python(row.python) or sys.executable, "-m", "venv", str(folder)], log)
    call(pip, log)
    return python


def versions(python: Path) -> dict[str, str]:
    """那个环境里的 Python 与几个主要的包的版本。"""
    code = (
        "import json, platform; from importlib.metadata import version;"
        f"print(json.dumps({{'python': platform.python_version()}} | {{n: version(n) for n in {SHOWN}}}))"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def run_subset(
    python: Path | str, report: Path, path: list[Path] = (), limit: float = LIMIT, select: str = "compat"
) -> dict:
    """在一个环境里跑 ``select`` 选出的测试，返回通过、失败、跳过的个数，失败的名字与秒数。"""
    command = [str(python), "-m", "pytest", "-m", select, "-n", "2", "--tb=short"]
    command += ["-p", "no:cacheprovider", f"--junitxml={report}"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [*path, ROOT]))}
    start = time.monotonic()
    try:
        subprocess.run(command, cwd=ROOT, env=environment, timeout=limit, stdout=sys.stderr)
    except subprocess.TimeoutExpired:
        return {"passed": 0, "failed": [f"{limit:.0f} 秒里没有跑完"], "skipped": 0, "seconds": limit}
    seconds = round(time.monotonic() - start)
    if not report.exists():
        return {"passed": 0, "failed": ["pytest 没有启动"], "skipped": 0, "seconds": seconds}
    cases = list(ET.parse(report).iter("testcase"))
    bad = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(c.find("skipped") is not None for c in cases)
    names = [f"{c.get('classname', '').split('.')[-1]}::{c.get('name')}" for c in bad]
    passed = len(cases) - len(bad) - skipped
    return {
        "passed": passed,
        "failed": names if passed or names else ["一个测试也没有运行"],
        "skipped": skipped,
        "seconds": seconds,
    }


def check(row: Row, folder: Path) -> dict:
    """建环境、对版本、跑测试；装不上也是一种结果。"""
    entry = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}",
    }
    try:
        python = build(row, folder)
        entry |= versions(python)
    except UserError as error:
        return entry | {"passed": 0, "failed": [f"装不上：{error}"], "skipped": 0, "seconds": 0}
    for pin in map(Requirement, row.pins):
        if entry[pin.name].split("+")[0] not in pin.specifier:
            raise UserError(
                f"{folder} 里的 {pin.name} 是 {entry[pin.name]}", expected=str(pin), fix="删掉它重建"
            )
    return entry | run_subset(python, folder.with_name(folder.name + ".xml"))


def compile_all(version: str) -> str:
    """用这个版本的解释器把源码编译一遍；没有解释器时说明只查了什么。"""
    python = find_python(version)
    if python is None:
        return "没有解释器；只由 ruff 按 3.10 的语法查过"
    with tempfile.TemporaryDirectory() as cache:
        command = [python, "-m", "compileall", "-q", "minimind", "trainer", "scripts", "benchmarks", "tests"]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPYCACHEPREFIX": cache})
    return "源码编译通过" if done.returncode == 0 else "**源码编译失败**"


def page(results: dict) -> str:
    """docs/compat.md 的全文。"""
    rows = [(row.name, results["rows"][row.name]) for row in ROWS if row.name in results["rows"]]
    missing = [row.name for row in ROWS if row.name not in results["rows"]]
    lines = [
        "# 在哪些版本上跑过",
        "",
        "由 `make matrix` 写出，不手改。每行是一个单独的环境，跑同一组测试（`pytest -m compat`）：模型与 transformers 逐项核对、",
        "公开版的参考向量、编译后的梯度、训练与被杀后续训、引擎与整段前向、导出再读回、服务的回显。`make demo` 与 `make test`",
        "用的是“锁定”那一行（`constraints.txt`）；`pyproject.toml` 里声明的范围就是这张表两头之间。",
        "",
        f"| 环境 | 日期 | Python | {' | '.join(SHOWN)} | 通过 | 失败 | 跳过 | 秒 |",
        "|" + "---|" * (len(SHOWN) + 7),
    ]
    for name, entry in rows:
        cells = [name, entry["date"], *(entry.get(key, "—") for key in ("python", *SHOWN))]
        cells += [entry["passed"], len(entry["failed"]), entry["skipped"], entry["seconds"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    for name, entry in rows:
        if entry["failed"]:
            listed = "、".join(" ".join(text.split()) for text in entry["failed"][:8])
            lines += ["", f"**{name}** 失败的：{listed}{'……' if len(entry['failed']) > 8 else ''}"]
    if missing:
        lines += ["", f"还没有跑过的：{'、'.join(missing)}。"]
    machines = sorted({entry["machine"] for _, entry in rows})
    lines += [
        "",
        f"在 {'、'.join(machines)} 的 CPU 上。“最低”是 `pyproject.toml` 里每个直接依赖的下限一起装；“最新”是范围里当天最新的；",
        "Python 3.10 上 transformers 自己最高只给到 5.20。跳过的是要 `../shared` 参考数据、显卡或编译器而没有的。",
        "",
        "| Python | |",
        "|---|---|",
        *(f"| {version} | {text} |" for version, text in results["pythons"].items()),
        "",
        '重做：`make matrix`（全部）、`make matrix ARGS="--only 最新"`（一行）；在自己的环境里跑一遍：',
        "`python scripts/matrix.py --python python`。环境建在临时目录里，用完就删；`--envs 目录` 建在那里并留着。",
        "PATH 上有哪个 `python3.N` 就用哪个，没有的用正在运行的那个。",
    ]
    return "\n".join(lines) + "\n"


def run_matrix(names: list[str], envs: str | None) -> int:
    """逐行建环境、跑、删，每行之后都存盘。返回失败的行数。"""
    rows = [row for row in ROWS if not names or row.name in names]
    if unknown := set(names) - {row.name for row in ROWS}:
        raise UserError(f"没有这一行：{'、'.join(unknown)}", expected="、".join(row.name for row in ROWS))
    results = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {"rows": {}}
    results["pythons"] = {version: compile_all(version) for version in PYTHONS}
    failed, start = 0, time.monotonic()
    for row in rows:
        print(f"—— {row.name} ——", file=sys.stderr)
        with tempfile.TemporaryDirectory() as temporary:
            entry = check(row, Path(envs or temporary).resolve() / row.name.replace(" ", ""))
        results["rows"][row.name] = entry
        failed += bool(entry["failed"])
        RESULTS.write_text(json.dumps(results, ensure_ascii=False, indent=1) + "\n", "utf-8")
        PAGE.write_text(page(results), "utf-8")
    print(
        f"{len(rows)} 个环境，{failed} 个有失败，{format_duration(time.monotonic() - start)}；写进了 {PAGE}",
        file=sys.stderr,
    )
    return failed


def run_newest() -> None:
    """在正在运行的环境上叠一份范围里最新的 transformers，跑 ``compat`` 测试。失败只警告：那是将来的事。"""
    locked = importlib.metadata.version("transformers")
    wanted = str(next(r for r in requirements() if r.name == "transformers"))
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--target"]
    with tempfile.TemporaryDirectory() as temporary:
        alone, whole = Path(temporary, "alone"), Path(temporary, "whole")
        try:
            subprocess.run(
                [*pip, str(alone), "--no-deps", wanted], check=True, timeout=60, stderr=subprocess.PIPE
            )
            found = next(
                iter(importlib.metadata.distributions(name="transformers", path=[str(alone)]))
            ).version
            if found == locked:
                print(f"锁定的 transformers {locked} 就是范围里最新的，不用另跑。", file=sys.stderr)
                return
            # 连它要的包一起取新的；torch 不在其中，仍用原来的
            subprocess.run(
                [*pip, str(whole), f"transformers=={found}"], check=True, timeout=120, stderr=subprocess.PIPE
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            print(f"留意：取不到最新的 transformers（{error}），这次没有在它上面测。", file=sys.stderr)
            return
        print(f"锁定的是 transformers {locked}，最新的是 {found}：在它上面跑 compat 测试…", file=sys.stderr)
        result = run_subset(
            sys.executable, Path(temporary, "report.xml"), [whole], 120, "compat and not slow"
        )
    if result["failed"]:
        print("!" * 70, file=sys.stderr)
        print(f"警告：transformers {found} 上 {len(result['failed'])} 个测试失败：", file=sys.stderr)
        print(*result["failed"], sep="\n", file=sys.stderr)
        print("锁定的版本不受影响；请尽快修好，或在 pyproject.toml 里写上限。", file=sys.stderr)
        print("!" * 70, file=sys.stderr)
    else:
        print(f"transformers {found} 上 {result['passed']} 个测试全部通过，可以 make lock。", file=sys.stderr)


@guard
def main(argv: list[str]) -> int:
    """命令行：默认跑全部，``--python`` 跑现成的环境，``--newest`` 跑最新的 transformers。"""
    parser = argparse.ArgumentParser(description="依赖版本对照，结果写进 docs/compat.md")
    parser.add_argument("--only", action="append", default=[], metavar="行名", help="只跑这一行，可以重复")
    parser.add_argument("--envs", metavar="目录", help="环境建在这里并留着，已经有的直接用；默认用完就删")
    parser.add_argument("--python", metavar="路径", help="只在这个现成的环境里跑一遍，不装东西，不写文件")
    parser.add_argument(
        "--newest", action="store_true", help="正在运行的环境叠上最新的 transformers，失败只警告"
    )
    args = parser.parse_args(argv)
    if args.newest:
        run_newest()
        return 0
    if args.python:
        python = shutil.which(args.python)
        if python is None:
            raise UserError("没有这个解释器，或不能运行", where=f"--python {args.python}")
        with tempfile.TemporaryDirectory() as temporary:
            result = versions(Path(python)) | run_subset(python, Path(temporary, "report.xml"))
        print(json.dumps(result, ensure_ascii=False, indent=1))
        return 1 if result["failed"] else 0
    return 1 if run_matrix(args.only, args.envs) else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
