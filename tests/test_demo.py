"""演示：一条命令走完十个阶段，报告里的数字与回答对得上；坏了一段不连累别的；没有终端就不等人。"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from minimind import demo
from minimind.arguments import parse_args
from minimind.demo import pace
from minimind.demo.arguments import DemoArguments
from minimind.demo.base import pretrain_arguments
from minimind.demo.errands import agent_arguments, tuning_arguments
from minimind.demo.exam import pick_items
from minimind.demo.reinforce import grpo_arguments, ppo_arguments, spo_arguments
from minimind.demo.road import Road
from minimind.demo.stages import STAGES
from minimind.demo.tuning import dpo_arguments
from minimind.errors import UserError
from minimind.report.build import read_answers, write_answers
from minimind.report.report import Report
from minimind.runtime import device


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
        *("report.md", "report.json", "answers.jsonl", "scoreboard.png", "tasks.png", "rewards.png"),
        *("pretrain.png", "full_sft.png", "lora.png", "dpo.png", "distill.png", "reason.png"),
        *("ppo.png", "grpo.png", "spo.png", "agent.png"),
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
        scores = [a["score"] for a in answers if a["exam"] == "full_sft_chats" and a["task"] == task]
        assert len(scores) == entry["items"]
        assert sum(score >= 1 for score in scores) / len(scores) == entry["after"]
    bpb = report["metrics"][0]
    assert bpb["after"] < bpb["before"], "哪怕只走几步，每字节比特数也该下降"
    assert f"{bpb['after']:.3f}" in done.stderr


def test_报告的图都在(finished):
    folder, _ = finished
    markdown = (folder / "out/report/report.md").read_text(encoding="utf-8")
    for path in (folder / "out/report").glob("*.png"):
        assert f"({path.name})" in markdown


def test_每个阶段都在记分牌上_各有训练与留出的分数(finished):
    folder, _ = finished
    report = json.loads((folder / "out/report/report.json").read_text(encoding="utf-8"))
    titles = list(dict.fromkeys(metric["stage"] for metric in report["metrics"]))
    assert titles == [stage.title for stage in STAGES.values()]
    assert not report["failures"]
    assert set(titles) < set(report["facts"]), "每个阶段都报用时"


def test_没有终端不打开对话_开始时报预计用时(finished):
    _, done = finished
    assert done.stdout == ""
    assert "全程预计" in done.stderr and "空行退出" not in done.stderr


def test_时钟_按已走完的快慢修正剩余():
    clock = pace.Timetable({"a": 10.0, "b": 20.0, "c": 30.0}, 100.0)
    assert clock.left() == 60
    clock.actual["a"] = 15.0
    assert clock.left() == pytest.approx(75)


def test_走几成_恰好放得进时间_最少四成():
    """不动的 100 秒与随之变化的 1,000 秒。"""
    assert pace.fit_pace(lambda share: 100 + 1000 * share, 1200) == 1.0
    assert pace.fit_pace(lambda share: 100 + 1000 * share, 800) == pytest.approx(0.7, abs=0.01)
    assert pace.fit_pace(lambda share: 100 + 1000 * share, 10) == 0.3


def timed_road(tmp_path, minutes):
    """行数与 1 倍规模的微世界相同的演示，只排时间表，不训练。"""
    args = DemoArguments(out_dir=str(tmp_path), minutes=minutes)
    papers = SimpleNamespace(
        cloze=range(333),
        chats=range(743),
        easy=range(516),
        identity=range(60),
        multistep=range(238),
        errands=range(240),
    )
    (tmp_path / "sft.jsonl").write_text("\n" * 10_000, encoding="utf-8")
    rows = {"pretrain": 6430, "sft": 1980, "lora_identity": 200, "agent_sft": 1300, "dpo": 1200}
    return Road(args, tmp_path, papers, Report("演示"), rows=rows)


def walk_on_time(road, speed, slower=1.0, stages=STAGES):
    """假装照着走：每段的实际用时是估计的 ``slower`` 倍；返回全程的秒数与各段走了几成。"""
    clock = pace.Timetable({name: stage.tokens(road) / speed for name, stage in stages.items()}, speed)
    clock.elapsed = lambda: sum(clock.actual.values())
    shares = {}
    for name, stage in demo.on_time(road, stages, clock):
        shares[name] = road.pace
        clock.actual[name] = slower * stage.tokens(road) / speed
    return clock.elapsed(), shares


@pytest.mark.parametrize(("speed", "slower"), [(5100, 1.0), (5100, 1.1), (4000, 1.0), (7000, 1.3)])
def test_慢的机器上少走几步_全程不超过说好的分钟数(tmp_path, speed, slower):
    seconds, shares = walk_on_time(timed_road(tmp_path, 17), speed, slower)
    assert 0.85 * 17 * 60 < seconds < 18 * 60
    assert shares["pretrain"] > shares["reason"] - 0.02 and shares["reason"] < 1, "先省后面的"
    assert shares["ppo"] == shares["grpo"] == shares["spo"], "三种算法比的是同样多的采样"
    road = timed_road(tmp_path, 1.5)
    _, shares = walk_on_time(road, speed, slower, {name: STAGES[name] for name in ("grpo", "spo")})
    assert shares["grpo"] == shares["spo"] < 1, "没有 PPO 也一样"
    road.pace = 0.5
    assert pretrain_arguments(road).max_steps == 402 and ppo_arguments(road).max_steps == 22
    assert dpo_arguments(road).max_steps == 0
    # 最后一段不挤：调用的样子没有微调出来，强化学习就无从学起
    assert tuning_arguments(road).max_steps == 0 and agent_arguments(road).max_steps == 10


def test_先保住预训练与微调_再保住强化学习(tmp_path):
    """慢一点：蒸馏与推理少走；再慢，它们省到一半之后强化学习才省；再慢，强化学习也省到一半之后底子才省。"""
    _, slow = walk_on_time(timed_road(tmp_path, 17), 7500)
    assert slow["pretrain"] == 1 and slow["ppo"] > 0.97 > slow["reason"] > 0.5
    _, slower = walk_on_time(timed_road(tmp_path, 17), 6500)
    assert (
        slower["pretrain"]
        == slower["sft"]
        == 1
        > slower["ppo"]
        > slower["reason"]
        == pytest.approx(0.5, abs=0.05)
    )
    _, slowest = walk_on_time(timed_road(tmp_path, 17), 4000)
    assert slowest["pretrain"] < 1 and slowest["ppo"] < 0.55


@pytest.mark.parametrize(("speed", "minutes"), [(12_000, 17), (2000, 0)])
def test_快的机器与不限时间的_各段走满(tmp_path, speed, minutes):
    road = timed_road(tmp_path, minutes)
    _, shares = walk_on_time(road, speed)
    assert set(shares.values()) == {1.0}
    assert pretrain_arguments(road).max_steps == 0 and ppo_arguments(road).max_steps == 45


def test_每个任务取几题_跳过身份题():
    tasks = (("add", "easy"), ("add", "easy"), ("sort", "hard"), ("lora_identity", "lora"))
    items = [{"kind": "chat", "task": task, "level": level} for task, level in tasks]
    items.append({"kind": "cloze", "task": "add", "level": "easy"})
    assert [i["task"] for i in pick_items(items, "chat", 1)] == ["add", "sort"]
    assert len(pick_items(items, "chat", 0)) == 3
    assert [i["task"] for i in pick_items(items, "chat", 0, ("lora",))] == ["lora_identity"]


def test_坏了一段_别的照走_报告说清(finished, monkeypatch, tmp_path, capsys):
    """接着上一次的权重只走两段，前一段出错。"""

    def broken(road):
        road.score("考了一半", "half", None, 1.0)
        raise RuntimeError("显存不够")

    folder, _ = finished
    monkeypatch.setitem(STAGES, "lora", replace(STAGES["lora"], run=broken))
    out, report = str(folder / "out/demo"), tmp_path / "report"
    code = demo.main(
        ["--fast", "--device", "cpu", "--stages", "lora,dpo"]
        + ["--out_dir", out, "--report_dir", str(report)]
    )
    assert code == 2
    data = json.loads((report / "report.json").read_text(encoding="utf-8"))
    assert list(dict.fromkeys(metric["stage"] for metric in data["metrics"])) == ["DPO"]
    assert "RuntimeError：显存不够" in data["failures"]["LoRA"]
    assert "没有走完的阶段" in (report / "report.md").read_text(encoding="utf-8")
    said = capsys.readouterr().err
    assert f"minimind demo --stages lora --out_dir {out}" in said
    assert "RuntimeError" in (folder / "out/demo/logs/lora.error.txt").read_text(encoding="utf-8")


def test_补一段_别的段的成绩_图_回答都还在(finished, tmp_path, capsys, monkeypatch):
    folder, _ = finished
    report = tmp_path / "report"
    shutil.copytree(folder / "out/report", report)
    old, answers = (report / name for name in ("report.json", "answers.jsonl"))
    before = json.loads(old.read_text("utf-8"))
    stranger = {**before["metrics"][0], "stage": "别的版本的一段"}
    old.write_text(json.dumps({**before, "metrics": [*before["metrics"], stranger]}), "utf-8")
    lines = answers.read_text("utf-8").splitlines()
    words = ["--fast", "--device", "cpu", "--out_dir", str(folder / "out/demo"), "--report_dir", str(report)]
    assert demo.main([*words, "--stages", "dpo"]) == 0
    after = json.loads(old.read_text("utf-8"))
    assert [m["name"] for m in after["metrics"]] == [m["name"] for m in before["metrics"]], "次序也照课表"
    for one, other in zip(before["metrics"], after["metrics"]):
        assert one["stage"] == "DPO" or one == other
    assert after["tasks"] == before["tasks"] and after["figures"] == before["figures"]
    assert set(before["facts"]) == set(after["facts"]) and after["facts"]["LoRA"] == before["facts"]["LoRA"]
    exams = {json.loads(line)["exam"] for line in lines}
    now = answers.read_text("utf-8").splitlines()
    assert {json.loads(line)["exam"] for line in now} == exams and len(now) == len(lines)
    said = capsys.readouterr().err
    assert "别的几段（预训练、微调、LoRA、蒸馏、推理、PPO、GRPO、SPO、差事）的成绩" in said
    # 三种强化学习的曲线画在一起：补一种，另两种从日志里找回来
    drawn = []
    monkeypatch.setattr("minimind.demo.road.plot_rewards", lambda curves, *rest: drawn.append(sorted(curves)))
    assert demo.main([*words, "--stages", "grpo"]) == 0
    assert drawn == [["GRPO", "PPO", "SPO"]]
    # 重走微调：从它开始的各段作废，预训练的还在；旧的一份改名留着
    shutil.copytree(folder / "out/demo", tmp_path / "demo")
    moved = [*words[:3], "--out_dir", str(tmp_path / "demo"), *words[5:]]
    held = {**before, "facts": {**before["facts"], "权重目录": str(tmp_path / "demo")}}
    old.write_text(json.dumps(held), "utf-8")
    answers.write_text("\n".join(lines) + '\n{"exam": "断在半截', "utf-8")
    assert demo.main([*moved, "--stages", "sft"]) == 0
    last = json.loads(old.read_text("utf-8"))
    assert {m["stage"] for m in last["metrics"]} == {"预训练", "微调"} and "dpo.png" not in last["figures"]
    assert all(m["before"] is not None for m in last["metrics"] if m["stage"] == "微调")
    assert json.loads((report / "old_report.json").read_text("utf-8")) == held
    assert "从重走的权重开始的几段作废" in capsys.readouterr().err
    # 换了种子、目录就不是同一次演示
    for name in ("种子与规模", "权重目录"):
        held = {**before, "facts": {**before["facts"], name: "别的"}}
        old.write_text(json.dumps(held), "utf-8")
        assert demo.main([*words, "--stages", "dpo"]) == 0
        assert {m["stage"] for m in json.loads(old.read_text("utf-8"))["metrics"]} == {"DPO"}
        assert json.loads((report / "old_report.json").read_text("utf-8")) == held
        assert "不是同一次演示" in capsys.readouterr().err


def test_回答里有行分隔符的_读回来还是一行(tmp_path):
    item = {"task": "t", "prompt": "问", "question": "问", "answer": "答"}
    told = SimpleNamespace(item=item, response="甲\u2028乙\x85丙", score=1.0)
    path = tmp_path / "answers.jsonl"
    write_answers(path, {"a": [told], "b": [told]})
    with path.open("a", encoding="utf-8") as file:
        file.write('{"exam": "c", "断')
    kept = read_answers(path)
    assert [json.loads(line)["exam"] for line in kept] == ["a", "b"]
    write_answers(path, {"b": []}, kept)
    assert [json.loads(line)["response"] for line in read_answers(path)] == ["甲\u2028乙\x85丙"]


@pytest.mark.parametrize(
    "text",
    [
        None,
        "{",
        "[]",
        '{"title": "x"}',
        '{"title": "x", "metrics": [], "samples": [], "facts": []}',
        '{"metrics": [{"不认识": 1}], "samples": []}',
    ],
)
def test_读不成的旧报告当作没有(tmp_path, text):
    if text is not None:
        (tmp_path / "report.json").write_text(text, "utf-8")
    assert Report.load(tmp_path) is None


def test_只补几段的命令_带着这一次的尺寸与目录():
    args = DemoArguments(preset="small", out_dir="我的 演示", report_dir="报告", seed=7, fast=1)
    again = demo.again_command(args, ["lora", "dpo"])
    assert again == (
        "minimind demo --stages lora,dpo --out_dir '我的 演示' --seed 7 --report_dir '报告' --preset small --fast 1"
    )
    parsed = parse_args(DemoArguments, shlex.split(again)[2:])
    assert replace(parsed, stages="all") == args
    assert demo.again_command(DemoArguments(), ["spo"]) == "minimind demo --stages spo --out_dir out/demo"


@pytest.mark.parametrize("leaving", [KeyboardInterrupt, SystemExit])
def test_中途停下_说出接着走的命令(monkeypatch, tmp_path, capsys, leaving):
    """训练自己说的“加 --from_resume 1”在演示里用不上。"""

    def stop(road, name, stage):
        if name == "dpo":
            raise leaving(130)

    clock = pace.Timetable({"lora": 1.0, "dpo": 1.0, "spo": 1.0}, 1.0)
    road = SimpleNamespace(
        report=Report("x"), write_report=lambda: None, folder=lambda: tmp_path / "乙", pace=1.0
    )
    monkeypatch.setattr(demo, "open_road", lambda args: road)
    monkeypatch.setattr(demo, "plan", lambda *_: clock)
    monkeypatch.setattr(demo, "on_time", lambda road, stages, clock: stages.items())
    monkeypatch.setattr(demo, "walk", stop)
    args = DemoArguments(stages="lora,dpo,spo", out_dir=str(tmp_path / "甲"), report_dir=str(tmp_path / "乙"))
    with pytest.raises(leaving):
        demo.run(args)
    said = capsys.readouterr().err
    assert "停在“DPO”" in said and "--stages dpo,spo" in said and "乙" in said


@pytest.mark.parametrize("flag", ["--out_dir", "--report_dir"])
def test_目录写不了_动手之前就说(tmp_path, monkeypatch, capsys, flag):
    """报告要到第一段走完才写：那时才知道写不了，十几分钟就白走了。"""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "文件").touch()
    monkeypatch.setattr(demo, "open_road", lambda args: pytest.fail("已经动手了"))
    assert demo.main(["--fast", flag, "文件"]) == 2
    error = capsys.readouterr().err
    assert f"错误：{flag}" in error and "可写的目录" in error


def test_起点没走完_后面的不用旧权重充数(finished, monkeypatch, tmp_path):
    folder, _ = finished
    road = demo.open_road(DemoArguments(fast=1, out_dir=str(folder / "out/demo")))
    demo.require_start(road, "sft")
    road.report.failures["微调"] = "坏了"
    with pytest.raises(UserError, match="起点“微调”没有走完"):
        demo.require_start(road, "sft")
    road.args.out_dir = str(tmp_path)
    with pytest.raises(UserError, match="--stages 里加上 pretrain"):
        demo.require_start(road, "pretrain")


def test_阶段的名字_按课表排_写错了说有哪些():
    assert DemoArguments(stages="spo, lora").chosen_stages() == ["lora", "spo"]
    assert len(DemoArguments().chosen_stages()) == 10
    for wrong in ("grppo", ""):
        with pytest.raises(UserError, match="--stages"):
            DemoArguments(stages=wrong).chosen_stages()


def test_强化学习三段采样的条数相同(finished):
    folder, _ = finished
    road = demo.open_road(DemoArguments(out_dir=str(folder / "out/demo"), scale=0.01, device="cpu"))
    budgets = {
        (a.batch_size * a.accumulation_steps * a.num_generations, a.max_steps, a.max_gen_len)
        for a in (make(road) for make in (ppo_arguments, grpo_arguments, spo_arguments))
    }
    assert len(budgets) == 1


def test_线程数_多了反而慢就退回去(monkeypatch):
    import torch

    seconds = {1: 8.0, 2: 4.5, 4: 4.4}
    monkeypatch.setattr(device, "available_cpus", lambda: 4)
    monkeypatch.setattr(device, "time_call", lambda call: seconds[torch.get_num_threads()])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert device.pick_threads(lambda: None) == torch.get_num_threads() == 2
        seconds[4] = 2.5
        torch.set_num_threads(4)
        assert device.pick_threads(lambda: None) == 4
        torch.set_num_threads(1)
        assert device.pick_threads(lambda: None) == 1
    finally:
        torch.set_num_threads(before)


def test_每一行都有解释_一行不漏(finished):
    """源码里每一处 ``road.score(…)`` 的短名都有解释，解释里没有多出来的。"""
    import ast
    from pathlib import Path

    from minimind.demo.explain import EXPLANATIONS

    names = set()
    for path in Path(demo.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "score":
                names.add(ast.unparse(node.args[1]))
    expected = {ast.literal_eval(name) for name in names if not name.startswith("f")}
    filled = {"{level}": ("easy", "hard"), "{name}": ("ppo", "grpo", "spo")}
    for name in (name[2:-1] for name in names if name.startswith("f")):
        ((hole, words),) = [(hole, words) for hole, words in filled.items() if hole in name]
        expected |= {name.replace(hole, word) for word in words}
    assert expected == set(EXPLANATIONS)
    for text in EXPLANATIONS.values():
        assert 15 <= len(text) <= 140 and text.endswith("。")

    folder, done = finished
    report = json.loads((folder / "out/report/report.json").read_text("utf-8"))
    markdown = (folder / "out/report/report.md").read_text("utf-8")
    assert "### 这些数是什么意思" in markdown
    for metric in report["metrics"]:
        assert metric["explanation"] == EXPLANATIONS[metric["english"]]
        assert markdown.count(f"**{metric['stage']}｜{metric['name']}**") == 1
    assert "minimind demo --explain last" in done.stderr


def test_解释上一次的_什么也不训练(finished, capsys, tmp_path):
    folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*")}
    assert demo.main(["--explain", "last", "--report_dir", str(folder / "out/report")]) == 0
    said = capsys.readouterr().err
    report = json.loads((folder / "out/report/report.json").read_text("utf-8"))
    for metric in report["metrics"]:
        assert f"{metric['stage']}｜{metric['name']}：" in said and metric["explanation"] in said
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*")}
    assert demo.main(["--explain", "last", "--report_dir", str(tmp_path)]) == 2
    assert "还没有成绩单" in capsys.readouterr().err
    (tmp_path / "report.json").write_text("[]", "utf-8")
    assert demo.main(["--explain", "last", "--report_dir", str(tmp_path)]) == 2
    assert "读不了这份成绩单" in capsys.readouterr().err


def test_报告里有训练途中的样例与采样的回答(finished):
    folder, _ = finished
    report = json.loads((folder / "out/report/report.json").read_text("utf-8"))
    assert {"pretrain_192", "full_sft_192"} <= set(report["timelines"])
    assert all(len(report["rollouts"][f"{name}_192"]) == 3 for name in ("grpo", "spo"))
    markdown = (folder / "out/report/report.md").read_text("utf-8")
    assert "## pretrain_192：同样的提示，训练途中怎么答" in markdown
