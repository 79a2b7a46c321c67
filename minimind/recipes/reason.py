"""推理微调：先把过程写在 ``<think>`` 里，再把结论写在 ``<answer>`` 里。

一步说出答案要求模型在一次前向里算完；把中间结果写出来，每一步都能看见前面写过的数（Wei et al. 2022，
arXiv 2201.11903）。损失是助手词元上的加权交叉熵，四个标签各只有一个词元，却决定格式的成败，所以加重::

    L = − Σ_t w_t · m_t · log p_θ(x_t | x_<t)  /  Σ_t w_t · m_t，   w_t = 10（x_t 是四个标签之一），否则 1

m_t 同监督微调（含结束回合的 ``<|im_end|>``，模型由它学会停）。加权看的是 *单个词元的编号*，不是文字：使用者在问题里
打出 ``<think>`` 只是普通字符，何况那里 m_t = 0。

数据里推理可以写在 ``reasoning_content`` 字段，也可以直接写在 ``content`` 里（公共项目的写法）。
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minimind.arguments import arg, override
from minimind.console import say
from minimind.dataset import SFTDataset, collate_packed
from minimind.recipes.entry import entry, open_datasets, open_model
from minimind.tokenizer.loading import codec_of
from minimind.tokenizer.special import ANSWER, END_ANSWER, END_THINK, THINK
from minimind.trainer.loop import TrainResult, train
from minimind.trainer.recipe import Recipe, language_model_loss
from minimind.trainer.train_args import TrainArguments

REASON_TAGS = (THINK, END_THINK, ANSWER, END_ANSWER)


@dataclass
class ReasonArguments(TrainArguments, group="推理"):
    """推理微调：先想（<think>）再答（<answer>）。"""

    tag_weight: float = arg(10.0, "四个标签词元的损失权重；1 表示与别的词元一样", above=0, high=1000)
    save_weight: str = override(TrainArguments, "save_weight", "reason")
    from_weight: str = override(TrainArguments, "from_weight", "full_sft")
    batch_size: int = override(TrainArguments, "batch_size", 8)

    # 微世界里 100 步：0.25 时多步题答对 86 %、简单题 84 %（底座 85 %），0.5 时 95 % 与 74 %，取中间
    LEARNING_RATE_TIMES_WIDTH = 0.3


def tag_ids(tokenizer: Any) -> list[int]:
    """四个标签的词元编号；分词器没有设成单个词元的标签不在其中。"""
    controls = codec_of(tokenizer).controls
    return [controls[tag] for tag in REASON_TAGS if tag in controls]


def tag_weights(labels: Tensor, ids: list[int], weight: float) -> Tensor:
    """每个目标的损失权重。

    Args:
        labels: ``[B, T]``，-100 不是目标。
        ids: 要加重的词元编号。
        weight: 它们的权重，其余为 1。

    Returns:
        ``[B, T]`` float32。
    """
    is_tag = torch.isin(labels, torch.tensor(ids, dtype=labels.dtype))
    return torch.where(is_tag, weight, 1.0)


def weighted(collate: Callable[[list[Any]], dict[str, Any]], ids: list[int], weight: float) -> Callable:
    """给拼好的批加上 ``loss_weights``；损失的分母随之是权重之和。

    不用函数里的函数：它送不进另起的读数据进程（macOS、Windows 的子进程都是另起的）。
    """
    return partial(_with_weights, collate, ids, weight)


def _with_weights(collate: Callable, ids: list[int], weight: float, rows: list[Any]) -> dict[str, Any]:
    batch = collate(rows)
    return {**batch, "loss_weights": tag_weights(batch["labels"], ids, weight)}


def tag_words(dataset: Any, ids: list[int], rows: int = 64) -> str:
    """开训前的一句话：目标里标签占多少；没有标签时说清加权不起作用。"""
    labels = torch.cat([dataset[i]["labels"] for i in range(min(rows, len(dataset)))])
    targets, tags = int((labels >= 0).sum()), int(torch.isin(labels, torch.tensor(ids)).sum())
    if not tags:
        return "留意：看过的目标里没有 <think>、<answer> 标签，加权不起作用；数据要有 reasoning_content 或在正文里写标签。"
    return f"推理标签占目标的 {tags / targets:.1%}。"


def run(args: ReasonArguments) -> TrainResult:
    """按参数训练一次；返回权重位置与最后的指标。"""
    model, tokenizer = open_model(args)
    ids = tag_ids(tokenizer)
    if len(ids) < len(REASON_TAGS):
        say("留意：这个分词器没有把 <think> 等标签都设成单个词元，缺的那些不加权。")
    data = open_datasets(SFTDataset, args, tokenizer, "reason")
    say(tag_words(data.train, ids))
    recipe = Recipe("reason", language_model_loss, weighted(collate_packed, ids, args.tag_weight))
    return train(args, recipe, model, tokenizer, data)


main = entry(ReasonArguments, run)
