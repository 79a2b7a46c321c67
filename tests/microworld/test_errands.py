"""差事：答案就是照那一种办法用真的工具得到的；训练与留出不相交；别的文件一个字节也不变。"""

from __future__ import annotations

import json
import random

import pytest

from minimind.inference.tool_calls import ToolCall
from minimind.microworld.core import HELDOUT, TRAIN
from minimind.microworld.stages import STAGE_COUNTS, Corpus
from minimind.microworld.tasks import build_tasks
from minimind.microworld.tasks.agent import CALCULATOR, CONVERT, FAMILIES, SEARCH, Errands
from minimind.rl.reward_agent import outcome
from minimind.tools.archive import archive
from minimind.tools.calculator import CALCULATOR as REAL_CALCULATOR
from minimind.tools.toolset import Toolset
from minimind.tools.units import UNITS

TASKS = build_tasks()
ERRANDS = Errands([task for task in TASKS.values() if task.level == "easy" and task.share.sft], 42)
KINDS = len(FAMILIES) + 1


def draw(number, side, seed=0):
    return ERRANDS.draw(random.Random(seed), number, side)


def test_工具的说明与真的一字不差():
    assert [REAL_CALCULATOR.schema(), UNITS.schema(), archive({}).schema()] == [CALCULATOR, CONVERT, SEARCH]


@pytest.mark.parametrize("kind", range(KINDS))
def test_照写着的办法走_真的工具给出同样的结果_回答得满分(kind):
    for seed in range(60):
        name, errand = draw(kind, (TRAIN, HELDOUT)[seed % 2], seed)
        row = errand.record(name)
        box = Toolset().for_record(row)
        for tool, arguments, result in errand.steps:
            got = json.loads(box.run(ToolCall(tool, json.dumps(arguments, ensure_ascii=False), "")))
            assert got == result, (errand.question, tool)
        assert outcome(row, errand.response) == 1, errand
        assert outcome(row, "不知道。") == 0 and outcome(row, "") == 0
        assert row["calls"] == len(errand.steps) and row["conversations"][-1]["content"] == ""
        assert row["gt"] == [errand.answer]


def test_查来的事不在题面里_背不下来():
    for kind in range(KINDS):
        for seed in range(40):
            _, errand = draw(kind, TRAIN, seed)
            if errand.lookup:
                assert errand.answer not in errand.question
                assert not any(
                    str(v) in errand.question for page in errand.lookup.values() for v in page.values()
                )


def test_训练与留出的题不相交_用不着工具的也是():
    corpus = Corpus(TASKS, 0.2, 42)
    keys = {side: {(n, e.key) for n, e in corpus.errands("agent", side)} for side in (TRAIN, HELDOUT)}
    sft = {(n, e.key) for n, e in corpus.errands("agent_sft", TRAIN)}
    shared = (keys[TRAIN] | sft) & keys[HELDOUT]
    assert not {pair for pair in shared if pair[0] != "agent_none"}
    assert len(list(corpus.errands("agent", TRAIN))) == round(STAGE_COUNTS["agent"] * 0.2)
    counts = [row["task"] for row in corpus.agent(HELDOUT)]
    assert {counts.count(name) for name in counts} == {len(counts) // KINDS}


def test_差事不进别的阶段():
    assert not {family.name for family in FAMILIES} & set(TASKS)
    assert "search" not in json.dumps(Corpus(TASKS, 0.02, 42).sft(TRAIN), ensure_ascii=False)
