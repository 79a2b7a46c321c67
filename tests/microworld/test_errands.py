"""差事：答案就是照那一种办法用真的工具得到的；训练与留出不相交；别的文件一个字节也不变。"""

from __future__ import annotations

import json
import random

import pytest

from minimind.inference.tool_calls import ToolCall
from minimind.microworld.core import HELDOUT, TRAIN
from minimind.microworld.stages import AGENT_REVIEW, STAGE_COUNTS, Corpus
from minimind.microworld.tasks import build_tasks
from minimind.microworld.tasks.agent import (
    CALCULATOR,
    CONVERT,
    FAMILIES,
    FIELDS,
    LETTERS,
    SEARCH,
    Errands,
    draw_name,
    draw_page,
)
from minimind.microworld.tasks.dialogue import SURNAMES
from minimind.rl.reward_agent import outcome
from minimind.tokenizer import load_tokenizer
from minimind.tokenizer.render import tools_of
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
    keys = {side: {(n, e.key) for n, e in corpus.agent_examples(side)} for side in (TRAIN, HELDOUT)}
    assert not {pair for pair in keys[TRAIN] & keys[HELDOUT] if pair[0] != "agent_none"}
    asked = {
        turn["content"]
        for row in corpus.agent_sft(TRAIN)
        if row["conversations"][0]["role"] == "system"
        for turn in row["conversations"]
        if turn["role"] == "user"
    }
    plain = [e for n, e in corpus.agent_examples(HELDOUT) if n in ("agent_times", "agent_units")]
    assert len(plain) == 80 and not asked & {e.question for e in plain}
    assert len(list(corpus.agent_examples(TRAIN))) == round(STAGE_COUNTS["agent"] * 0.2)
    counts = [row["task"] for row in corpus.agent(HELDOUT)]
    assert {counts.count(name) for name in counts} == {len(counts) // KINDS}


def test_要抄的字_各是一个词元_预训练里抄过_拼不出题面里的字():
    """预训练没见过的字是几个字节，小模型抄错一个就查不到。"""
    tokenizer = load_tokenizer()
    seen = "".join(row["text"] for row in Corpus(TASKS, 0.2, 42).pretrain(TRAIN))
    for seed in range(200):
        rng = random.Random(seed)
        (word,) = draw_page(rng).values()
        for text in (draw_name(rng), word):
            assert len(tokenizer.encode(text, add_special_tokens=False)) <= 2
            assert all(letter in seen for letter in text)
    assert not set(LETTERS) & (set(SURNAMES) | {field[0] for field in FIELDS})


def lessons(count=600):
    """监督微调里的差事：``[(给出的工具名, 各件的回合), …]``。"""
    rng = random.Random(1)
    for number in range(count):
        system, *turns = ERRANDS.lesson(rng, number, TRAIN)["conversations"]
        starts = [i for i, turn in enumerate(turns) if turn["role"] == "user"]
        names = {tool["function"]["name"] for tool in json.loads(system["tools"])}
        yield names, [turns[a:b] for a, b in zip(starts, [*starts[1:], len(turns)])]


def test_微调的一段_接着问几件_只调用给出的工具_每次调用都有结果():
    for names, asked in lessons():
        assert len(asked) >= 2
        for turns in asked:
            calls = [
                call for turn in turns if "tool_calls" in turn for call in json.loads(turn["tool_calls"])
            ]
            results = [turn for turn in turns if turn["role"] == "tool"]
            assert len(calls) == len(results) <= 2 and {call["name"] for call in calls} <= names
            assert turns[-1]["role"] == "assistant" and turns[-1]["content"]


def test_微调里两步的差事_两成走完_一步的都走完():
    """剩下的是强化学习要自己发现的。"""
    refused = [
        turns
        for _, asked in lessons()
        for turns in asked
        if any('"error"' in turn["content"] for turn in turns)
    ]
    whole = sum(len(turns) == 6 for turns in refused)
    assert {len(turns) for turns in refused} == {4, 6} and 0.1 < whole / len(refused) < 0.3


def test_微调里有普通问答的复习_份数写在一处():
    rows = Corpus(TASKS, 0.1, 42).agent_sft(TRAIN)
    count = round(STAGE_COUNTS["agent_sft"] * 0.1)
    assert len(rows) == count + round(count * AGENT_REVIEW)
    names = {tool["function"]["name"] for row in rows for tool in tools_of(row["conversations"]) or []}
    assert {"search", "calculator", "convert_unit", "get_weather"} <= names


def test_差事不进别的阶段():
    assert not {family.name for family in FAMILIES} & set(TASKS)
    assert "search" not in json.dumps(Corpus(TASKS, 0.02, 42).sft(TRAIN), ensure_ascii=False)
