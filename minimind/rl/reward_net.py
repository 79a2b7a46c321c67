"""自己训练的奖励模型：语言模型的主干接一个标量头，读完回答的最后一个词元给分。训练（:mod:`minimind.recipes.reward`）
与打分（:mod:`minimind.rl.reward_model`）共用；存成一份 ``.pth``，旁注里的 ``recipe`` 是 ``reward``。
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minimind.dataset.collate import IGNORE, collate_rows, model_inputs, to_device
from minimind.errors import UserError
from minimind.model import MiniMindLM
from minimind.model.kernels import autocast_off
from minimind.runtime.checkpoint import read_sidecar, sidecar_path
from minimind.runtime.weights import REWARD, check_tokenizer, fill, read_weights
from minimind.tokenizer import encode_chat_batch, load_tokenizer, tokenizer_fingerprint


class RewardNet(nn.Module):
    """主干与标量头。

    头从零开始，所以开始时处处给 0 分；写成向量而不是 ``[1, H]`` 的矩阵，Muon 才不会去正交化它。

    Args:
        policy: 语言模型，主干就用它的（不拷贝）；输出头不要了。
    """

    def __init__(self, policy: MiniMindLM):
        super().__init__()
        self.config, self.model = policy.config, policy.model
        device = next(policy.parameters()).device
        self.score_weight = nn.Parameter(torch.zeros(policy.config.hidden_size, device=device))
        self.score_bias = nn.Parameter(torch.zeros((), device=device))

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """``[S]`` fp32：每一行的分数，在最后一个目标（写完了的，是结束符）处读出；以及负载均衡损失（稠密模型为 0）。

        Args:
            batch: 见 :func:`minimind.dataset.collate.collate_rows`；一个目标也没有的行在第一个词元处读。
        """
        hidden, aux_loss = self.model(**model_inputs(batch))
        labels = batch["labels"]
        places = torch.arange(labels.shape[1], device=labels.device)
        last = torch.where(labels != IGNORE, places, 0).amax(dim=1)
        ends = hidden[torch.arange(len(labels), device=labels.device), last].float()
        with autocast_off(ends):
            return ends @ self.score_weight + self.score_bias, aux_loss


def open_reward_net(path: Path, where: str, tokenizer_path: str | None = None) -> tuple[RewardNet, Any]:
    """``.pth`` → ``(奖励模型, 分词器)``，内存里 fp32。

    Args:
        where: 报错里的称呼。

    Raises:
        UserError: 文件坏了，或它不是奖励模型。
    """
    from minimind.model import MiniMindForCausalLM

    sidecar = read_sidecar(path) or {}
    if sidecar.get("recipe") != REWARD:  # 没有旁注的也到此为止：从形状看不出它是怎么打分的
        made_by, fix = (
            sidecar.get("recipe"),
            "先运行 python trainer/train_reward.py，再用它写出的 out/reward_….pth",
        )
        if made_by:
            kind = f"是 {made_by} 训练的语言模型，没有打分头"
        else:
            kind = f"没有旁注 {sidecar_path(path).name}，认不出是奖励模型"
            fix = f"把训练时写在它旁边的 JSON 一起拿来；没有了就{fix}"
        raise UserError(
            f"是文件，不是文件夹，而这份权重{kind}",
            where=where,
            expected="minimind reward 训练的权重（旁边有它的 JSON），或奖励模型的文件夹",
            fix=fix,
        )
    file, tokenizer = read_weights(path), load_tokenizer(tokenizer_path)
    trained = sidecar.get("tokenizer_hash")
    if trained and trained != tokenizer_fingerprint(tokenizer):
        raise UserError(
            "这个奖励模型是用另一个分词器训练的，与要练的模型的不同",
            where=where,
            expected="与要练的模型同一个分词器",
            fix="从要练的这一家的权重另训练一个：python trainer/train_reward.py --from_weight …",
        )
    check_tokenizer(path, file.sidecar, file.config, tokenizer)
    file.config.pad_token_id = tokenizer.pad_token_id
    net = RewardNet(MiniMindForCausalLM(file.config))
    fill(net, file)
    return net.eval(), tokenizer


def encode_answers(tokenizer: Any, chats: Sequence[list[dict[str, Any]]]) -> list[tuple[Tensor, Tensor]]:
    """对话 → ``(ids, labels)``，与训练时渲染得一模一样；目标是助手的回合，最后一个就是读分数的地方。"""
    rows = []
    for chat in encode_chat_batch(tokenizer, list(chats)):
        ids = torch.tensor(chat.ids)
        rows.append((ids, torch.where(torch.tensor(chat.target), ids, IGNORE)))
    return rows


@torch.no_grad()
def score_rows(
    net: nn.Module, rows: Sequence[tuple[Tensor, Tensor]], batch_size: int, pad_id: int
) -> list[float]:
    """逐条的分数，与成批的切法无关；长短相近的放一批。"""
    device, scores = next(net.parameters()).device, [0.0] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    for start in range(0, len(order), batch_size):
        ids = order[start : start + batch_size]
        batch = to_device(collate_rows([rows[i] for i in ids], pad_id), device)
        for i, score in zip(ids, net(batch)[0].tolist(), strict=True):
            scores[i] = score
    return scores
