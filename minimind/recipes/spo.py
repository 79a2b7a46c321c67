"""SPO：每个提示只答一次，和它自己过去的成绩比，不要组也不要价值网络。

记分牌给每个提示记着 v ≈ 它现在做对的把握（:mod:`minimind.rl.tracker`），一次观察 r ∈ [0, 1] 的优势与损失是::

    A = r − v（v 是更新之前的），再在整批（所有进程）里减平均、除以标准差
    L = − (1/N) Σ_t min(ρ·A, clip(ρ, 1 − ε, 1 + ε_high)·A)  +  β·k3

策略走完这一步之后才更新记分牌：α ← ρ·α + r，β ← ρ·β + (1 − r)。提示按 sqrt(v(1 − v)) + 0.05 抽，拿不准的多练；
所以 ``--epochs`` 只决定总量，不保证每题见到同样多次。同样多的采样，GRPO 把 8 条花在一道题上，SPO 看 8 道题。

来源：Xu & Ding 2025，Single-stream Policy Optimization，arXiv 2509.13232。
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from minimind.arguments import arg, override
from minimind.errors import UserError
from minimind.objectives.policy import whiten
from minimind.ranges import MANY
from minimind.recipes.entry import entry
from minimind.recipes.rl import no_batch, open_stage, train_stage
from minimind.rl.arguments import RLArguments
from minimind.rl.experience import Collector, global_moments, prompts_of
from minimind.rl.policy import frozen_copy, policy_loss, response_logps
from minimind.rl.rewards import Rewards
from minimind.rl.tracker import (
    PromptTracker,
    calibrate_tracker,
    calibration,
    divergences,
    draw_prompts,
    observe,
)
from minimind.trainer.loop import TrainResult
from minimind.trainer.recipe import Recipe, Run, Window


@dataclass
class SPOArguments(RLArguments, group="SPO"):
    """SPO：单条采样，和自己过去的成绩比。"""

    epsilon: float = arg(0.2, "比值截断的下限 1 − epsilon", above=0, below=1)
    epsilon_high: float | None = arg(None, "比值截断的上限 1 + epsilon_high；不给则 0.28", above=0, high=100)
    beta: float = arg(0.0, "与参考模型的 KL 的系数；0 则不载入参考模型", low=0, high=1000)
    offline_samples: int = arg(
        0, "训练前每个提示先采样几条给记分牌定起点；0 则都从 0.5 开始", low=0, high=1024
    )
    reward_low: float | None = arg(
        None, "奖励的最低分，用来换算到 0…1；不给则由奖励自己说", low=-MANY, high=MANY
    )
    reward_high: float | None = arg(None, "奖励的最高分；不给则由奖励自己说", low=-MANY, high=MANY)

    save_weight: str = override(RLArguments, "save_weight", "spo")
    num_generations: int = override(RLArguments, "num_generations", 1)
    accumulation_steps: int = override(RLArguments, "accumulation_steps", 64)

    def __post_init__(self):
        super().__post_init__()
        if None not in (self.reward_low, self.reward_high):
            check_range(self.reward_low, self.reward_high)


def reward_range(args: SPOArguments, rewards: Rewards) -> tuple[float, float]:
    """总分的范围，记分牌要把它换到 [0, 1]。

    Raises:
        UserError: 奖励不知道自己的范围，命令行也没有给。
    """
    low, high = rewards.bounds or (None, None)
    low = low if args.reward_low is None else args.reward_low
    high = high if args.reward_high is None else args.reward_high
    return check_range(low, high)


def check_range(low: float | None, high: float | None) -> tuple[float, float]:
    """两头都有，低的在前。"""
    if low is None or high is None or not low < high:
        raise UserError(
            f"奖励的范围是 {low} 到 {high}",
            where="--reward_low、--reward_high",
            expected="两个数，低的在前：SPO 要把得分换算到 0…1",
            fix="例如 --reward_low 0 --reward_high 1",
        )
    return low, high


def run(args: SPOArguments) -> TrainResult:
    """按参数训练一次；返回权重位置与最后的指标。"""
    stage = open_stage(args, kl=args.beta)
    collector = Collector(args, stage.tokenizer, stage.train_ds, stage.rewards)
    reference = frozen_copy(stage.model) if args.beta else None
    tracker = PromptTracker(len(stage.train_ds))
    loss, count = policy_loss(args, "dapo")
    low, high = reward_range(args, stage.rewards)

    def to_unit(scores: torch.Tensor) -> torch.Tensor:
        return ((scores - low) / (high - low)).clamp(0, 1)

    def prepare(run: Run, window: Window) -> Iterator[Window]:
        if args.offline_samples and run.state.step == 0:
            calibrate_tracker(run, collector, tracker, to_unit)
        experience = collector.collect(run, draw_prompts(run, tracker, len(prompts_of(window))))
        unit, values = to_unit(experience.scores), tracker.values(experience.prompts)
        run.record(**calibration(run, values, unit))
        advantages = whiten(unit - values, global_moments(unit - values, run))
        experience.per_token["advantages"] = experience.spread(advantages)
        if reference is not None:
            experience.per_token["ref_logps"] = response_logps(reference, experience, run, args)
        change = divergences(run, tracker, experience)
        yield experience.micro_batches(range(len(unit)), args.rows_per_forward)
        observe(tracker, experience, unit, change)  # 策略走完这一步之后

    extra_state = {"tracker": tracker}
    recipe = Recipe("spo", loss, no_batch, count, prepare, extra_state=extra_state)
    return train_stage(args, stage, recipe)


main = entry(SPOArguments, run)
