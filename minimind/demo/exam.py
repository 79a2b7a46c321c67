"""演示的考卷：从微世界的留出题里挑，每个阶段考自己该会的，再看别的忘了没有。"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minimind.answers import well_formed
from minimind.evaluate.microworld import Answered, read_items, read_prompts
from minimind.microworld.graders import style_of

# 差事有六种，轮流排着：前六道各一种
ERRAND_KINDS = 6


def pick_items(items: list[dict], kind: str, per_task: int, level: Sequence[str] = ("easy", "hard")) -> list:
    """某一类考题；``per_task`` 大于 0 时每个任务只取前几题。新身份的题（``lora``）默认不在内：换了身份才考。"""
    chosen, seen = [], {}
    for item in items:
        if item["kind"] != kind or item["level"] not in level:
            continue
        seen[item["task"]] = seen.get(item["task"], 0) + 1
        if not per_task or seen[item["task"]] <= per_task:
            chosen.append(item)
    return chosen


@dataclass(frozen=True)
class Papers:
    """全部考卷。

    cloze: 预训练的填空；chats: 对话题，``easy`` 与 ``hard``；identity: 新身份；
    multistep: 多步题的提示，推理与强化学习考它们；errands: 要用工具的差事；heldout: 预训练的留出文本；bpb_rows: 至多用它多少行，0 为全部。
    """

    cloze: list[dict]
    chats: list[dict]
    identity: list[dict]
    multistep: list[dict]
    errands: list[dict]
    heldout: Path
    bpb_rows: int = 0

    @property
    def easy(self) -> list[dict]:
        return [item for item in self.chats if item["level"] == "easy"]


def open_papers(world: Path, per_task: int, fast: bool) -> Papers:
    """从微世界文件夹读出考卷；``per_task`` 见 :func:`pick_items`。"""
    items, errands = read_items(world / "eval.jsonl"), read_items(world / "agent_heldout.jsonl")
    return Papers(
        cloze=pick_items(items, "cloze", per_task),
        chats=pick_items(items, "chat", per_task),
        identity=pick_items(items, "chat", 4 * per_task, ("lora",)),
        multistep=pick_items(read_prompts(world / "rl_heldout.jsonl"), "chat", 4 * per_task),
        errands=errands[: ERRAND_KINDS * per_task or None],
        heldout=world / "pretrain_heldout.jsonl",
        bpb_rows=32 if fast else 0,
    )


def of_level(results: Sequence[Answered], name: str) -> list[Answered]:
    """某个难度的回答：``easy`` 计入总成绩，``hard`` 要多步推导或多位数，另列一行。"""
    return [answered for answered in results if answered.item["level"] == name]


def polite_share(results: Sequence[Answered]) -> float:
    """能套腔调的题（单轮、普通回答）里，答得客气的比例。"""
    plain = [
        a for a in results if len(a.item["messages"]) == 1 and a.item["grader"] not in ("exact", "tool_call")
    ]
    return sum(style_of(a.response) == "polite" for a in plain) / max(len(plain), 1)


def well_formed_share(results: Sequence[Answered]) -> float:
    """恰好一段 ``<think>`` 接一段 ``<answer>``、并且自己停下来的比例。"""
    return sum(well_formed(a.response) and a.finished for a in results) / max(len(results), 1)
