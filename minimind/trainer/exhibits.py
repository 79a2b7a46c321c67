"""日志里样例的那一行有哪几样；写它的（训练）与读它的（报告、看训练的页面）共用，只用标准库。"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

# 固定提示的回答、强化学习采样的回答、专家的负载、各任务答对的比例
EXHIBITS = ("samples", "rollouts", "expert_load", "tasks")
KINDS = {"best": "最好", "median": "居中", "worst": "最差"}


def number(value: Any) -> float | None:
    """日志里的一个数；不是数、不是有限的数给 None。"""
    if type(value) not in (int, float):  # bool 不算
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def exchanges(value: Any) -> list[dict[str, Any]]:
    """日志里的一份样例或采样：问与答都是文字的那几条；别的程序写的、不成样子的都不算。"""
    return [
        one
        for one in (value if isinstance(value, list) else ())
        if isinstance(one, dict) and isinstance(one.get("prompt"), str) and isinstance(one.get("answer"), str)
    ]


def extremes(prompts: Sequence[str], answers: Sequence[str], rewards: Any, parts: Mapping[str, Any]) -> list:
    """采样里最好、居中、最差的各一条，带着各条奖励；同分的取靠前的。

    Args:
        prompts, answers: ``[R]`` 文字。
        rewards: ``[R]`` 总分；parts: 名字 → ``[R]``。
    """
    if not len(answers):
        return []
    order = sorted(range(len(answers)), key=lambda i: (-float(rewards[i]), i))
    picked = {"best": order[0], "median": order[len(order) // 2], "worst": order[-1]}
    return [
        {
            "kind": kind,
            "prompt": prompts[i],
            "answer": answers[i],
            "reward": round(float(rewards[i]), 4),
            "parts": {name: round(float(scores[i]), 4) for name, scores in parts.items()},
        }
        for kind, i in picked.items()
    ]
