"""演示：一条命令走完全程，报告里的数字与回答对得上；没有终端就不等人。"""

import json
import os
import subprocess
import sys

import pytest

from minimind import demo, pace


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """跑一次最小的演示（子进程，stdin 关闭）。"""
    folder = tmp_path_factory.mktemp("demo")
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MINIMIND_CACHE": str(folder / "cache"),
        "PYTHONIOENCODING": "utf-8",
    }
    done = subprocess.run(
        [sys.executable, "-m", "minimind", "demo", "--fast", "--device", "cpu"],
        cwd=folder,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done


def test_产物齐全_不碰使用者的权重目录(finished):
    folder, _ = finished
    report = {path.name for path in (folder / "out" / "report").iterdir()}
    assert report == {
        "report.md",
        "report.json",
        "answers.jsonl",
        "pretrain.png",
        "full_sft.png",
        "tasks.png",
    }
    assert {path.name for path in (folder / "out").iterdir()} == {"demo", "report"}
    assert {path.name for path in folder.iterdir()} == {"out", "cache"}


def test_记分牌的数字能从全部回答里算出来(finished):
    folder, done = finished
    report = json.loads((folder / "out/report/report.json").read_text(encoding="utf-8"))
    answers = [
        json.loads(line) for line in (folder / "out/report/answers.jsonl").read_text("utf-8").splitlines()
    ]
    for task, entry in report["tasks"].items():
        scores = [a["score"] for a in answers if a["exam"] == "after_sft" and a["task"] == task]
        assert len(scores) == entry["items"]
        assert sum(score >= 1 for score in scores) / len(scores) == entry["after"]
    bpb = report["metrics"][0]
    assert bpb["after"] < bpb["before"], "哪怕只走几步，每字节比特数也该下降"
    assert f"{bpb['after']:.3f}" in done.stderr


def test_报告的图都在(finished):
    folder, _ = finished
    markdown = (folder / "out/report/report.md").read_text(encoding="utf-8")
    for name in ("pretrain.png", "full_sft.png", "tasks.png"):
        assert f"({name})" in markdown


def test_没有终端不打开对话_开始时报预计用时(finished):
    _, done = finished
    assert done.stdout == ""
    assert "全程预计" in done.stderr and "空行退出" not in done.stderr


def test_时钟_按已走完的快慢修正剩余():
    clock = pace.Clock({"a": 10.0, "b": 20.0, "c": 30.0})
    assert clock.left() == 60
    clock.actual["a"] = 15.0
    assert clock.left() == pytest.approx(75)


def test_每个任务取几题_跳过身份题():
    items = [{"kind": "chat", "task": t} for t in ("add", "add", "sub", "lora_identity")]
    items.append({"kind": "cloze", "task": "add"})
    assert [i["task"] for i in demo.pick_items(items, "chat", 1)] == ["add", "sub"]
    assert len(demo.pick_items(items, "chat", 0)) == 3


def test_线程数_多了反而慢就退回去(monkeypatch):
    import torch

    from minimind.trainer import device

    seconds = {1: 8.0, 2: 4.5, 4: 4.4}
    monkeypatch.setattr(pace, "available_cpus", lambda: 4)
    monkeypatch.setattr(device, "time_call", lambda call: seconds[torch.get_num_threads()])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert pace.pick_threads(lambda: None) == torch.get_num_threads() == 2
        seconds[4] = 2.5
        torch.set_num_threads(4)
        assert pace.pick_threads(lambda: None) == 4
        torch.set_num_threads(1)
        assert pace.pick_threads(lambda: None) == 1
    finally:
        torch.set_num_threads(before)
