"""GRPO：同一道题答几遍，比同组平均好的多写，差的少写，不要价值网络。

每个提示采样 G 条，得分 r_1…r_G，第 i 条的优势与损失是::

    A_i = (r_i − 组平均) / (组标准差 + 1e-4)
    L   = − (1/N) Σ_i Σ_t min(ρ·A_i, clip(ρ, 1 − ε, 1 + ε_high)·A_i)  +  β·k3，   ρ = π_θ / π_采样

N 是这一步全部回答词元数（``--loss_type dapo``，默认）；别的归约见 :func:`minimind.objectives.policy.token_weights`，
``gspo`` 的 ρ 是整条回答的几何平均，截断也是整条的（:func:`minimind.objectives.policy.gspo_loss`）。
k3 = e^d − d − 1，d = logp_ref − logp，是与参考模型的 KL 的无偏估计；β 为 0（默认）时连参考模型也不载入。

一次采样只更新一次，所以 ρ = 1，A 在组内和为零，打印的 loss 总在 0 附近：它不说明什么，要看奖励、离散与 KL。

来源：Shao et al. 2024（DeepSeekMath，arXiv 2402.03300）；Yu et al. 2025（DAPO，arXiv 2503.14476）；
Zheng et al. 2025（GSPO，arXiv 2507.18071）。
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from minimind.arguments import arg, override
from minimind.errors import UserError
from minimind.objectives.policy import (
    CLIPS,
    DEFAULT_CLIP,
    LOSS_TYPES,
    SCALES,
    group_advantages,
    zero_spread,
)
from minimind.recipes.entry import entry
from minimind.recipes.rl import no_batch, open_stage, train_stage
from minimind.rl.arguments import RLArguments
from minimind.rl.experience import Collector, Experience, global_moments, prompts_of
from minimind.rl.policy import frozen_copy, policy_loss, response_logps
from minimind.trainer.loop import TrainResult
from minimind.trainer.recipe import Recipe, Run, Window


@dataclass
class GRPOArguments(RLArguments, group="GRPO"):
    """GRPO：同题多答，组内比较。"""

    loss_type: str = arg(
        "dapo",
        "损失怎样归约：dapo（全步词元平均）、grpo、dr_grpo、bnpo、cispo、gspo（整条回答一个比值）",
        LOSS_TYPES,
    )
    scale_rewards: str = arg(
        "group", "优势除以谁的标准差：group（本组）、batch（整批）、none（不除）", SCALES
    )
    epsilon: float | None = arg(
        None, "比值截断的下限 1 − epsilon；不给则 0.2，gspo 是 3e-4；cispo 不截下限", above=0, below=1
    )
    epsilon_high: float | None = arg(
        None,
        "比值截断的上限 1 + epsilon_high，不给则 0.28，gspo 是 4e-4；cispo 的上限就是它自己，不给则 5",
        above=0,
        high=100,
    )
    beta: float = arg(0.0, "与参考模型的 KL 的系数；0 则不载入参考模型", low=0, high=1000)
    mask_truncated: int = arg(0, "写到上限还没结束的回答不参与更新（仍参与组内比较）", (0, 1))
    dynamic_sampling: int = arg(0, "全组同分的提示不参与更新，也不进分母", (0, 1))

    save_weight: str = override(RLArguments, "save_weight", "grpo")
    accumulation_steps: int = override(RLArguments, "accumulation_steps", 8)

    def __post_init__(self):
        super().__post_init__()
        if self.loss_type == "cispo" and self.epsilon_high is not None and self.epsilon_high < 1:
            raise UserError(
                f"值是 {self.epsilon_high:g}，cispo 的上限就是它自己，没有变的概率（比值 1）也被截",
                where="--epsilon_high",
                expected="不小于 1，通常是 5",
                fix="去掉它，或换一个 --loss_type（那里的上限是 1 + epsilon_high）",
            )
        if self.epsilon is None:
            self.epsilon = CLIPS.get(self.loss_type, DEFAULT_CLIP)[0]
        if self.num_generations < 2:
            raise UserError(
                f"值是 {self.num_generations}",
                where="--num_generations",
                expected="至少为 2：组内要有得比",
                fix="改成 4 到 16，或用 minimind spo（单条采样）",
            )


def learnable_rows(experience: Experience, args: GRPOArguments) -> list[int]:
    """参与更新的回答。"""
    flat = zero_spread(experience.scores, args.num_generations).repeat_interleave(args.num_generations)
    return [
        i
        for i, (same, cut) in enumerate(zip(flat.tolist(), experience.rollout.truncated))
        if not (args.dynamic_sampling and same) and not (args.mask_truncated and cut)
    ]


def run(args: GRPOArguments) -> TrainResult:
    """按参数训练一次；返回权重位置与最后的指标。"""
    stage = open_stage(args, kl=args.beta)
    collector = Collector(args, stage.tokenizer, stage.train_ds, stage.rewards)
    reference = frozen_copy(stage.model) if args.beta else None
    loss, count = policy_loss(args, args.loss_type)

    def prepare(run: Run, window: Window) -> Iterator[Window]:
        experience = collector.collect(run, prompts_of(window))
        advantages = group_advantages(
            experience.scores,
            args.num_generations,
            args.scale_rewards,
            global_moments(experience.scores, run),
        )
        experience.per_token["advantages"] = experience.spread(advantages)
        if reference is not None:
            experience.per_token["ref_logps"] = response_logps(reference, experience, run, args)
        rows = learnable_rows(experience, args)
        run.record(kept=(len(rows), len(experience.scores)))
        yield experience.micro_batches(rows, args.rows_per_forward)

    recipe = Recipe("grpo", loss, no_batch, count, prepare)
    return train_stage(args, stage, recipe)


main = entry(GRPOArguments, run)
