"""SPO：记分牌在策略走完之后才更新、各进程相同、随存档走；优势按全批白化。"""

from __future__ import annotations

import pytest
import torch
from recipe_cases import CASES, run_recipe, saved
from rl_cases import learns, train_here, write_reward
from trainer_helpers import in_processes

from minimind.errors import UserError
from minimind.recipes import spo
from minimind.recipes.spo import SPOArguments, reward_range
from minimind.rl.rewards import build_rewards
from minimind.rl.tracker import PromptTracker
from minimind.runtime import distributed
from minimind.trainer import loop

ONCE = {"num_generations": 1, "log_interval": 1, "save_interval": 0, "eval_interval": 0}


def test_奖励上升(home, world):
    lines = learns("spo", home, world, num_generations=1, accumulation_steps=4, reward_low=0, reward_high=1)
    assert all({"tracker_value", "tracker_bias", "tracker_explained"} <= set(line) for line in lines)
    assert lines[0]["tracker_value"] == pytest.approx(0.5)  # 没有先验


def test_先用旧的把握算优势_策略更新之后才记分(home, world, monkeypatch):
    """记下每次记分与每次更新权重的先后。"""
    events = []
    update, step = PromptTracker.update, loop.update_weights
    monkeypatch.setattr(
        PromptTracker, "update", lambda self, *a: events.append(f"记 {a[0]}") or update(self, *a)
    )
    monkeypatch.setattr(loop, "update_weights", lambda *a: events.append("更新") or step(*a))
    train_here("spo", home, world, max_steps=2, **ONCE)
    kinds = [event.split()[0] for event in events]
    assert kinds == ["更新", *["记"] * 4, "更新", *["记"] * 4]


def test_见过的提示才有_D_走远了_D_大(home, world, monkeypatch):
    """十五道题、每步十二道：第三步多半见过（一轮之末的第二步只剩三道）；学习率为零时 D = 0。"""
    found = {}
    original = spo.divergences
    for rate in (0.0, 1e-2):
        seen = found.setdefault(rate, [])

        def record(run, tracker, experience, seen=seen):
            change = original(run, tracker, experience)
            seen.append(change)
            assert set(change) == {p for p in experience.prompts if p in tracker.previous}
            return change

        monkeypatch.setattr(spo, "divergences", record)
        options = {**ONCE, "learning_rate": rate, "accumulation_steps": 6, "reward": write_reward(home)}
        train_here("spo", home, world, max_steps=3, reward_low=0, reward_high=1, temperature=0.1, **options)
    assert found[0.0][0] == {} and len(found[0.0][2]) >= 6
    assert max(found[0.0][2].values()) < 1e-4 < 0.01 < max(found[1e-2][2].values())


def test_训练前采样定起点(home, world):
    train_here("spo", home, world, max_steps=1, offline_samples=3, **ONCE)
    tracker = saved(home, CASES["spo"])["recipe_state"]["tracker"]
    visited = set(tracker["prompts"].tolist())
    weight = tracker["alpha"] + tracker["beta"]
    for prompt, value in enumerate(weight.tolist()):
        assert value == pytest.approx(0.96 * 8 + 1 if prompt in visited else 8)


def keep_tracker(**kwargs):
    """训练结束时每个进程各存一份记分牌。"""
    original = loop.finish

    def finish(run):
        state = run.recipe.extra_state["tracker"].state_dict()
        torch.save(state, kwargs["folder"] / f"tracker{distributed.rank()}.pt")
        return original(run)

    loop.finish = finish
    run_recipe(**kwargs)


def test_两个进程的记分牌逐位相同_抽的提示不重复(home, world):
    case = CASES["spo"]
    argv = case.argv(world, max_steps=4, reward=write_reward(home), reward_low=0, reward_high=1, **ONCE)
    codes = in_processes(2, keep_tracker, log=home / "log", case=case, folder=home, argv=argv)
    assert codes == [0, 0], (home / "log").read_text()[-2000:]
    a, b = (torch.load(home / f"tracker{rank}.pt", weights_only=True) for rank in (0, 1))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    # 每步 2 进程 × 2 × 2 个提示，四步十六次观察；每次观察使总分量大约加一
    assert len(a["prompts"]) >= 8


def test_奖励的范围(tmp_path):
    low, high = reward_range(SPOArguments(), build_rewards("auto:1,length:0.5"))
    assert (low, high) == (-0.5, 1)
    assert reward_range(SPOArguments(reward_high=2), build_rewards("auto")) == (0, 2)
    unknown = build_rewards(write_reward(tmp_path))
    assert reward_range(SPOArguments(reward_low=0, reward_high=1), unknown) == (0, 1)
    with pytest.raises(UserError, match="reward_low"):
        reward_range(SPOArguments(), unknown)
    with pytest.raises(UserError, match="reward_low"):
        reward_range(SPOArguments(reward_low=1, reward_high=1), unknown)
