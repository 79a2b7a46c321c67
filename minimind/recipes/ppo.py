"""PPO：价值网络估计“写到这里大约能得几分”，策略按比它估计的好了多少来学。

逐词元奖励是 −kl_coef·(logp − logp_ref)，整条的得分加在最后一个回答词元上。价值网络有自己的主干，由它得优势与回报::

    δ_t = r_t + γ·V_{t+1} − V_t，  A_t = δ_t + γλ·A_{t+1}，  R_t = A_t + V_t     （γ = 1，λ = 0.95）
    L = (1/N) Σ_t [ − min(ρ·Â, clip(ρ, 1 − ε, 1 + ε)·Â)  +  vf_coef · 0.5·max((V − R)², (V_截 − R)²) ]

Â 是 A 在所有进程上减平均、除以标准差；R 用白化之前的 A。同一批采样分几个小批、走几轮；每个小批更新之前先量一量
策略离采样时有多远，超过 ``--target_kl`` 就连这一步也不走，剩下的都不要了。

``{save_weight}``（默认 ppo_actor）只有策略，价值网络在续训存档里。

来源：Schulman 2017，arXiv 1707.06347；GAE：Schulman 2016，arXiv 1506.02438；用于语言模型：Ouyang 2022，InstructGPT。
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from torch import nn

from minimind.arguments import arg, override
from minimind.errors import UserError
from minimind.objectives.policy import (
    clipped_loss,
    explained_variance,
    gae,
    k3,
    token_rewards,
    value_loss,
    whiten,
)
from minimind.ranges import MANY
from minimind.recipes.entry import entry
from minimind.recipes.rl import no_batch, open_stage, train_stage
from minimind.rl.actor_critic import ActorCritic, actor_of
from minimind.rl.arguments import RLArguments
from minimind.rl.experience import Collector, Experience, global_moments, minibatches, prompts_of
from minimind.rl.policy import drift, frozen_copy, mean_drift, per_token, response_logps
from minimind.runtime.device import mix_seeds
from minimind.runtime.distributed import rank
from minimind.trainer.loop import TrainResult
from minimind.trainer.recipe import Batch, LossResult, Recipe, Run, Window


@dataclass
class PPOArguments(RLArguments, group="PPO"):
    """PPO：策略与价值网络，截断的更新。"""

    clip_epsilon: float = arg(0.2, "比值截断在 1 ± clip_epsilon", above=0, below=1)
    value_clip: float = arg(0.2, "价值每次更新至多离采样时这么远", above=0, high=MANY)
    vf_coef: float = arg(0.5, "价值损失的系数", low=0, high=1000)
    kl_coef: float = arg(0.02, "逐词元 KL 惩罚的系数；0 则不载入参考模型", low=0, high=1000)
    critic_learning_rate: float | None = arg(
        None, "价值网络的学习率；不给则与策略相同", low=0, high=1, resume="noted"
    )
    gamma: float = arg(1.0, "折扣", low=0, high=1)
    lam: float = arg(0.95, "GAE 的 lambda", low=0, high=1)
    ppo_epochs: int = arg(2, "同一批采样走几轮", low=1, high=1000)
    minibatches: int = arg(2, "每轮分成几个小批，各更新一次", low=1, high=65536)
    target_kl: float = arg(
        0.1, "策略离采样时的 KL 超过它就停下，不再用这批采样；0 表示不查", low=0, high=1000
    )

    save_weight: str = override(RLArguments, "save_weight", "ppo_actor")
    num_generations: int = override(RLArguments, "num_generations", 1)
    accumulation_steps: int = override(RLArguments, "accumulation_steps", 64)

    def __post_init__(self):
        super().__post_init__()
        if self.critic_learning_rate is None:
            self.critic_learning_rate = self.learning_rate
        if self.critic_learning_rate and not self.learning_rate:
            raise UserError(
                f"值是 {self.critic_learning_rate:g}，而 --learning_rate 是 0",
                where="--critic_learning_rate",
                expected="策略的学习率大于 0：价值网络的学习率随它的日程走",
                fix="给一个大于 0 的 --learning_rate",
            )
        rollouts = self.batch_size * self.accumulation_steps * self.num_generations
        if self.minibatches > rollouts:
            raise UserError(
                f"值是 {self.minibatches}",
                where="--minibatches",
                expected=f"不超过一步采样的 {rollouts} 条（batch_size × accumulation_steps × num_generations）",
                fix="减小它，或每步多采样几条",
            )


def estimate(run: Run, experience: Experience, reference: nn.Module | None, args: PPOArguments) -> None:
    """价值、逐词元奖励、优势与回报，放进 ``experience.per_token``；记下 KL 与解释方差。"""
    logp, n = experience.old_logps, len(experience.old_logps)
    ref_logp = logp if reference is None else response_logps(reference, experience, run, args)
    values = per_token(lambda batch: run.model.critic(batch)[0], experience, run, args.rows_per_forward)
    rewards = token_rewards(experience.scores, logp, ref_logp, experience.lengths, args.kl_coef)
    advantages, returns = gae(rewards, values, experience.lengths, args.gamma, args.lam)
    experience.per_token = {
        "advantages": whiten(advantages, global_moments(advantages, run)),
        "returns": returns,
        "old_values": values,
    }
    explained = explained_variance(global_moments(returns - values, run), global_moments(returns, run))
    run.record(explained_variance=(explained, 1))
    if reference is not None:
        run.record(kl=(float(k3(logp, ref_logp).sum()), n))


def ppo_loss(model: nn.Module, batch: Batch, args: PPOArguments) -> LossResult:
    """策略与价值的损失之和，分母是回答的词元数；``model`` 是 :class:`ActorCritic` 或它的包装。"""
    policy, values, critic_aux = model(batch)
    logp, entropy = policy.logprobs_and_entropy(args.temperature)
    n, clip = policy.targets.numel(), args.clip_epsilon
    loss, clipped = clipped_loss(logp, batch["old_logps"], batch["advantages"], clip, clip)
    critic = value_loss(values, batch["old_values"], batch["returns"], args.value_clip).sum()
    metrics = {
        "value_loss": critic.detach(),
        "clip_share": clipped.sum(),
        "approx_kl": drift(logp, batch["old_logps"]).sum(),
        "entropy": entropy.sum(),
    }
    return loss.sum() + args.vf_coef * critic + (policy.aux_loss + critic_aux) * n, metrics


def run(args: PPOArguments) -> TrainResult:
    """按参数训练一次；返回权重位置与最后的指标。"""
    stage = open_stage(args, kl=args.kl_coef)
    collector = Collector(args, stage.tokenizer, stage.train_ds, stage.rewards, policy=actor_of)
    reference = frozen_copy(stage.model) if args.kl_coef else None

    def prepare(run: Run, window: Window) -> Iterator[Window]:
        experience = collector.collect(run, prompts_of(window))
        estimate(run, experience, reference, args)
        updates, stopped = 0, False
        for epoch in range(args.ppo_epochs):
            seed = mix_seeds(args.seed, run.state.step, rank(), epoch)
            for rows in minibatches(len(experience.scores), args.minibatches, seed):
                if args.target_kl and updates and not stopped:
                    stopped = mean_drift(run.model.actor, experience.select(rows), run, args) > args.target_kl
                if stopped:
                    break
                updates += 1
                yield experience.micro_batches(rows, args.rows_per_forward)
        run.record(updates=(updates, 1), early_stop=(float(stopped), 1))

    critic_scale = args.critic_learning_rate / args.learning_rate if args.learning_rate else 1.0
    recipe = Recipe(
        "ppo",
        partial(ppo_loss, args=args),
        no_batch,
        prepare=prepare,
        weights_of=lambda model: model.actor.state_dict(),
        lr_scales={"critic.": critic_scale},
    )
    return train_stage(args, stage, recipe, model=ActorCritic(stage.model), policy=actor_of)


main = entry(PPOArguments, run)
