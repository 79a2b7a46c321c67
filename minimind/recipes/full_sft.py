"""全参数监督微调（SFT）：让会接话的模型学会答话。

一段对话按模板写成一串词，损失仍是交叉熵，但只落在助手说的话上::

    L = − (1/N) · Σ_t m_t · log p_θ(x_t | x_<t)，   N = Σ_t m_t

m_t = 1 当且仅当 x_t 属于某个助手回合的正文（含推理与工具调用）或结束它的 ``<|im_end|>``。问题、系统提示、
工具结果和模板本身只当上文，不当目标：模型学的是怎么答，不是怎么问；学了结束符才知道何时停。
掩码来自渲染时的结构，不靠在文本里找记号，所以使用者打出 ``<|im_end|>`` 也不会弄错边界。

若干段对话装进一行（打包），注意力不越过对话边界。

来源：Ouyang et al. 2022（InstructGPT 的第一步）。
"""

from __future__ import annotations

from dataclasses import dataclass

from minimind.arguments import override
from minimind.dataset import SFTDataset, collate_packed
from minimind.recipes.entry import entry, open_datasets, open_model
from minimind.trainer.loop import TrainResult, train
from minimind.trainer.recipe import Recipe, language_model_loss
from minimind.trainer.train_args import TrainArguments


@dataclass
class SFTArguments(TrainArguments):
    """监督微调：在预训练权重上学会按对话回答。"""

    save_weight: str = override(TrainArguments, "save_weight", "full_sft")
    from_weight: str = override(TrainArguments, "from_weight", "pretrain")
    epochs: int = override(TrainArguments, "epochs", 2)
    batch_size: int = override(TrainArguments, "batch_size", 16)

    # 预训练的三分之一：再大会冲掉预训练记住的东西（微世界里留出的事实问答从七成掉到两成）
    LEARNING_RATE_TIMES_WIDTH = 0.5


def run(args: SFTArguments) -> TrainResult:
    """按参数训练一次；返回权重位置与最后的指标。"""
    model, tokenizer = open_model(args)
    data = open_datasets(SFTDataset, args, tokenizer)
    recipe = Recipe("full_sft", language_model_loss, collate_packed)
    return train(args, recipe, model, tokenizer, data)


main = entry(SFTArguments, run)
