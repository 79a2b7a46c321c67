"""自检的骨架、表与 JSON；整条命令在 CPU 与 NPU 的替身上各走一遍。"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console

from minimind import selftest
from minimind.errors import UserError
from minimind.selftest import numerics, show, speed, toys
from minimind.selftest.rows import Check, Measure, NotApplicable, Outcome, ResultRow, run_check, run_checks

CPU = torch.device("cpu")
ANY = Measure("差", 0.0, high=1.0)


@pytest.mark.parametrize(
    ("measure", "ok", "text"),
    [
        (Measure("差", 1.2345e-6, high=1e-4), True, "差 1.2e-6≤1e-4"),
        (Measure("差", 0.3, high=1e-4), False, "差 0.3>1e-4"),
        (Measure("步", 3, 3, 3), True, "步 3≤3"),
        (Measure("步", 2, 3, 3), False, "步 2≤3<3"),
        (Measure("差", float("nan"), high=1e-4), False, "差 nan>1e-4"),
        (Measure("差", float("-inf"), high=1e-4), False, "差 -inf≤1e-4"),
        (Measure("词元/秒", 12345.6), True, "词元/秒 12,346"),
    ],
)
def test_数与限度(measure, ok, text):
    assert measure.ok is ok
    assert str(measure) == text


def outcome(*measures):
    return lambda: Outcome(measures)


def test_没有可判的数不算通过():
    for measures in ((), (Measure("词元/秒", 5.0),)):
        row = run_check(Check("组", "行", outcome(*measures)))
        assert (row.status, "可以判定的数" in row.note) == ("✗", True)


def test_出错与不适用都写明_后面的照做():
    def broken():
        raise ValueError("\n第一句\n第二句")

    def absent():
        raise NotApplicable("只有一张卡")

    checks = [Check("组", "甲", broken), Check("组", "乙", absent), Check("组", "丙", outcome(ANY))]
    rows = run_checks(checks, 1e9)
    assert [(row.status, row.note) for row in rows] == [
        ("✗", "ValueError：第一句"),
        ("—", "只有一张卡"),
        ("✓", ""),
    ]


def test_时间到了记为未测():
    """头一项按猜的用时，之后按同组上一项的；放不下的不做，便宜的别组照做。"""
    now = [0.0]

    def spend(seconds):
        def work():
            now[0] += seconds
            return Outcome([ANY])

        return work

    checks = [
        Check("编译", "一", spend(50), 20.0),
        Check("编译", "二", spend(50), 20.0),
        Check("编译", "三", spend(50), 20.0),
        Check("速度", "四", spend(1), 5.0),
        Check("大", "五", spend(1), 500.0),
    ]
    told = []
    import minimind.selftest.rows as module

    clock = module.time.perf_counter
    try:
        module.time.perf_counter = lambda: now[0]
        rows = run_checks(checks, 120.0, lambda n, row: told.append(n), clock=lambda: now[0])
    finally:
        module.time.perf_counter = clock
    assert [row.status for row in rows] == ["✓", "✓", "…", "✓", "…"]
    assert rows[2].note == "未测：时间到" and told == [1, 2, 3, 4, 5]


def rows_with(*statuses):
    return [ResultRow("组", str(index), status, [ANY]) for index, status in enumerate(statuses)]


def test_结论():
    assert show.verdict(rows_with("✓", "✓", "—"), "cpu") == "✓ cpu合格：2 项通过，1 项不适用。"
    sentence = show.verdict(rows_with("✓", "✗", "…"), "npu:0")
    assert sentence.startswith("✗ npu:0不合格：1 项不对（组 1），1 项通过，1 项未测（时间到：组 1；")
    assert show.verdict(rows_with("…"), "cpu").startswith("✗ cpu一项也没有测成")


def test_命令_表与JSON(monkeypatch, tmp_path, capsys):
    checks = [
        Check("组", "甲", outcome(Measure("差", 0.5, high=1.0))),
        Check("组", "乙", outcome(Measure("差", float("inf"), high=1.0))),
    ]
    monkeypatch.setattr(selftest, "all_checks", lambda device: checks)
    path = tmp_path / "新目录" / "a.json"
    assert selftest.main(["--device", "cpu", "--out", str(path)]) == 1
    out, err = capsys.readouterr()
    assert "差 0.5≤1" in out and "差 inf>1" in out and str(path) in out
    assert "[1/2] ✓ 组 甲" in err and "[2/2] ✗ 组 乙" in err
    report = json.loads(path.read_text("utf-8"))
    assert report["verdict"].startswith("✗ cpu") and report["verdict"] in out
    assert {"torch", "transformers", "python", "系统", "设备", "驱动"} <= report["environment"].keys()
    assert report["environment"]["torch"] == torch.__version__
    good, bad = report["rows"]
    assert (good["status"], good["measures"]) == (
        "✓",
        [{"name": "差", "value": 0.5, "low": None, "high": 1.0, "ok": True}],
    )
    assert (bad["status"], bad["measures"][0]["value"], bad["measures"][0]["ok"]) == ("✗", "inf", False)
    checks.pop()
    assert selftest.main(["--device", "cpu", "--out", str(path)]) == 0


def test_时间太少一项也没测成不算合格(tmp_path, capsys):
    assert selftest.main(["--device", "cpu", "--minutes", "1e-9", "--out", str(tmp_path / "a.json")]) == 1
    assert "一项也没有测成" in capsys.readouterr().out


def test_参数不对说得清(tmp_path, capsys):
    with pytest.raises(UserError, match=r"--minutes：值是 0.*大于 0"):
        selftest.SelftestArguments(minutes=0)
    assert selftest.main(["--device", "tpu"]) == 2
    (tmp_path / "占着").write_text("")
    assert (
        selftest.main(["--device", "cpu", "--minutes", "1e-9", "--out", str(tmp_path / "占着/a.json")]) == 2
    )


def test_每一种组合都在表里():
    names = {f"{check.group} {check.name}" for check in selftest.all_checks(CPU)}
    for group in ("前向反向", "编译"):
        for kind in ("v2", "v3", "MoE"):
            for layout in ("打包", "左填充"):
                for precision in ("fp32", "bf16", "fp16"):
                    assert f"{group} {kind} {layout} {precision}" in names
    assert len(names) == len(selftest.all_checks(CPU))


def test_参考的混合专家路由拉得开():
    """半精度的舍入约 0.4 %：选中的与没选中的差得远远不止，词元才不会因舍入换专家。"""
    model, batch = toys.toy_model("MoE"), toys.toy_batch("左填充")
    gaps = []

    def watch(module, inputs):
        score = torch.nn.functional.linear(inputs[0].flatten(0, 1), module.gate.weight)
        kept = score[batch["attention_mask"].flatten().bool()].sort(-1, descending=True).values
        gaps.append(((kept[:, 1] - kept[:, 2]) / kept.abs().amax(-1)).min())
        assert kept.softmax(-1).amax() < 0.95  # 没有饱和，门控才有梯度

    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(watch)
    model(**batch)
    assert min(gaps) > 0.02, gaps


def test_批次的样子():
    packed, padded = toys.toy_batch("打包"), toys.toy_batch("左填充")
    assert packed["cu_seqlens"].tolist() == [0, 70, 153, 160, 193, 293, 313, 320]
    assert packed["labels"][0, [0, 70, 153, 159]].tolist() == [-100] * 4 and packed["labels"][0, 71] >= 0
    assert padded["attention_mask"].sum(1).tolist() == [48, 31, 17]
    assert padded["position_ids"][2, -17:].tolist() == list(range(17))


def test_速度在CPU上量得出(monkeypatch):
    monkeypatch.setattr(speed, "SIZES", {"cpu": ("tiny", 1, 64, 1)})
    rows = [run_check(check) for check in speed.speed_checks(CPU, "fp32")]
    assert [row.status for row in rows] == ["✓"] * 3, rows
    assert {"词元/秒", "利用率 %", "内存最高 GB"} <= {measure.name for measure in rows[0].measures}


SCRIPT = """
import npu_standin
from minimind import selftest
from minimind.selftest import speed
from minimind.model.presets import PRESETS
PRESETS["tiny"] = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
speed.DEFAULT_SIZE = ("tiny", 1, 32, 6)
speed.NEW_TOKENS, speed.WARMUP = 2, 0
"""


def run_standin(body: str, **env: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", SCRIPT + body],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **env},
    )


def test_NPU的替身上走完全程(tmp_path, root_dir):
    path = tmp_path / "npu.json"
    body = (
        f"raise SystemExit(selftest.main(['--device', 'npu:0', '--minutes', '60', '--out', {str(path)!r}]))"
    )
    done = run_standin(body, PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), str(root_dir)]))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    report = json.loads(path.read_text("utf-8"))
    assert report["verdict"].startswith("✓ npu:0（Ascend910B2）合格")
    assert report["environment"]["设备"] == "npu:0（Ascend910B2）"
    assert "torch_npu 2.9.0" in report["environment"]["驱动"]
    rows = {f"{row['group']} {row['name']}": row for row in report["rows"]}
    absent = {name: row["note"] for name, row in rows.items() if row["status"] == "—"}
    assert {row["status"] for row in rows.values()} == {"✓", "—"}
    assert all("NPU" in absent[name] for name in rows if name.startswith("编译"))
    assert absent["多进程 两个进程"] == "只有一张卡"
    assert {name.split()[0] for name in absent} == {"编译", "解码", "多进程"}
    assert rows["存取 中断再续 fp16"]["status"] == "✓"  # NPU 默认 fp16，带梯度缩放
    training = {measure["name"]: measure["value"] for measure in rows["速度 训练 fp16"]["measures"]}
    assert training["内存最高 GB"] == 3.0 and 0 < training["利用率 %"] < 1


def test_不理会autocast的卡查得出(root_dir):
    body = """
