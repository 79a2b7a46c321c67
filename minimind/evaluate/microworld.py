"""微世界的考试：对留出题目贪心生成，逐题判分，按任务汇总。"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minimind.console import progress
from minimind.errors import UserError
from minimind.inference.generate import generate_batch
from minimind.inference.loading import stop_ids
from minimind.inference.sampling import GREEDY, SamplingParams
from minimind.microworld import grade
from minimind.tokenizer import document_start, encode_chat_batch, encode_plain_batch

# 回答最长多少 token：微世界的标准回答没有超过六十个的，放到 96 还能看出「停不下来」
MAX_NEW_TOKENS = 96


@dataclass(frozen=True)
class Answered:
    """一道题与模型的回答；``score`` 在 0 到 1 之间，1 为完全正确。"""

    item: dict[str, Any]
    response: str
    score: float
    finished: bool


def read_items(path: str | Path) -> list[dict[str, Any]]:
    """读 ``eval.jsonl``。"""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(
            "读不到考题",
            where=str(path),
            expected="微世界的 eval.jsonl 或 rl_heldout.jsonl",
            fix="minimind data make-microworld DIR",
        ) from error
    return [json.loads(line) for line in lines if line.strip()]


def read_prompts(path: str | Path) -> list[dict[str, Any]]:
    """把强化学习的留出提示（``rl_heldout.jsonl``）读成考题；问句相同的只留一道。"""
    return prompt_items(read_items(path))


def prompt_items(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """强化学习的提示写成考题；问句相同的只留一道。"""
    items: dict[str, dict[str, Any]] = {}
    for record in records:
        *messages, reference = record["conversations"]
        question = messages[-1]["content"]
        items[question] = {
            "task": record["task"],
            "level": "hard",
            "kind": "chat",
            "prompt": question,
            "messages": messages,
            "answer": record["answer"],
            "grader": record["grader"],
            "reference": reference["content"],
        }
    return list(items.values())


def encode_items(tokenizer: Any, items: Sequence[dict[str, Any]]) -> list[list[int]]:
    """有 ``messages`` 的走对话模板（末尾是助手回合的开头），其余是续写：``bos + prompt``（没有 bos 的不放）。"""
    chats = [i for i, item in enumerate(items) if item.get("messages")]
    plains = [i for i, item in enumerate(items) if not item.get("messages")]
    encoded: list[list[int]] = [[] for _ in items]
    chat_ids = encode_chat_batch(tokenizer, [items[i]["messages"] for i in chats], add_generation_prompt=True)
    for i, chat in zip(chats, chat_ids):
        encoded[i] = chat.ids
    for i, ids in zip(plains, encode_plain_batch(tokenizer, [items[i]["prompt"] for i in plains])):
        encoded[i] = [*document_start(tokenizer), *ids]
    return encoded


def evaluate_items(
    model: torch.nn.Module,
    tokenizer: Any,
    items: Sequence[dict[str, Any]],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 64,
    description: str = "评测",
    params: SamplingParams = GREEDY,
) -> list[Answered]:
    """逐题作答（默认贪心）并判分，结果与 ``items`` 同序。

    模型须已在目标设备上；训练状态会暂时切到 eval，结束后还原。
    """
    was_training = model.training
    model.eval()
    prompts = encode_items(tokenizer, items)
    results: list[Answered | None] = [None] * len(items)
    try:
        with progress(description, total=len(items), unit="题") as bar:
            for index, completion in generate_batch(
                model,
                prompts,
                max_new_tokens=max_new_tokens,
                eos_ids=stop_ids(model, tokenizer),
                params=params,
                batch_size=batch_size,
            ):
                response = tokenizer.decode(completion.ids, skip_special_tokens=True)
                item = items[index]
                results[index] = Answered(item, response, grade(item, response), completion.finished)
                bar.advance()
    finally:
        model.train(was_training)
    return [answered for answered in results if answered is not None]


def accuracy(results: Sequence[Answered]) -> float:
    """完全正确（得分为 1）的比例；没有题目时为 0。"""
    return sum(answered.score >= 1.0 for answered in results) / len(results) if results else 0.0


def by_task(results: Sequence[Answered]) -> dict[str, list[Answered]]:
    """按任务分组，保持题目里任务首次出现的次序。"""
    groups: dict[str, list[Answered]] = {}
    for answered in results:
        groups.setdefault(answered.item["task"], []).append(answered)
    return groups
