"""SPO：每个提示只答一次，和它自己过去的成绩比，不要组也不要价值网络。

记分牌给每个提示记着 v ≈ 它现在做对的把握（:mod:`minimind.rl.tracker`），一次观察 r ∈ [0, 1] 的优势与损失是::

    A = r − v（v 是更新之前的），再在整批（所有进程）里减平均、除以标准差
    L = − (1/N) Σ_t min(ρ·A, clip(ρ, 1 − ε, 1 + ε_high)·A)  +  β·k3

策略走完这一步之后才更新记分牌：α ← ρ·α + r，β ← ρ·β + (1 − r)。提示按 sqrt(v(1 − v)) + 0.05 抽，拿不准的多练；
所以 ``--epochs`` 只决定总量，不保证每题见到同样多次。同样多的采样，GRPO 把 8 条花在一道题上，SPO 看 8 道题。

来源：Xu & Ding 2025，Single-stream Policy Optimization，arXiv 2509.13232。
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from minimind.arguments import arg, override
from minimind.console import say, track
from minimind.errors import UserError
from minimind.recipes.entry import entry
from minimind.recipes.rl import held_out_score, open_stage
from minimind.rl.arguments import RLArguments, require
from minimind.rl.experience import Collector, Experience, gather_lists, global_moments, prompts_of
from minimind.rl.health import RLHealth
from minimind.rl.objectives import mean_and_std, whiten
from minimind.rl.policy import frozen_copy, policy_loss, response_logps
from minimind.rl.rewards import Rewards
from minimind.rl.rollout import Rollout
from minimind.rl.tracker import PromptTracker
from minimind.trainer.device import mix_seeds
from minimind.trainer.distributed import gather_objects
from minimind.trainer.loop import TrainResult, train
from minimind.trainer.run import Run
from minimind.trainer.step import Window


@dataclass
class SPOArguments(RLArguments):
    """SPO：单条采样，和自己过去的成绩比。"""

    epsilon: float = arg(0.2, "比值截断的下限 1 − epsilon")
    epsilon_high: float | None = arg(None, "比值截断的上限 1 + epsilon_high；不给则 0.28")
    beta: float = arg(0.0, "与参考模型的 KL 的系数；0 则不载入参考模型")
    offline_samples: int = arg(0, "训练前每个提示先采样几条给记分牌定起点；0 则都从 0.5 开始")
    reward_low: float | None = arg(None, "奖励的最低分，用来换算到 0…1；不给则由奖励自己说")
    reward_high: float | None = arg(None, "奖励的最高分")

    save_weight: str = override(RLArguments, "save_weight", "spo")
    num_generations: int = override(RLArguments, "num_generations", 1)
    accumulation_steps: int = override(RLArguments, "accumulation_steps", 64)

    def __post_init__(self):
        super().__post_init__()
        require(self, "beta", self.beta >= 0, "不小于 0")


def reward_range(args: SPOArguments, rewards: Rewards) -> tuple[float, float]:
    """总分的范围，记分牌要把它换到 [0, 1]。

    Raises:
        UserError: 奖励不知道自己的范围，命令行也没有给。
    """
    low, high = rewards.bounds or (None, None)
    low = low if args.reward_low is None else args.reward_low
    high = high if args.reward_high is None else args.reward_high
    if low is None or high is None or not low < high:
        raise UserError(
            f"奖励的范围是 {low} 到 {high}",
            where="--reward_low、--reward_high",
            expected="两个数，低的在前：SPO 要把得分换算到 0…1",
            fix="例如 --reward_low 0 --reward_high 1",
        )
    return low, high


def draw_prompts(run: Run, tracker: PromptTracker, mine: int) -> list[int]:
    """按记分牌抽出全体进程这一步的提示，取自己那一份；各进程的种子相同，抽到的也相同。"""
    counts = gather_objects(mine)
    drawn = tracker.draw(sum(counts), mix_seeds(run.args.seed, run.state.step))
    begin = sum(counts[: run.rank])
    return drawn[begin : begin + mine]


def divergences(run: Run, tracker: PromptTracker, experience: Experience) -> dict[int, float]:
    """提示 → D：它上一条回答在现在与当时的策略下 |logp 之差| 的平均；没见过的不在其中。"""
    seen = [p for p in dict.fromkeys(experience.prompts) if p in tracker.previous]
    ids, logps = ([tracker.previous[p][k] for p in seen] for k in (0, 1))
    prompts = [run.train_ds[p]["prompt_ids"].tolist() for p in seen]
    past = Rollout(prompts, [x.tolist() for x in ids], logps, [False] * len(seen), [""] * len(seen), seen)
    past = Experience(past, seen, torch.zeros(len(seen)), experience.pad_id)
    change = (response_logps(run.model, past, run, run.args) - past.old_logps).abs()
    return {p: float(part.mean()) for p, part in zip(seen, change.split(past.lengths) if seen else ())}


def observe(
    tracker: PromptTracker, experience: Experience, unit: torch.Tensor, change: dict[int, float]
) -> None:
    """把全体进程这一步的观察记上记分牌；同一步里同一提示的第二条起 D = 0（策略没有动过）。"""
    rows = zip(experience.prompts, unit.tolist(), experience.rollout.responses, experience.rollout.logprobs)
    mine = [(prompt, reward, change.get(prompt, 0.0), ids, logp) for prompt, reward, ids, logp in rows]
    updated: set[int] = set()
    for prompt, reward, divergence, ids, logp in gather_lists(mine):
        tracker.update(prompt, reward, 0.0 if prompt in updated else divergence, torch.tensor(ids), logp)
        updated.add(prompt)


def calibration(run: Run, values: torch.Tensor, unit: torch.Tensor) -> dict[str, tuple[float, float]]:
    """记分牌准不准：平均把握、把握减得分（偏差），以及它解释了得分方差的几成（0 等于报平均数）。"""
    n, errors = len(unit), global_moments(unit - values, run)
    spread = mean_and_std(global_moments(unit, run))[1] ** 2
    explained = 1 - float(errors[2] / errors[0]) / spread if spread else 0.0
    return {
        "tracker_value": (float(values.sum()), n),
        "tracker_bias": (float((values - unit).sum()), n),
        "tracker_explained": (explained, 1),
    }


def start_tracker(run: Run, collector: Collector, tracker: PromptTracker, to_unit: Callable) -> None:
    """每个提示采样 ``--offline_samples`` 条定起点；各进程分着做。"""
    args, mine, found = run.args, range(run.rank, len(run.train_ds), run.world_size), []
    say(f"给 {len(run.train_ds):,} 个提示各采样 {args.offline_samples} 条，定记分牌的起点……")
    collector.push_weights(run)
    for start in track(range(0, len(mine), args.rollout_slots), "定起点", unit="批"):
        prompts = list(mine[start : start + args.rollout_slots])
        experience, _ = collector.sample(run, prompts, args.offline_samples, mix_seeds(args.seed, -1 - start))
        scores = to_unit(experience.scores).view(len(prompts), -1).tolist()
        found += zip(prompts, scores)
    for prompt, rewards in gather_lists(found):
        tracker.start(prompt, rewards)


def run(args: SPOArguments) -> TrainResult:
    """按参数训练一次；返回权重位置与最后的指标。"""
    stage = open_stage(args)
    collector = Collector(args, stage.tokenizer, stage.train_ds, stage.rewards)
    reference = frozen_copy(stage.model) if args.beta else None
    tracker = PromptTracker(len(stage.train_ds))
    compute_loss, count = policy_loss(args, "dapo")
    low, high = reward_range(args, stage.rewards)

    def to_unit(scores: torch.Tensor) -> torch.Tensor:
        return ((scores - low) / (high - low)).clamp(0, 1)

    def prepare(run: Run, window: Window) -> Iterator[Window]:
        if args.offline_samples and run.state.step == 0:
            start_tracker(run, collector, tracker, to_unit)
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

    return train(
        args,
        stage.model,
        stage.tokenizer,
        stage.train_ds,
        compute_loss,
        count=count,
        recipe="spo",
        extra_state={"tracker": tracker},
        prepare=prepare,
        on_eval=held_out_score(args, stage),
        health=RLHealth(args.max_gen_len),
    )


main = entry(SPOArguments, run)
