"""SPO 的记分牌：每个提示一个 Beta 分布，记住它大约有几成把握做对，充当这个提示的基线；以及一步里它与采样、与各进程之间的
往来：按它抽题、量策略走了多远、记分、报它准不准、训练前定起点。每个进程的记分牌逐位相同。

来源：Xu & Ding 2025，Single-stream Policy Optimization，arXiv 2509.13232，3.1 与 3.3 节。
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minimind.console import say, track
from minimind.objectives.policy import mean_and_std
from minimind.rl.experience import Collector, Experience, gather_lists, global_moments
from minimind.rl.policy import response_logps
from minimind.rl.rollout import Rollout
from minimind.runtime.device import mix_seeds
from minimind.runtime.distributed import gather_objects, rank, world_size
from minimind.trainer.recipe import Run

# 记忆的保留率限制在这个区间：最快约每 8 次、最慢约每 25 次观察忘掉旧账
RHO_MIN, RHO_MAX = 0.875, 0.96
# 训练前定起点算作多少次观察
PRIOR = 1 / (1 - RHO_MIN)
# 策略走过这么远（平均 |Δlogp|，单位 nat），旧观察的分量减半
HALF_DIVERGENCE = 0.06
# 抽提示时的底数：把握十足或毫无把握的也偶尔再看一眼
EXPLORATION = 0.05


class PromptTracker:
    """每个提示的成功率估计 v = α / (α + β)，随策略变化而遗忘。

    每看到一个得分 r ∈ [0, 1]::

        α ← ρ·α + r，   β ← ρ·β + (1 − r)，   ρ = clip(2^(−D / D_half), 0.875, 0.96)

    D 是这个提示上一条回答在现在与当时的策略下 |logp 之差| 的平均：策略变得多，旧账就忘得快；头一次见 D = 0。

    Args:
        size: 提示的个数。

    Attributes:
        alpha, beta: ``[size]`` fp64，开始都是 0.5（没有先验，v = 0.5）。
        previous: 提示 → （上一条回答的词元 ``[n]`` int32，当时的对数概率 ``[n]`` fp32）。
    """

    def __init__(self, size: int, half_divergence: float = HALF_DIVERGENCE):
        self.half_divergence = half_divergence
        self.alpha = torch.full((size,), 0.5, dtype=torch.float64)
        self.beta = torch.full((size,), 0.5, dtype=torch.float64)
        self.previous: dict[int, tuple[Tensor, Tensor]] = {}

    def values(self, prompts: list[int]) -> Tensor:
        """``[n]`` fp32，各提示的 v。"""
        alpha, beta = self.alpha[prompts], self.beta[prompts]
        return (alpha / (alpha + beta)).float()

    def start(self, prompt: int, rewards: list[float]) -> None:
        """用训练前的几条样本定起点：v₀ = (Σr + 0.5) / (n + 1)，分量 N₀ = 1 / (1 − 0.875) = 8 次观察。"""
        guess = (sum(rewards) + 0.5) / (len(rewards) + 1)
        self.alpha[prompt], self.beta[prompt] = PRIOR * guess, PRIOR * (1 - guess)

    def rho(self, divergence: float) -> float:
        """保留率。"""
        return min(max(2.0 ** (-divergence / self.half_divergence), RHO_MIN), RHO_MAX)

    def update(self, prompt: int, reward: float, divergence: float, ids: Tensor, logp: Tensor) -> None:
        """记下一次观察。

        Args:
            reward: [0, 1]。
            divergence: D；头一次见给 0。
            ids, logp: ``[n]``，这条回答与采样时的对数概率，下次见到这个提示时用来算 D。

        Raises:
            ValueError: 得分不在 [0, 1]。
        """
        if not 0 <= reward <= 1:
            raise ValueError(f"得分 {reward} 不在 0 到 1 之间")
        rho = self.rho(divergence)
        self.alpha[prompt] = rho * self.alpha[prompt] + reward
        self.beta[prompt] = rho * self.beta[prompt] + (1 - reward)
        self.previous[prompt] = (ids.to(torch.int32), logp.float())

    def sampling_weights(self) -> Tensor:
        """``[size]``：抽到各提示的权重 sqrt(v(1 − v)) + 0.05，拿不准的多练。"""
        v = self.alpha / (self.alpha + self.beta)
        return (v * (1 - v)).clamp_min(0).sqrt() + EXPLORATION

    def draw(self, count: int, seed: int) -> list[int]:
        """按权重抽 ``count`` 个不同的提示（提示不够时一轮轮地抽）；同一种子各进程抽到的相同。"""
        generator, weights, drawn = torch.Generator().manual_seed(seed), self.sampling_weights(), []
        while len(drawn) < count:
            n = min(count - len(drawn), len(weights))
            drawn += torch.multinomial(weights, n, replacement=False, generator=generator).tolist()
        return drawn

    def state_dict(self) -> dict[str, Any]:
        prompts = sorted(self.previous)
        ids, logps = ([self.previous[p][k] for p in prompts] for k in (0, 1))
        return {
            "alpha": self.alpha.clone(),
            "beta": self.beta.clone(),
            "prompts": torch.tensor(prompts, dtype=torch.int64),
            "lengths": torch.tensor([len(x) for x in ids], dtype=torch.int64),
            "ids": torch.cat(ids) if ids else torch.empty(0, dtype=torch.int32),
            "logps": torch.cat(logps) if logps else torch.empty(0),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """读回 :meth:`state_dict`。

        Raises:
            ValueError: 提示的个数不同，有的分量不是正数，或观察过的提示没有上一条回答。
        """
        if len(state["alpha"]) != len(self.alpha):
            raise ValueError(f"存档里有 {len(state['alpha'])} 个提示，现在是 {len(self.alpha)} 个")
        weight = state["alpha"] + state["beta"]
        if not (torch.isfinite(weight).all() and (state["alpha"] >= 0).all() and (state["beta"] >= 0).all()):
            raise ValueError("alpha、beta 里有 NaN、无穷或负数")
        prompts, lengths = state["prompts"].tolist(), state["lengths"].tolist()
        # 没有观察过的，分量还是开头的 0.5 + 0.5，或 start 给的那么多
        fresh = torch.isclose(weight, weight.new_tensor(1.0)) | torch.isclose(
            weight, weight.new_tensor(PRIOR)
        )
        if lost := sorted({*(~fresh).nonzero().flatten().tolist()} - {*prompts}):
            raise ValueError(f"第 {lost[0]} 个提示观察过，却没有它的上一条回答")
        self.alpha, self.beta = state["alpha"].clone(), state["beta"].clone()
        parts = zip(prompts, state["ids"].split(lengths), state["logps"].split(lengths), strict=True)
        self.previous = {prompt: (ids, logp) for prompt, ids, logp in parts}


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
