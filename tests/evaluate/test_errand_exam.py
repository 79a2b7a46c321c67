"""考差事：照办法走完的全对、答不知道的全错；要用工具的几种一样重，用不着的不算在内。"""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import pytest

from minimind.evaluate.errands import share_by_task, solved, walk_errands
from minimind.microworld.core import HELDOUT
from minimind.microworld.tasks import build_tasks
from minimind.microworld.tasks.agent import FAMILIES, Errands
from minimind.rl import agent
from minimind.rl.conversations import WrittenTurn
from minimind.tokenizer import encode_chat, load_tokenizer

TOKENIZER = load_tokenizer()
LIMITS = SimpleNamespace(reasoning=0, max_gen_len=64, max_total_len=900, max_turns=4, rollout_slots=8)
TASKS = [task for task in build_tasks().values() if task.level == "easy" and task.share.sft]


def draw(count: int) -> list:
    source = Errands(TASKS, 42)
    return [source.draw(random.Random(number), number, HELDOUT) for number in range(count)]


class Pupil:
    """认得题：照那种办法一步一步写，最后照答或说不知道。"""

    def __init__(self, errands: list, knows: bool):
        self.lines = {}
        for _, errand in errands:
            asked = errand.turns()
            if not knows:
                asked[-1] = {**asked[-1], "content": "不知道。"}
            system = [{"role": "system", "content": "", "tools": json.dumps(list(errand.tools))}]
            for i, turn in enumerate(asked):
                if turn["role"] == "assistant":
                    before = encode_chat(TOKENIZER, [*system, *asked[:i]], list(errand.tools), True).ids
                    whole = encode_chat(TOKENIZER, [*system, *asked[: i + 1]], list(errand.tools)).ids
                    end = len(whole) - whole[::-1].index(TOKENIZER.eos_token_id)
                    self.lines[tuple(before)] = whole[len(before) : end]
        self.queue, self.asked = [], 0

    def begin(self) -> None:
        self.queue = []

    def add(self, ids, limit, seed, n=1):
        self.asked += 1
        self.queue.append((self.asked, ids))
        return self.asked

    def finished(self):
        while self.queue:
            key, ids = self.queue.pop(0)
            said = self.lines[tuple(ids)]
            yield WrittenTurn(key, 0, said, [-0.1] * len(said), True)


@pytest.mark.parametrize("knows", [True, False])
def test_照办法走完全对_答不知道全错(monkeypatch, knows):
    errands = draw(24)
    pupil = Pupil(errands, knows)
    monkeypatch.setattr(agent, "engine_writer", lambda *args: pupil)
    results, signs = walk_errands(None, TOKENIZER, [e.record(n) for n, e in errands], LIMITS)
    tasks = share_by_task(results)
    assert set(tasks) == {f.name for f in FAMILIES} | {"agent_none"} and set(tasks.values()) == {float(knows)}
    assert signs["valid_calls"] == 1 and signs["unfinished"] == 0 and all(one.finished for one in results)
    for (name, errand), one in zip(errands, results):
        assert one.item["task"] == name and one.item["prompt"] == errand.question
        assert one.response.count("[调用]") == len(errand.steps)


def test_要用工具的几种一样重_用不着的不算():
    assert solved({"agent_times": 1.0, "agent_chain": 0.5, "agent_none": 0.0}) == pytest.approx(0.75)
    assert solved({"agent_none": 1.0}) == 0.0
