"""各阶段基准的汇总：达到与否、差、缺什么说什么；曲线画得出来。"""

import sys
from types import SimpleNamespace

import pytest

from minimind.errors import UserError


@pytest.fixture(scope="module")
def bench_stages(root_dir):
    sys.path.insert(0, str(root_dir / "benchmarks"))
    import bench_stages

    yield bench_stages
    sys.path.remove(str(root_dir / "benchmarks"))


def test_目标的判定_看平均_可以看差(bench_stages):
    Goal, Outcome = bench_stages.Goal, bench_stages.Outcome
    stage = SimpleNamespace(
        GOALS=[
            Goal("new", "新", at_least=0.95),
            Goal("old", "旧", at_least=-0.03, change=True),
            Goal("size", "大小", at_most=0.1),
            Goal("plain", "只看", percent=False),
        ]
    )
    before = {"new": 0.0, "old": 0.80}
    outcomes = [
        Outcome({"new": 0.9, "old": 0.78, "size": 0.05, "plain": 2.0}),
        Outcome({"new": 1.0, "old": 0.75, "size": 0.05, "plain": 4.0}),
    ]
    rows = bench_stages.table_rows(stage, before, outcomes)
    assert rows[0] == ["新", "0.0 %", "95.0 %（90.0 %，100.0 %）", "+95.0", "≥ 95.0 % 达到"]
    assert rows[1][1:] == ["80.0 %", "76.5 %（75.0 %，78.0 %）", "-3.5", "差 ≥ -3.0 % 未达到"]
    assert rows[2][1:] == ["", "5.0 %（5.0 %，5.0 %）", "", "≤ 10.0 % 达到"]
    assert rows[3][1:] == ["", "3（2，4）", "", ""]


def test_没有的阶段与不完整的底座_说得清(bench_stages, tmp_path):
    with pytest.raises(UserError, match="lora"):
        bench_stages.load_stage("nope")
    assert {"lora", "reason"} <= set(bench_stages.stage_names())
    with pytest.raises(UserError, match=r"eval\.jsonl.*minimind demo"):
        bench_stages.Bench(bench_stages.StageArguments(base=str(tmp_path)))


def test_曲线存成_png(bench_stages, tmp_path):
    from stage_figure import draw_curves

    seeds = [{"loss": [[1, 3.0], [2, 1.0 + seed]]} for seed in range(2)]
    path = draw_curves(seeds, tmp_path / "a.png", title="t", log_y=True)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 150_000


def test_两种算法之差与标准误_手算(bench_stages):
    from plot_rl import difference

    gap, error = difference([1.0, 3.0], [2.0, 2.0, 5.0])  # 平均 2 与 3；方差 2 与 3，2/2 + 3/3 = 2
    assert gap == pytest.approx(-1) and error == pytest.approx(2**0.5)


@pytest.mark.parametrize("steps", [0, 30, 120])
@pytest.mark.parametrize("generations", [1, 8])
def test_强化学习的三种_采样的总数不超过预算_差不到一步(bench_stages, tmp_path, steps, generations):
    from stages import _rl

    (tmp_path / "rl.jsonl").write_text("{}\n" * 1500)
    bench = SimpleNamespace(world=tmp_path, args=SimpleNamespace(steps=steps))
    plan, per_step = _rl.schedule(bench, generations), 128 // generations
    one_round = [min(per_step, 1500 - start) for start in range(0, 1500, per_step)]  # 末步不满
    walked = (one_round * plan["epochs"])[: plan["max_steps"]]
    assert len(walked) == plan["max_steps"], "轮数不够走这么多步"
    assert 0 <= (steps or 60) * 128 - generations * sum(walked) < 128


def test_差事的对照_同样的题没有工具_判分不变(bench_stages):
    from stages._agent import one_turn

    from minimind.microworld import build_tasks
    from minimind.microworld.core import HELDOUT
    from minimind.microworld.stages import Corpus

    rows = Corpus(build_tasks(), 0.01, 42).agent(HELDOUT, 12)
    for row, plain in zip(rows, one_turn(rows), strict=True):
        assert [turn["role"] for turn in plain["conversations"]] == ["user", "assistant"]
        assert plain["conversations"][0] == row["conversations"][1] and "lookup" not in plain
        assert (plain["answer"], plain["grader"]) == (row["answer"], row["grader"])
