"""策略的前向：对数概率、损失与参考模型；GRPO、SPO 的损失都是这一个，PPO 用其中的零件。"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from minimind.console import say
from minimind.dataset.collate import to_device
from minimind.objectives.logprobs import target_logits
from minimind.objectives.policy import CLIPS, grpo_loss, token_weights
from minimind.rl.experience import Experience, global_moments
from minimind.rl.rollout import response_batch
from minimind.runtime.device import autocast_context
from minimind.trainer.recipe import Batch, LossResult, Run


def frozen_copy(model: nn.Module) -> nn.Module:
    """此刻的权重，不再变：参考模型。"""
    return copy.deepcopy(model).eval().requires_grad_(False)


def drift(logp: Tensor, old_logp: Tensor) -> Tensor:
    """KL(采样时的策略 ‖ 现在的策略) 的逐词元估计 ``ρ − 1 − ln ρ``（k3），``[N]``。

    一次采样只更新一次时它该近 0：不是 0 就是采样与训练的数值有出入。
    """
    log_ratio = (logp - old_logp).detach()
    return log_ratio.exp() - 1 - log_ratio


def policy_loss(args: Any, loss_type: str) -> tuple[Callable, Callable]:
    """配方的 ``loss`` 与 ``count``。

    批里要有 :meth:`minimind.rl.experience.Experience.batch` 的键，另有 ``advantages`` ``[N]``，
    ``args.beta`` 不为 0 时还有 ``ref_logps`` ``[N]``。

    Args:
        args: 需要 ``temperature beta epsilon epsilon_high max_gen_len``。
        loss_type: 见 :func:`minimind.objectives.policy.token_weights`。
    """
    if loss_type == "cispo" and args.epsilon not in (None, CLIPS["cispo"][0]):  # 公共项目的命令照收
        say(f"留意：--loss_type cispo 不截下限，--epsilon {args.epsilon:g} 用不到。")

    def count(batch: Batch) -> float:
        return token_weights(batch["lengths"], loss_type, args.max_gen_len)[1]

    def loss(model: nn.Module, batch: Batch) -> LossResult:
        weights, number = token_weights(batch["lengths"], loss_type, args.max_gen_len)
        out = target_logits(model, batch)
        logp, entropy = out.logprobs_and_entropy(args.temperature)
        total, sums = grpo_loss(
            logp,
            batch["old_logps"],
            batch["advantages"],
            weights.to(logp.device),
            loss_type=loss_type,
            epsilon=args.epsilon,
            epsilon_high=args.epsilon_high,
            beta=args.beta,
            ref_logp=batch.get("ref_logps"),
            lengths=batch["lengths"],
        )
        sums["approx_kl"] = drift(logp, batch["old_logps"]).sum()
        sums["entropy"] = entropy.sum()
        metrics = {name: (value, logp.numel()) for name, value in sums.items()}
        return total + out.aux_loss * number, metrics

    return loss, count


@torch.no_grad()
def response_logps(model: nn.Module, experience: Experience, run: Run, args: Any) -> Tensor:
    """``[N]``：``model`` 给各回答词元的对数概率，采样温度下；参考模型与策略的漂移都由它算。

    Args:
        args: 需要 ``temperature rows_per_forward``。
    """

    def logps(batch: Batch) -> Tensor:
        return target_logits(model, batch).logprobs(args.temperature)

    was_training = model.training
    model.eval()  # 有 dropout 的模型也要给出确定的值
    values = per_token(logps, experience, run, args.rows_per_forward)
    model.train(was_training)
    return values


def mean_drift(model: nn.Module, experience: Experience, run: Run, args: Any) -> float:
    """所有进程的回答词元上 :func:`drift` 的平均；各进程得到同一个数，可以据此一起停下。"""
    gaps = drift(response_logps(model, experience, run, args), experience.old_logps)
    count, total, _ = global_moments(gaps, run).tolist()
    return total / max(count, 1.0)


@torch.no_grad()
def per_token(forward: Callable[[Batch], Tensor], experience: Experience, run: Run, size: int) -> Tensor:
    """分批跑 ``forward(batch) -> [n]``，按 ``experience`` 的次序排回 ``[N]``，在 CPU 上。"""
    lengths = experience.lengths
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    results = [torch.zeros(0)] * len(lengths)
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        batch = to_device(response_batch(experience.rollout, rows, experience.pad_id), run.device, run.dtype)
        with autocast_context(run.device, run.dtype):
            values = forward(batch).float().cpu()
        for row, part in zip(rows, values.split([lengths[i] for i in rows])):
            results[row] = part
    return torch.cat([*results, torch.zeros(0)])
