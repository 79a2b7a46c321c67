"""照着计划跑：机器变快变慢就改步数，差得不多不动；命令行从头到尾真的跑一次。"""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from minimind.arguments import parse_args
from minimind.plan.follow import corrected
from minimind.plan.planning import Batch, Costs, Leg, schedule_flags, set_steps
from minimind.plan.show import paced
from minimind.recipes.pretrain import PretrainArguments

BATCH = Batch(4)
COSTS = Costs(start=10.0, tokenize=0.0, step=1.0, samples=1.0, save=0.0)


def leg(steps: int) -> Leg:
    words = ["pretrain", "--batch_size", "4", *schedule_flags(steps, 4, 0.5)]
    return Leg("预训练", words, steps, steps * 2048, 0.5, float(steps), 4, 32)


def points(step_seconds: float, until: float) -> list[tuple[float, int]]:
    return [(n * step_seconds, n) for n in range(1, int(until / step_seconds) + 1)]


def test_照计划的快慢就不动():
    assert corrected(leg(580), points(1.0, 240), 360, 600, COSTS, BATCH) is None


@pytest.mark.parametrize("pace", [0.5, 2.0])
def test_变快变慢_换的步数正好用完剩下的时间(pace):
    seen = points(pace, 240)
    new = corrected(leg(580), seen, 360, 600, COSTS, BATCH)
    assert new is not None
    left = (new.steps - seen[-1][1]) * pace + pace * (
        COSTS.start + COSTS.validation(32, BATCH) + COSTS.samples
    )
    assert left == pytest.approx(360, abs=2 * pace)
    assert new.tokens == new.steps * 2048
    args = parse_args(PretrainArguments, new.words[1:])
    assert args.max_steps == new.steps and args.batch_size == 4
    assert args.eval_interval * 4 >= new.steps


def test_来不及了也走得完最后几步():
    new = corrected(leg(580), points(4.0, 590), 5, 600, COSTS, BATCH)
    assert new is not None and 147 < new.steps < 160


@pytest.mark.parametrize("seen", [[], [(3.0, 10)], [(3.0, 10), (3.0, 10)]])
def test_还没看到快慢就不动(seen):
    assert corrected(leg(580), seen, 100, 600, COSTS, BATCH) is None


# ---- 从命令行 ----


