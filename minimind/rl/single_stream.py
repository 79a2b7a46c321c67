"""单条采样（SPO）一步里的几件事：按记分牌抽题、量策略走了多远、记分、报它准不准、训练前定起点。

记分牌自己只管数（:mod:`minimind.rl.tracker`）；这里管它与采样、与各进程之间的往来：每个进程的记分牌逐位相同。
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minimind.console import say, track
from minimind.objectives.policy import mean_and_std
from minimind.rl.experience import Collector, Experience, gather_lists, global_moments
from minimind.rl.policy import response_logps
from minimind.rl.rollout import Rollout
from minimind.rl.tracker import PromptTracker
from minimind.runtime.device import mix_seeds
from minimind.runtime.distributed import gather_objects, rank, world_size
from minimind.trainer.run import Run


def draw_prompts(run: Run, tracker: PromptTracker, mine: int) -> list[int]:
    """按记分牌抽出全体进程这一步的提示，取自己那一份；各进程的种子相同，抽到的也相同。"""
    counts = gather_objects(mine)
    drawn = tracker.draw(sum(counts), mix_seeds(run.args.seed, run.state.step))
    begin = sum(counts[: rank()])
    return drawn[begin : begin + mine]


def divergences(run: Run, tracker: PromptTracker, experience: Experience) -> dict[int, float]:
    """提示 → D：它上一条回答在现在与当时的策略下 |logp 之差| 的平均；没见过的不在其中。"""
    seen = [p for p in dict.fromkeys(experience.prompts) if p in tracker.previous]
    ids, logps = ([tracker.previous[p][k] for p in seen] for k in (0, 1))
    prompts = [run.data.train[p]["prompt_ids"].tolist() for p in seen]
    past = Rollout(prompts, [x.tolist() for x in ids], logps, [False] * len(seen), [""] * len(seen), seen)
    past = Experience(past, seen, torch.zeros(len(seen)), experience.pad_id)
    change = (response_logps(run.model, past, run, run.args) - past.old_logps).abs()
    return {p: float(part.mean()) for p, part in zip(seen, change.split(past.lengths) if seen else ())}


def observe(tracker: PromptTracker, experience: Experience, unit: Tensor, change: dict[int, float]) -> None:
    """把全体进程这一步的观察记上记分牌；同一步里同一提示的第二条起 D = 0（策略没有动过）。"""
    rows = zip(experience.prompts, unit.tolist(), experience.rollout.responses, experience.rollout.logprobs)
    mine = [(prompt, reward, change.get(prompt, 0.0), ids, logp) for prompt, reward, ids, logp in rows]
    updated: set[int] = set()
    for prompt, reward, divergence, ids, logp in gather_lists(mine):
        tracker.update(prompt, reward, 0.0 if prompt in updated else divergence, torch.tensor(ids), logp)
        updated.add(prompt)


def calibration(run: Run, values: Tensor, unit: Tensor) -> dict[str, tuple[float, float]]:
    """记分牌准不准：平均把握、把握减得分（偏差），以及它解释了得分方差的几成（0 等于报平均数）。"""
    n, errors = len(unit), global_moments(unit - values, run)
    spread = mean_and_std(global_moments(unit, run))[1] ** 2
    explained = 1 - float(errors[2] / errors[0]) / spread if spread else 0.0
    return {
        "tracker_value": (float(values.sum()), n),
        "tracker_bias": (float((values - unit).sum()), n),
        "tracker_explained": (explained, 1),
    }


def calibrate_tracker(run: Run, collector: Collector, tracker: PromptTracker, to_unit: Callable) -> None:
    """每个提示采样 ``--offline_samples`` 条定起点；各进程分着做。"""
    args, mine, found = run.args, range(rank(), len(run.data.train), world_size()), []
    say(f"给 {len(run.data.train):,} 个提示各采样 {args.offline_samples} 条，定记分牌的起点……")
    collector.push_weights(run)
    for start in track(range(0, len(mine), args.rollout_slots), "定起点", unit="批"):
        prompts = list(mine[start : start + args.rollout_slots])
        experience, _ = collector.sample(run, prompts, args.offline_samples, mix_seeds(args.seed, -1 - start))
        scores = to_unit(experience.scores).view(len(prompts), -1).tolist()
        found += zip(prompts, scores)
    for prompt, rewards in gather_lists(found):
        tracker.start(prompt, rewards)
