"""一张卡上的全部目标：每一部分都走得通或说得出为什么没做，卡住的连同子孙杀掉，测到的留得下；不断言任何时间的长短。"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minimind.errors import UserError

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def card(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("card")


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("card_table")


def arguments(card, tmp_path, **changes):
    options = dict(device="cpu", quick=1, results=str(tmp_path / "results"), run_dir=str(tmp_path / "run"))
    return card.CardArguments(**(options | changes))


def command(tmp_path, *more: str) -> list[str]:
    return [
        sys.executable, str(BENCHMARKS / "card.py"), "--device", "cpu", "--quick", "1",
        "--results", str(tmp_path / "results"), "--run_dir", str(tmp_path / "run"), *more,
    ]  # fmt: skip


def saved(tmp_path) -> dict:
    (path,) = (tmp_path / "results").glob("card-quick-cpu-*.json")
    return json.loads(path.read_text(encoding="utf-8"))["parts"]


@pytest.mark.slow
def test_没有卡也把每一部分走一遍(card, tmp_path):
    """一个写错的名字会在卡上白费一分钟；除了缺可选的包、没有卡，不许有别的理由没做。"""
    done = subprocess.run(command(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    parts = saved(tmp_path)
    assert list(parts) == [part.name for part in card.PARTS]
    for name, found in parts.items():
        assert found["status"].startswith(("做完", "没有装")), (name, found["status"])
    assert parts["train_small"]["compiled"]["recompilations"] == 0
    assert parts["train_base"]["eager"]["tokens_per_second"] > 0
    assert parts["train_moe"]["time_over_dense"] > 0
    for size in ("small", "base", "moe"):  # 录制的路用替身走通，混合专家也在内
        for mode in ("plain", "recorded", "recorded_sampled"):
            assert set(parts[f"decode_{size}"][mode]) == {"1", "3"}
    assert 0 < parts["profile"]["compiled"]["useful_share"] < 1
    for side in ("ours", "public"):
        assert parts["road"][side]["pretrain_bpb"] > 0 and parts["road"][side]["sft_answers"]
    assert "训练 small，编译：占峰值" in done.stdout and "不评（不是卡）" in done.stdout


def test_只做几部分_并进已有的结果(tmp_path):
    for parts in ("matmul", "prompts"):
        subprocess.run(command(tmp_path, "--parts", parts), check=True, capture_output=True)
    found = saved(tmp_path)
    assert list(found) == ["environment", "matmul", "prompts"]
    assert found["matmul"]["tflops"] > 0 and found["prompts"]["tokens_per_second"] > 0
    assert found["environment"]["torch"] and found["environment"]["device"] == "cpu"


def test_不认识的部分是错误(card):
    with pytest.raises(UserError, match="没有叫 decode_smal 的部分"):
        card.chosen_parts("matmul,decode_smal")


# ---------------------------------------------------------------- 卡住、出错、缺包


HANG = """
import subprocess, sys, time
from pathlib import Path

def hang(card):
    card.note(half=1)
    child = subprocess.Popen(
        [sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"],
        start_new_session=True,
    )
    Path(card.folder, "pid").write_text(str(child.pid))
    time.sleep(600)

def wrong(card):
    card.note(half=2)
    raise ValueError("写错了")

def missing(card):
    import surely_not_installed

def optional(card):
    from card_parts import need
    need("surely_not_installed")
"""


@pytest.fixture
def run(card, tmp_path, monkeypatch):
    """在子进程里做 HANG 里的一部分。"""
    (tmp_path / "faulty.py").write_text(HANG, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    args = arguments(card, tmp_path)
    return lambda name, seconds=120.0: card.run_part(args, card.Part(name, name, "faulty", 1), seconds)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="子孙从 /proc 里找")
def test_卡住的连同另开会话的子孙一起杀掉_测到的留下(run, tmp_path):
    found = run("hang", 12.0)
    assert "被杀掉" in found["status"] and found["half"] == 1
    pid = int((tmp_path / "run" / "pid").read_text())
    deadline = time.monotonic() + 60
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


def test_出错的一部分说出是什么错_测到的留下(run):
    assert run("wrong") == {
        "status": "出错：ValueError: 写错了",
        "half": 2,
        "seconds": pytest.approx(60, abs=60),
    }


@pytest.mark.parametrize("name", ["missing", "optional"])
def test_缺可选的包说出缺哪个(run, name):
    assert run(name)["status"] == "没有装 surely_not_installed，没有做"


def test_没有安装项目也走得通_用的是这一份代码(tmp_path):
    (tmp_path / "minimind").mkdir()
    (tmp_path / "minimind" / "__init__.py").write_text("raise RuntimeError('别的一份')", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "card.py"), "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-1000:]
    assert "--minutes" in done.stdout


def test_没有装rich也走得通(tmp_path):
    """卡上的环境可能没有它：替身顶上，命令行、自检用到的都有。"""
    script = (
        "import sys, importlib.util as u\n"
        f"sys.path.insert(0, {str(BENCHMARKS / 'standin')!r})\n"
        "import rich\n"
        "assert rich.__file__.startswith(sys.path[0])\n"
        "from minimind.console import say, progress, track, console\n"
        "say('你好')\n"
        "assert list(track([1, 2], '走')) == [1, 2]\n"
        "from minimind.selftest.show import print_table\n"
        "import minimind.dataset.check, common\n"
        "common.print_table('题', ['甲', '乙'], [['一', 2]])\n"
    )
    path = os.pathsep.join([str(BENCHMARKS.parent), str(BENCHMARKS)])
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr[-1000:]
    assert "你好" in done.stderr and "一  2" in done.stdout


# ---------------------------------------------------------------- 表


def test_目标旁边是测到的_达到没有_没测的写明(table):
    results = {
        "environment": {"device": "cuda"},
        "train_small": {"compiled": {"share_of_peak": 0.36, "recompilations": 1}},
        "decode_small": {"recorded": {"1": 3999.0}},
    }
    rows = {row[0]: row[1:] for row in table.table_rows(results)}
    assert rows["训练 small，编译：占峰值"] == ("36.0%", "≥ 35.0%", "达到")
    assert rows["训练 small，编译：头一步之后又编译"] == ("1", "≤ 0", "没有达到")
    assert rows["解码 small，录制，1 条"] == ("3,999", "≥ 4,000", "没有达到")
    assert rows["服务，64 路：词元/秒"] == ("未测", "≥ 40,000", "未测")
    assert "解码 small，不录制，1 条" not in rows


def test_CPU上的数不与卡的目标比(table):
    rows = table.table_rows({"environment": {"device": "cpu"}, "selftest": {"failed": 0}})
    assert ("selftest：不对的项", "0", "≤ 0", "不评（不是卡）") in rows


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "矩阵乘"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNN", "矩阵乘"),
        ("aten::mm", "矩阵乘"),
        ("void flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "注意力"),
        ("triton_per_fused__to_copy_mean_mul_pow_rsqrt_3", "编译出的融合内核"),
        ("void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>", "拷贝与换精度"),
        ("void at::native::vectorized_elementwise_kernel<4, BinaryFunctor<MulFunctor>>", "逐元素"),
    ],
)
def test_内核的名字归到类(monkeypatch, name, kind):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    assert importlib.import_module("card_profile").kind_of(name) == kind
