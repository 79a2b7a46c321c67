"""奖励模型：由“哪个更好”的标注学会打分，分数再交给 PPO、GRPO、SPO 去追（RLHF 的第二步）。

主干接一个标量头，读完整段对话，在回答的最后一个词元处给出 r(x, y)。人的选择按 Bradley–Terry 来：好的被选中的概率是
σ(r_w − r_l)，所以::

    L = mean [ − log σ(r_w − r_l)  +  center·(r_w + r_l)² ]

前一项只管差，后一项把零点定在好坏之间。头从零开始，开头处处 0 分，损失恰好 ln 2 = 0.693。DPO 的损失就是把 r 换成
β·log(π/μ) 的同一个式子（:mod:`minimind.recipes.dpo`）；数据也是同一份。

用法：``python trainer/train_grpo.py --reward_model_path out/reward_512.pth``。看 ``val_accuracy``：留出的对里好的分高的比例。

来源：Ouyang et al. 2022（InstructGPT，arXiv 2203.02155，式 1）；center 一项：Eisenstein et al. 2023，arXiv 2312.09244，式 4。
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from minimind.arguments import arg, override
from minimind.dataset import DPODataset
from minimind.errors import UserError
from minimind.objectives.preference import reward_model_loss
from minimind.recipes.entry import entry, open_datasets, open_model
from minimind.recipes.health import ranking_health
from minimind.rl.reward_net import RewardNet, score_rows
from minimind.runtime.weights import REWARD
from minimind.trainer.loop import TrainResult, train
from minimind.trainer.recipe import LossResult, Recipe
from minimind.trainer.samples import is_count
from minimind.trainer.train_args import TrainArguments


@dataclass
class RewardModelArguments(TrainArguments, group="奖励模型"):
    """奖励模型：由好坏成对的回答学会打分。"""

    save_weight: str = override(TrainArguments, "save_weight", "reward")
    from_weight: str = override(TrainArguments, "from_weight", "full_sft")
    epochs: int = override(TrainArguments, "epochs", 1)
    batch_size: int = override(TrainArguments, "batch_size", 16)
    max_seq_len: int = override(TrainArguments, "max_seq_len", 1024)
    sample_prompts: str = override(
        TrainArguments,
        "sample_prompts",
        "3",
        help="每次验证时给前几对留出的回答打分，打印并写进日志：几对；0 不要",
    )

    center: float = arg(0.01, "把零点定在好坏之间的那一项的系数；0 则分数可以整体漂移", low=0, high=1000)

    LEARNING_RATE_TIMES_WIDTH = 0.06

    def __post_init__(self):
        super().__post_init__()
        if not is_count(self.sample_prompts):
            raise UserError(
                f"值是 {self.sample_prompts}",
                where="--sample_prompts",
                expected="一个数：奖励模型不作答，样例是给留出的回答打分",
                fix="写 3，或 0 不要样例",
            )


def reward_loss(model: nn.Module, batch: dict[str, Any], args: RewardModelArguments) -> LossResult:
    """训练循环要的 ``(损失和, metrics)``，分母是对数；``model`` 是 :class:`RewardNet` 或它的包装。"""
    scores, aux_loss = model(batch)
    result = reward_model_loss(scores, args.center)
    return result.losses.sum() + aux_loss * batch["num_pairs"], result.metrics()


def count_pairs(batch: dict[str, Any]) -> float:
    """分母：这一批里的对数。"""
    return float(batch["num_pairs"])


def scored_pairs(pairs: DPODataset, number: int) -> Callable[[nn.Module, int], dict[str, Any]]:
    """``on_eval``：给前 ``number`` 对打分，当作样例。"""
    items = [pairs[i] for i in range(min(number, len(pairs)))]
    rows = [(item[side], item[f"{side}_labels"]) for item in items for side in ("chosen", "rejected")]

    def answer(model: nn.Module, step: int) -> dict[str, Any]:
        scores = score_rows(model, rows, len(rows), pairs.pad_id) if rows else []
        shown = []
        for i, (good, bad) in enumerate(zip(scores[::2], scores[1::2])):
            question, better, worse = pairs.words(i)
            shown.append({"prompt": question, "answer": f"{good:+.2f} {better}｜{bad:+.2f} {worse}"})
        return {"samples": shown}

    return answer


def run(args: RewardModelArguments) -> TrainResult:
    """按参数训练一次；返回权重位置与最后的指标。"""
    model, tokenizer = open_model(args)
    data = open_datasets(DPODataset, args, tokenizer)
    recipe = Recipe(
        REWARD,
        partial(reward_loss, args=args),
        data.train.collate,
        count=count_pairs,
        health=ranking_health,
        on_eval=scored_pairs(data.val or data.train, int(args.sample_prompts)),
    )
    return train(args, recipe, RewardNet(model), tokenizer, data)


main = entry(RewardModelArguments, run)
