"""依赖版本对照：行里的版本齐全且在声明的范围之内，结果如实写进表里，最新的 transformers 失败只警告。"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys

import pytest
from packaging.requirements import Requirement

from minimind.errors import UserError


@pytest.fixture(scope="module")
def matrix(root_dir):
    spec = importlib.util.spec_from_file_location("matrix", root_dir / "scripts" / "matrix.py")
    module = sys.modules["matrix"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["matrix"]


def entry(**changes) -> dict:
    return {
        "date": "2026-01-02",
        "machine": "Linux x86_64",
        "python": "3.11.7",
        "torch": "2.13.0+cpu",
        "transformers": "5.24.0",
        "numpy": "2.4.6",
        "tokenizers": "0.23.3",
        "passed": 99,
        "failed": [],
        "skipped": 2,
        "seconds": 120,
    } | changes


def test_行里有要对照的版本_都在声明的范围之内(matrix):
    pins = [Requirement(pin) for row in matrix.ROWS for pin in row.pins]
    assert {"torch==2.11.0", "torch==2.13.0", "transformers==5.17.0", "transformers==5.23.0"} <= set(
        map(str, pins)
    )
    assert any(row.floors for row in matrix.ROWS) and any(row.locked for row in matrix.ROWS)
    assert any(not (row.floors or row.locked or row.pins) for row in matrix.ROWS)  # 全部取最新
    declared = {r.name: r.specifier for r in matrix.requirements("dev")}
    for pin in pins:
        assert next(iter(pin.specifier)).version in declared[pin.name], pin


def test_最低那一行是每个直接依赖声明的下限(matrix):
    floors = matrix.floors()
    assert "torch==2.9.1" in floors and "transformers==5.0" in floors
    assert {r.name for r in map(Requirement, floors)} == {r.name for r in matrix.requirements("dev")}
    assert "xgrammar" in {r.name for r in map(Requirement, floors)}  # 经 serve 间接要的也在


def test_只认真能运行且版本对得上的解释器(matrix, tmp_path, monkeypatch):
    for name, body in (("a", "exit 127"), ("b", "echo 3.9"), ("c", "echo 3.12")):
        (tmp_path / name).mkdir()
        shim = tmp_path / name / "python3.12"
        shim.write_text(f"#!/bin/sh\n{body}\n")
        shim.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'a'}:{tmp_path / 'b'}")
    assert matrix.find_python("3.12") is None and "没有解释器" in matrix.compile_all("3.12")
    monkeypatch.setenv("PATH", f"{tmp_path / 'a'}:{tmp_path / 'b'}:{tmp_path / 'c'}")
    assert matrix.find_python("3.12") == str(tmp_path / "c" / "python3.12")


def test_表里如实写着失败与没有跑过的(matrix):
    bad = entry(passed=90, failed=["test_golden::test_a", "test_engine::test_b"])
    results = {"rows": {"锁定": entry(), "最低": bad}, "pythons": {"3.10": "源码编译通过"}}
    text = matrix.page(results)
    assert "| 锁定 | 2026-01-02 | 3.11.7 | 2.13.0+cpu | 5.24.0 | 2.4.6 | 0.23.3 | 99 | 0 | 2 | 120 |" in text
    assert "| 90 | 2 | 2 | 120 |" in text and "test_golden::test_a、test_engine::test_b" in text
    assert "还没有跑过的" in text and "最新" in text.split("还没有跑过的")[1]


def test_文档就是结果写出来的(matrix, root_dir):
    results = json.loads(matrix.RESULTS.read_text("utf-8"))
    assert matrix.PAGE.read_text("utf-8") == matrix.page(results)
    assert (root_dir / "docs" / "compat.md") == matrix.PAGE


def test_只重做点名的行_别的行留着_装不上也写进表里(matrix, tmp_path, monkeypatch):
    monkeypatch.setattr(matrix, "RESULTS", tmp_path / "compat.json")
    monkeypatch.setattr(matrix, "PAGE", tmp_path / "compat.md")
    monkeypatch.setattr(matrix, "compile_all", lambda version: "源码编译通过")
    matrix.RESULTS.write_text(json.dumps({"rows": {"锁定": entry(passed=77)}, "pythons": {}}))

    def broken(command, log, **_):
        raise UserError("没有这个版本", where="pip")

    monkeypatch.setattr(matrix, "call", broken)
    assert matrix.run_matrix(["最低"], str(tmp_path)) == 1
    rows = json.loads(matrix.RESULTS.read_text("utf-8"))["rows"]
    assert rows["锁定"]["passed"] == 77 and "没有这个版本" in rows["最低"]["failed"][0]
    assert "装不上" in matrix.PAGE.read_text("utf-8")
    with pytest.raises(UserError, match="没有这一行"):
        matrix.run_matrix(["最底"], None)


def test_一个测试也没运行_没跑完_都算失败(matrix, tmp_path, monkeypatch):
    report = tmp_path / "report.xml"

    def fake(xml):
        def run(command, **options):
            if xml is None:
                raise subprocess.TimeoutExpired(command, options["timeout"])
            report.write_text(xml)

        return run

    monkeypatch.setattr(matrix.subprocess, "run", fake("<testsuites><testsuite/></testsuites>"))
    assert matrix.run_subset("python", report)["failed"] == ["一个测试也没有运行"]
    cases = '<testcase classname="a.t" name="x"/><testcase classname="a.t" name="y"><failure/></testcase>'
    cases += '<testcase classname="a.t" name="z"><skipped/></testcase>'
    monkeypatch.setattr(
        matrix.subprocess, "run", fake(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    )
    result = matrix.run_subset("python", report)
    assert (result["passed"], result["failed"], result["skipped"]) == (1, ["t::y"], 1)
    monkeypatch.setattr(matrix.subprocess, "run", fake(None))
    assert "没有跑完" in matrix.run_subset("python", report, limit=5)["failed"][0]


@pytest.mark.parametrize(
    ("newest", "failed", "words", "ran"),
    [
        ("5.99.0", [], "全部通过", True),
        ("5.99.0", ["test_golden::test_a"], "警告：transformers 5.99.0 上 1 个测试失败", True),
        ("same", [], "就是范围里最新的", False),
        (None, [], "取不到最新的 transformers", False),
    ],
)
def test_最新的_transformers_失败只警告_连不上就跳过(matrix, monkeypatch, capsys, newest, failed, words, ran):
    locked = importlib.metadata.version("transformers")
    version, calls = locked if newest == "same" else newest, []

    def run(command, **_):
        if newest is None:
            raise subprocess.CalledProcessError(1, command)
        target = matrix.Path(command[command.index("--target") + 1])
        info = target / f"transformers-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: transformers\nVersion: {version}\n")

    def subset(python, report, path, limit, select):
        calls.append((path[0] / f"transformers-{version}.dist-info").exists())
        return {"passed": 9, "failed": failed, "skipped": 0, "seconds": 1}

    monkeypatch.setattr(matrix.subprocess, "run", run)
    monkeypatch.setattr(matrix, "run_subset", subset)
    assert matrix.main(["--newest"]) == 0
    said = capsys.readouterr().err
    assert words in said and calls == ([True] if ran else [])
    assert all(name in said for name in failed)


def test_compat_测试各个方面都有(root_dir):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "compat and not slow",
        "--collect-only",
        "-n",
        "0",
        "tests",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root_dir)
    files = {line.split("::")[0] for line in done.stdout.splitlines() if "::" in line}
    names = "model/test_parity model/test_golden model/test_compile_gradients trainer/test_resume inference/test_engine"
    names += " export/test_hf export/test_importing export/test_gguf export/test_lora_export serve/test_api"
    assert {f"tests/{name}.py" for name in names.split()} <= files