from minimind.selftest.numerics import eager_checks
from minimind.selftest.rows import run_check
import torch
for check in eager_checks(torch.device("npu:0")):
    if check.name.startswith("v2 左填充"):
        print(check.name.split()[-1], run_check(check).status)
"""
    path = os.pathsep.join([str(Path(__file__).parent), str(root_dir)])
    done = run_standin(body, STANDIN_AUTOCAST="0", PYTHONPATH=path)
    assert done.stdout.split() == ["fp32", "✓", "bf16", "✗", "fp16", "✗"], done.stderr[-3000:]


def test_没有bf16的卡不测bf16(monkeypatch):
    fake = type("npu", (), {"is_bf16_supported": staticmethod(lambda: False)})
    monkeypatch.setattr(numerics, "module_of", lambda device: fake)
    npu = type("Device", (), {"type": "npu"})()
    with pytest.raises(NotApplicable, match="没有 bf16"):
        numerics.require_precision("bf16", npu)
    numerics.require_precision("fp16", npu)


@pytest.mark.parametrize("terminal", [False, True])
def test_表里的数一个也不截断(terminal):
    """存进文件时按定好的宽度，在窄的终端里折行；右边的列都在。"""
    measures = [Measure(name, 1.2345e-13, high=1e-4) for name in ("损失差", "1−余弦", "梯度差")]
    rows = [ResultRow("前向反向", "MoE 左填充 fp16", "✓", measures, "很长的说明，" * 8, 123.4)]
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, color_system=None, width=70)
    show.print_table(rows, {"torch": "2.13"}, console)
    lines = file.getvalue().splitlines()
    assert "123.4 │" in file.getvalue() and "…" not in file.getvalue()
    assert {cell_len(line) for line in lines[3:]} == {cell_len(lines[-1])}
    assert cell_len(lines[-1]) <= (70 if terminal else show.FILE_WIDTH)
    if not terminal:
        assert file.getvalue().count("1.2e-13≤1e-4") == 3
