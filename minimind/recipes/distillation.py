"""知识蒸馏：让小模型学大模型的整张概率表，而不只是标准答案那一个词。

标准答案只说“下一个词是甲”，教师还说“乙也行，丙绝不行”，信息多得多，小模型学得又快又稳::

    L = α·CE(q₁, 真词) + (1 − α)·T²·KL(p_T ‖ q_T)，   p_T = softmax(教师 logits / T)，q_T 同理

求和走遍目标词元（助手说的话，与 SFT 相同），再除以它们的总数。温度 T > 1 把分布摊平，次要的词也看得见；
乘 T² 使梯度的大小不随 T 变。``--divergence`` 可换成反向 KL 或广义 JSD，公式见 :mod:`minimind.objectives.distillation`。

``--on_policy λ``：有 λ 的机会不用数据里的回答，而让学生自己答，教师在学生走到的地方教它（GKD）。
自己的回答没有“真词”，那些批只有散度一项。

教师与学生可以一大一小、一个混合专家一个稠密，但分词器必须相同：概率表要逐词对得上。
教师只做前向；两边的 logits 分块算，整块 ``[N, V]`` 从不存在。

来源：Hinton et al. 2015，arXiv 1503.02531；Agarwal et al. 2024（GKD），arXiv 2306.13649。
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from minimind.arguments import arg, override
from minimind.dataset import SFTDataset, collate_packed
from minimind.dataset.collate import model_inputs, target_places
from minimind.model_arguments import ON_OFF
from minimind.objectives.distillation import DIVERGENCES, chunked_loss, distillation_loss
from minimind.recipes.entry import entry, open_datasets, open_model
from minimind.recipes.health import distillation_health
from minimind.recipes.teacher import choose_models, load_teacher, own_answers
from minimind.rl.rollout import LocalRollout
from minimind.trainer.loop import TrainResult, train
from minimind.trainer.recipe import LossResult, Recipe
from minimind.trainer.reference import weights_hash
from minimind.trainer.train_args import LAYERS, MAX_LENGTH, WIDTHS, TrainArguments


@dataclass
class DistillationArguments(TrainArguments, group="蒸馏"):
    """知识蒸馏：小模型跟着大模型学。"""

    save_weight: str = override(TrainArguments, "save_weight", "full_dist")
    epochs: int = override(TrainArguments, "epochs", 6)
    max_seq_len: int = override(TrainArguments, "max_seq_len", 512)

    alpha: float = arg(0.2, "标准答案的份量；其余 1 − alpha 给教师", low=0, high=1)
    temperature: float = arg(1.0, "摊平两边分布的温度，通常 1 到 4", above=0, high=100)
    divergence: str = arg("forward", "与教师的距离：forward、reverse（KL 的两个方向）或 jsd", DIVERGENCES)
    jsd_beta: float = arg(0.5, "jsd 里教师的份量", above=0, below=1)
    on_policy: float = arg(0.0, "λ：这么大比例的批由学生自己作答，教师来教", low=0, high=1)
    max_gen_len: int = arg(128, "学生自己作答时最多写多少个词元", low=1, high=MAX_LENGTH)

    student_hidden_size: int | None = arg(
        None, "学生的宽度；不给则 512，教师也只有这么宽（或更窄）时取它的一半", **WIDTHS, resume="content"
    )
    student_num_layers: int | None = arg(
        None, "学生的层数；不给则 8，教师也只有这么宽（或更窄）时取它的一半", **LAYERS, resume="content"
    )
    student_use_moe: int = arg(0, "学生是否用混合专家（0 否，1 是）", ON_OFF, resume="content")
    from_student_weight: str | None = arg(
        None,
        "学生从哪个权重开始；不给则依次找同尺寸的 full_sft、pretrain，都没有就从头训练；none 从头训练",
        text="name",
        resume="content",
    )
    teacher_hidden_size: int | None = arg(
        None, "教师的宽度；不给则 768，没有这样的权重就用现有最大的", **WIDTHS, resume="content"
    )
    teacher_num_layers: int | None = arg(
        None, "教师的层数；不给则由权重旁的 JSON 决定", **LAYERS, resume="content"
    )
    teacher_use_moe: int | None = arg(
        None, "教师是否用混合专家（0 否，1 是）；不给则由找到的权重决定", ON_OFF, resume="content"
    )
    from_teacher_weight: str = arg("full_sft", "教师用哪个权重", text="name", resume="content")

    LEARNING_RATE_TIMES_WIDTH = 0.5

    def usual_learning_rate(self) -> None:
        """随学生的宽度与起点而定，要看过有哪些权重才知道，见 :func:`minimind.recipes.teacher.choose_models`。"""


def distill_loss(
    model: nn.Module, batch: dict[str, Any], args: DistillationArguments, student, teacher
) -> LossResult:
    """训练循环要的 ``(损失和, metrics)``，分母是目标数。

    Args:
        model: 学生，或它的 DDP 包装；``student`` 是没包装的，取输出头用。
        batch: SFT 的打包行；``on_policy`` 为真的批是学生自己的回答，没有交叉熵。
        teacher: 教师，不求梯度。
    """
    inputs = model_inputs(batch)
    places = target_places(batch)
    targets = batch["labels"].flatten()[places + 1]
    out = model(**inputs, return_logits=False)
    with torch.no_grad():
        guide = teacher(**inputs, return_logits=False).hidden_states.flatten(0, 1).index_select(0, places)
    own = batch.get("on_policy", False)
    loss_of = partial(
        distillation_loss,
        alpha=args.alpha,
        temperature=args.temperature,
        kind=args.divergence,
        jsd_beta=args.jsd_beta,
        with_ce=not own,
    )
    hidden = out.hidden_states.flatten(0, 1).index_select(0, places)
    loss, parts = chunked_loss(
        hidden, student.lm_head.weight, guide, teacher.lm_head.weight, targets, loss_of
    )
    if own:  # 自己的回答上交叉熵就是熵，与数据上的不能放在一起平均；这一项留着，各进程归约的项数才相同
        parts["ce"] = (0.0, 0)
    return loss + out.aux_loss * len(targets), parts


def run(args: DistillationArguments) -> TrainResult:
    """按参数训练一次；返回权重位置与最后的指标。"""
    chosen = choose_models(args)  # 学生多大、从哪里开始、学习率多少，没写明的看现有的权重
    student, tokenizer = open_model(args)
    teacher = load_teacher(chosen, args, student.config, student.device)
    data = open_datasets(SFTDataset, args, tokenizer)
    prepare = None
    if args.on_policy:
        rollout = LocalRollout(student, tokenizer, max_new_tokens=args.max_gen_len)
        prepare = partial(own_answers, share=args.on_policy, seed=args.seed, rollout=rollout)
    recipe = Recipe(
        "distillation",
        partial(distill_loss, args=args, student=student, teacher=teacher),
        collate_packed,
        prepare=prepare,
        health=distillation_health,
        identity={"教师": weights_hash(teacher)},
    )
    return train(args, recipe, student, tokenizer, data)


main = entry(DistillationArguments, run)
