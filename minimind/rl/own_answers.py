"""让正在训练的模型自己作答，换下数据里的回答：蒸馏的 ``--on_policy`` 用（GKD，arXiv 2306.13649）。"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from random import Random
from typing import Any

from minimind.objectives.logprobs import IGNORE
from minimind.rl.rollout import LocalRollout, response_batch
from minimind.runtime.device import mix_seeds
from minimind.runtime.distributed import rank
from minimind.trainer.recipe import Window
from minimind.trainer.run import Run


def last_prompts(batch: dict[str, Any]) -> list[list[int]]:
    """打包行里每段对话最后一个回答之前的全部词元，即让学生自己作答的提示。"""
    ids, is_target = batch["input_ids"].flatten(), (batch["labels"] != IGNORE).flatten()
    prompts = []
    for begin, end in pairwise(batch["cu_seqlens"].tolist()):
        targets = is_target[begin:end]
        starts = (targets & ~targets.roll(1)).nonzero()  # 段的第一个词元从不是目标
        if len(starts):
            prompts.append(ids[begin : begin + int(starts[-1])].tolist())
    return prompts


def own_answers(
    run: Run, window: Window, *, share: float, seed: int, rollout: LocalRollout
) -> Iterator[Window]:
    """训练循环的 ``prepare``：有 ``share`` 的机会把一个微批次换成学生此刻自己的回答，批里记 ``on_policy``。

    由种子与步数决定，续训逐位一致。
    """
    replaced, own = [], 0
    for index, (ids, batch) in enumerate(window):
        own_seed = mix_seeds(seed, run.state.step, index, rank())
        prompts = last_prompts(batch) if Random(own_seed).random() < share else []
        if ids and prompts:
            answers = rollout.generate(prompts, 1, own_seed)
            batch = {**response_batch(answers, slice(None), run.data.train.pad_id), "on_policy": True}
            own += 1
        replaced.append((ids, batch))
    run.record(on_policy=(own, len(window)))
    yield replaced
