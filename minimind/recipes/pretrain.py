"""预训练：让模型学会接着往下写。

给定一段文字 x₁…x_T，模型逐词给出下一个词的分布，损失是真正的下一个词的负对数概率（交叉熵）::

    L = − (1/N) · Σ log p_θ(x_t | x_1 … x_{t−1})

求和走遍这一个优化步里的所有目标词（全部微批次、全部进程），N 是它们的总数，所以批次怎么切、卡怎么分都不影响
结果。混合专家模型再加负载均衡损失。刚初始化的模型对 6400 个词一视同仁，损失应当接近 ln 6400 ≈ 8.76。

每篇文档写成 ``<|im_start|> 正文 <|im_end|>``，若干篇装进一行（打包），注意力与位置编码都不越过文档边界；
太长的文档切成几段而不是截断，每个词恰好当一次目标。

来源：Bengio et al. 2003（神经语言模型）；Radford et al. 2018（生成式预训练）。
"""

from __future__ import annotations

from dataclasses import dataclass

from minimind.dataset import PretrainDataset, collate_packed
from minimind.recipes.entry import entry, open_datasets, open_model
from minimind.trainer.loop import TrainResult, train
from minimind.trainer.recipe import Recipe, language_model_loss
from minimind.trainer.train_args import TrainArguments


@dataclass
class PretrainArguments(TrainArguments):
    """预训练：从纯文本学会接着往下写。"""


def run(args: PretrainArguments) -> TrainResult:
    """按参数训练一次；返回权重位置与最后的指标。"""
    model, tokenizer = open_model(args)
    data = open_datasets(PretrainDataset, args, tokenizer)
    recipe = Recipe("pretrain", language_model_loss, collate_packed)
    return train(args, recipe, model, tokenizer, data)


main = entry(PretrainArguments, run)
