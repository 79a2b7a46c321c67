"""直接偏好优化（DPO）：给同一个问题一好一坏两个回答，让模型更愿意说好的那个。

RLHF 先训奖励模型，再拿它做强化学习。DPO 证明这两步可以合成一步：最优策略与奖励一一对应，
r(x, y) = β·log(π(y|x) / μ(y|x)) + 与 y 无关的一项，于是“好的奖励高于坏的”直接就是一个分类损失::

    h = [log π(y_w|x) − log μ(y_w|x)] − [log π(y_l|x) − log μ(y_l|x)]
    L = − mean log σ(β·h)

π 是正在训练的策略，μ 是不动的参考模型（从同一个权重出发，所以开头 h = 0、损失 ln 2 = 0.693），y_w、y_l 是好坏
两个回答，log π(y|x) 在整个回答（含结束符）上求 *和*。β 大则离参考模型近。``--sft_coef`` 另加好回答的交叉熵
（RPO，Pang 2024，arXiv 2404.19733，式 1），好回答自己的概率才不会跟着跌。

同一页上换一个损失（``--loss_type``）就是别的算法，公式见 :mod:`minimind.objectives.preference`：按词元平均的 ``ipo``、
长度归一的 ``sigmoid_norm``；不要参考模型的 ``orpo``、``simpo``；不要成对的 ``kto``（:mod:`minimind.recipes.unpaired`）。

参考模型不变，它的对数概率训练前算一遍存着（:mod:`minimind.trainer.reference`），显存里只有一个模型；
``orpo`` 与 ``simpo`` 连这一遍也不要。

来源：Rafailov et al. 2023，arXiv 2305.18290，式 7。
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from minimind.arguments import arg, override
from minimind.dataset import DPODataset, KTODataset
from minimind.model_arguments import ON_OFF
from minimind.objectives import preference
from minimind.recipes.entry import entry, open_datasets, open_model
from minimind.recipes.health import preference_health
from minimind.recipes.unpaired import count_answers, unpaired_loss, with_reference_point
from minimind.runtime.device import choose_dtype
from minimind.trainer.loop import TrainResult, train
from minimind.trainer.recipe import LossResult, Recipe
from minimind.trainer.reference import StartingPoint, with_reference
from minimind.trainer.train_args import TrainArguments, refuse_unused


@dataclass
class DPOArguments(TrainArguments, group="偏好优化"):
    """直接偏好优化：让模型更愿意说好的那个回答。"""

    save_weight: str = override(TrainArguments, "save_weight", "dpo")
    from_weight: str = override(TrainArguments, "from_weight", "full_sft")
    epochs: int = override(TrainArguments, "epochs", 1)
    batch_size: int = override(TrainArguments, "batch_size", 4)
    max_seq_len: int = override(TrainArguments, "max_seq_len", 1024)

    beta: float | None = arg(
        None,
        "离参考模型多近，大则近（orpo 是赔率一项的权重）；不给则 0.1，按词元平均的 sigmoid_norm 与 simpo 是 2",
        above=0,
        high=1000,
    )
    loss_type: str = arg(
        "sigmoid",
        "损失：sigmoid（标准）、sigmoid_norm（按长度归一）、ipo、orpo 与 simpo（不要参考模型）、kto（标了好坏、不必成对的回答）",
        preference.LOSS_TYPES,
    )
    label_smoothing: float = arg(
        0.0,
        "假定有这么大比例的偏好标反了（保守 DPO；只有 sigmoid、sigmoid_norm、simpo 用）",
        low=0,
        below=0.5,
    )
    simpo_gamma: float | None = arg(
        None, "simpo 的目标间隔：好的要比坏的高出这么多；不给则是 beta 的一半", low=0, high=1000
    )
    desirable_weight: float = arg(1.0, "kto 里好回答的权重；好坏条数悬殊时调", above=0, high=1000)
    undesirable_weight: float = arg(1.0, "kto 里坏回答的权重", above=0, high=1000)
    sft_coef: float = arg(
        0.0,
        "另加多少好回答的交叉熵（按词元平均，RPO）；好回答的概率也在跌、别的本事在丢时用，约 0.1 到 1；orpo 本来就有一份",
        low=0,
        high=1000,
    )
    cache_reference: int = arg(
        1,
        "参考模型的对数概率：1 训练前算一遍存着，0 训练时带着参考模型现算（多占一份权重）",
        ON_OFF,
        resume="rounding",
    )

    # 微调的五十分之一。192 宽、每步 4 对、300 步时，3e-4 会把别的任务从八成四冲到两成（docs/dpo.md）
    LEARNING_RATE_TIMES_WIDTH = 0.01

    def __post_init__(self):
        super().__post_init__()
        refuse_unused(self, "loss_type", preference.USED_BY)
        if self.beta is None:
            self.beta = preference.BETAS.get(self.loss_type, preference.DEFAULT_BETA)
        if self.loss_type == "simpo" and self.simpo_gamma is None:
            self.simpo_gamma = self.beta / 2


def dpo_loss(
    model: nn.Module, batch: dict[str, Any], args: DPOArguments, reference: nn.Module | None = None
) -> LossResult:
    """训练循环要的 ``(损失和, metrics)``，分母是对数；``reference`` 为 ``None`` 时用批里带着的参考值。"""
    policy = preference.sequence_logprobs(model, batch)
    if reference is None:
        reference_logps = batch.get("reference_logps")  # 不要参考模型的没有
    else:
        with torch.no_grad():
            reference_logps = preference.sequence_logprobs(reference, batch).logps
    options = {"loss_type": args.loss_type, "label_smoothing": args.label_smoothing}
    options |= {"beta": args.beta, "gamma": args.simpo_gamma or 0.0}
    result = preference.preference_loss(policy.logps, reference_logps, policy.lengths, **options)
    pairs = batch["num_pairs"]
    loss = result.losses.sum() + policy.aux_loss * pairs
    if args.sft_coef:
        loss = loss - args.sft_coef * (policy.logps / policy.lengths.clamp_min(1))[:pairs].sum()
    return loss, result.metrics()


def run(args: DPOArguments) -> TrainResult:
    """按参数训练一次；返回权重位置与最后的指标。"""
    model, tokenizer = open_model(args)
    unpaired = args.loss_type in preference.UNPAIRED
    needs_reference = args.loss_type not in preference.REFERENCE_FREE
    extra_state, reference = {}, None
    if needs_reference:
        extra_state = {"start": StartingPoint(args, model)}
        reference = None if args.cache_reference else copy.deepcopy(model).eval().requires_grad_(False)
    data = open_datasets(KTODataset if unpaired else DPODataset, args, tokenizer)
    if needs_reference:
        dtype = choose_dtype(args.dtype, model.device)  # CPU 上的 auto 是 float32：只算一遍，不必为它测速
        data = with_reference(data, model, 2 * args.batch_size, dtype, cached=reference is None)
    loss = partial(unpaired_loss if unpaired else dpo_loss, args=args, reference=reference)
    recipe = Recipe(
        "dpo",
        loss,
        data.train.collate,
        count=count_answers if unpaired else lambda batch: float(batch["num_pairs"]),
        prepare=with_reference_point(reference) if unpaired else None,
        health=preference_health if needs_reference else None,
        extra_state=extra_state,
    )
    return train(args, recipe, model, tokenizer, data)


main = entry(DPOArguments, run)