@pytest.fixture(scope="module")
def command(root_dir, tmp_path_factory):
    """在一个空目录里运行 ``minimind plan``。"""
    folder = tmp_path_factory.mktemp("plan")
    env = {**os.environ, "PYTHONPATH": str(root_dir), "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
    env["MINIMIND_CACHE"] = str(folder / "cache")

    def run(*words: str):
        return folder, subprocess.run(
            [sys.executable, "-m", "minimind", "plan", *words],
            cwd=folder,
            env=env,
            capture_output=True,
            text=True,
            encoding="utf-8",
        )

    return run


def test_画出来接着跑_真的跑完_记下实际的(command):
    """不看用了多久，只看真的跑完、记得全。"""
    folder, _ = command("--help")
    lines = [
        {"text": f"第{n}天，{n * 7919 % 37}度，风向{n * 31 % 8}，记在本子第{n % 97}页。" * 9}
        for n in range(900)
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / "日记.jsonl").write_text(text, "utf-8")
    words = ["--go", "1", "--device", "cpu", "--preset", "tiny", "--data_path", "日记.jsonl"]
    _, done = command("--minutes", "0.4", *words)
    while done.returncode == 2 and "太短" in done.stderr:  # 机器正忙，照它说的来
        least = float(done.stderr.split("至少 ")[1].split("；")[0])
        _, done = command("--minutes", f"{1.5 * least:g}", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    plan = json.loads((folder / "out/plan/plan.json").read_text("utf-8"))
    assert all(line in done.stdout for line in plan["commands"])
    assert "照抄就能跑" in done.stdout and "不保证" in done.stdout and "要的是" in done.stderr
    actual = plan["actual"]
    assert len(actual["steps"]) == 1 and actual["bpb"] > 0 and actual["seconds"] > 0
    assert (folder / "out/plan/pretrain_192.pth").is_file()
    log = [
        json.loads(line) for line in (folder / "out/plan/logs/pretrain_192.jsonl").read_text().splitlines()
    ]
    assert max(record["step"] for record in log) == actual["steps"][0]


def test_中途改步数_存盘续训_走到新的步数(root_dir, tmp_path, monkeypatch):
    """真的训练：看表时换一个步数，日志一直走到新的步数。"""
    from minimind.plan import follow as module

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(root_dir))
    lines = [{"text": f"第{n}天，风向{n * 31 % 8}，记在本子第{n % 97}页。" * 9} for n in range(300)]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (tmp_path / "日记.jsonl").write_text(text, "utf-8")
    flags = (
        "--hidden_size 32 --num_hidden_layers 1 --max_seq_len 64 --batch_size 2 --log_interval 1 --device cpu"
    )
    flags += " --dtype float32 --val_ratio 0 --sample_prompts 0 --save_dir out --checkpoint_dir out/ck"
    words = ["pretrain", "--data_path", "日记.jsonl", *flags.split(), *schedule_flags(100_000, 4, 500)]
    long = Leg("预训练", words, 100_000, 1, 500.0, 1e6, 4, 32)

    def shorter(stage, seen, *_):
        return (
            set_steps(stage, seen[-1][1] + 150, BATCH) if stage.steps == 100_000 and len(seen) > 1 else None
        )

    monkeypatch.setattr(module, "corrected", shorter)
    monkeypatch.setattr(module, "CHECKS", tuple(n / 1000 for n in range(1, 1000)))
    done = module.follow(long, 600.0, tmp_path / "out", COSTS, BATCH)
    assert done.steps < 100_000
    log = [json.loads(line) for line in (tmp_path / "out/logs/pretrain_32.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in log if "loss" in record]
    assert steps == list(range(1, done.steps + 1))


def test_后一段照前一段的快慢改步数():
    first, second = leg(400), leg(100)
    plan = SimpleNamespace(batch=BATCH)
    assert paced(second, 100.0, [], [], plan) is second
    assert paced(second, 100.0, [first], [400.0], plan) is second
    slow = paced(second, 100.0, [first], [800.0], plan)
    assert slow.steps == 48 and slow.steps % slow.validations == 0
    assert paced(second, 50.0, [first], [200.0], plan).steps == 100


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--minutes", "0.05"], "太短"),
        (["--minutes", "0"], "--minutes"),
        (["--minutes", "1e9"], "--minutes"),
        (["--minutes", "nan"], "--minutes"),
        (["--device", "RTX 9999"], "RTX 4090"),
        (["--device", "cuda:77"], "本机"),
        (["--memory_gb", "0.1"], "放不下"),
        (["--memory_gb", "1", "--preset", "base", "--device", "H100"], "放不下"),
        (["--device", "H100", "--go", "1"], "不在这台机器上"),
        (["--data_path", "没有.jsonl"], "没有.jsonl"),
        (["--save_dir", "/proc/plan"], "--save_dir"),
    ],
)
def test_坏的输入是一句话(command, words, said):
    _, done = command("--device", "cpu", *words)
    errors = [line for line in done.stderr.splitlines() if line.startswith("错误：")]
    assert done.returncode == 2 and len(errors) == 1, done.stderr
    assert said in errors[0] and "Traceback" not in done.stderr


SLOW_TO_SAVE = """
import pathlib, signal, sys, time
got = []
signal.signal(signal.SIGINT, lambda *_: got.append("INT"))
signal.signal(signal.SIGTERM, lambda *_: got.append("TERM"))
pathlib.Path("起来了").touch()
while not got:
    time.sleep(0.05)
time.sleep(7)  # 存盘：比命令自己的耐心（4 秒）久
pathlib.Path("checkpoints").mkdir()
pathlib.Path("checkpoints/pretrain_192_resume.pth").touch()
pathlib.Path("存完了").write_text(",".join(got))
sys.exit(130 if "INT" in got else 143)
"""
GOING = """
import pathlib, subprocess, sys
from minimind.errors import guard
from minimind.plan import follow, show
from minimind.plan.planning import Batch, Costs, Leg, Plan, schedule_flags
from minimind.plan.quality import Estimate

def leg(command):
    return Leg(command, [command, *schedule_flags(400, 4, 0.5)], 400, 400, 0.5, 400.0, 4, 32)

real = subprocess.Popen
follow.subprocess.Popen = lambda words, **options: real([sys.executable, "训练.py"], **options)
plan = Plan("tiny", 1, 1e6, Batch(4), Costs(10.0, 0.0, 1.0, 1.0, 0.0), None, [leg("pretrain"), leg("sft")],
            Estimate(1, 1, 1, "zh", True, True), {"place": "cpu"}, [])

@guard
def main():
    show.go(plan, None, pathlib.Path("."))

sys.exit(main())
"""


@pytest.mark.skipif(os.name == "nt", reason="POSIX 的信号")
@pytest.mark.parametrize("to_group", [False, True])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_退出信号恰好转给训练一次_等它存完盘_说出怎么接着走(root_dir, tmp_path, name, to_group):
    """只给了计划（kill、编辑器的停止），或连训练一起给了（终端的 Ctrl-C）：训练都只收到一次，也不会等到一半被结束。"""
    (tmp_path / "训练.py").write_text(SLOW_TO_SAVE, "utf-8")
    (tmp_path / "计划.py").write_text(GOING, "utf-8")
    process = subprocess.Popen(
        [sys.executable, "计划.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root_dir), "PYTHONIOENCODING": "utf-8"},
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "起来了").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    signum = getattr(signal, name)
    os.killpg(process.pid, signum) if to_group else process.send_signal(signum)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 128 + signum, error.decode()
    assert (tmp_path / "存完了").read_text() == name.removeprefix("SIG")
    said = error.decode()
    assert "接着走，照抄" in said and "Traceback" not in said
    first, second = (line.strip() for line in said.splitlines() if line.startswith("  minimind"))
    assert first.startswith("minimind pretrain") and first.endswith("--from_resume 1")
    assert second.startswith("minimind sft") and "--from_resume" not in second
