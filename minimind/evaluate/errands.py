"""考差事：带着工具贪心地走几回合，看最后答得对不对；全部回答是整段对话，连同调用与结果。"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from minimind.evaluate.microworld import Answered, accuracy, by_task
from minimind.rl.agent import greedy, outcomes, transcript, vital_signs
from minimind.tools.toolset import Toolset

NO_TOOL = "agent_none"


def walk_errands(
    model: nn.Module, tokenizer: Any, records: Sequence[dict[str, Any]], args: Any
) -> tuple[list[Answered], dict[str, float]]:
    """逐题走一遍，与 ``records`` 同序。

    Args:
        records: ``agent_heldout.jsonl`` 的各行。
        args: train_agent 的参数，回合与长度的上限用它的。

    Returns:
        ``(回答, 体征)``：体征见 :func:`minimind.rl.agent.vital_signs`，没有的（没有一次调用）不在其中。
    """
    items = [{"record": row, "messages": row["conversations"][:-1]} for row in records]
    rollout = greedy(model, tokenizer, items, Toolset(), args)
    answered = [
        Answered(
            {**item["record"], "messages": item["messages"], "prompt": item["messages"][-1]["content"]},
            transcript(one),
            got or 0.0,
            not cut,
        )
        for item, one, got, cut in zip(
            items, rollout.conversations, outcomes(rollout, items), rollout.truncated
        )
    ]
    return answered, {name: total / n for name, (total, n) in vital_signs(rollout, items).items() if n}


def solved(tasks: dict[str, float]) -> float:
    """各家族答对的比例 → 要用工具的几种的平均，每种一样重；一种也没有时为 0。"""
    needed = [share for task, share in tasks.items() if task != NO_TOOL]
    return sum(needed) / len(needed) if needed else 0.0


def share_by_task(results: Sequence[Answered]) -> dict[str, float]:
    """各家族答对的比例。"""
    return {task: accuracy(group) for task, group in by_task(results).items()}
