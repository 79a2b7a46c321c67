"""PPO 的模型：策略与价值网络各有自己的主干，放在一个模块里，DDP 一次前向、一次归约。"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from minimind.dataset.collate import model_inputs, target_places
from minimind.model import MiniMindLM
from minimind.model.kernels import autocast_off
from minimind.objectives.logprobs import TargetLogits, target_logits


class Critic(nn.Module):
    """价值网络：与策略同样的主干（从它的权重开始）接一个标量头。

    头从零开始，所以开始时处处报 0；写成向量而不是 ``[1, H]`` 的矩阵，Muon 才不会去正交化它。
    """

    def __init__(self, actor: MiniMindLM):
        super().__init__()
        self.model = copy.deepcopy(actor.model)
        self.value_weight = nn.Parameter(torch.zeros(actor.config.hidden_size))
        self.value_bias = nn.Parameter(torch.zeros(()))

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """``[N]`` fp32：写出每个目标词元之前的状态的价值；以及负载均衡损失（稠密模型为 0）。"""
        hidden, aux_loss = self.model(**model_inputs(batch))
        states = hidden.flatten(0, 1).index_select(0, target_places(batch)).float()
        with autocast_off(states):
            return states @ self.value_weight + self.value_bias, aux_loss


class ActorCritic(nn.Module):
    """策略与价值网络。

    Args:
        actor: 策略；价值网络的主干从它此刻的权重开始。
    """

    def __init__(self, actor: MiniMindLM):
        super().__init__()
        self.config = actor.config
        self.actor, self.critic = actor, Critic(actor).to(next(actor.parameters()).device)

    def forward(self, batch: dict[str, Any]) -> tuple[TargetLogits, Tensor, Tensor]:
        """目标位置上的预测、价值 ``[N]``、价值网络的负载均衡损失。"""
        return target_logits(self.actor, batch), *self.critic(batch)


def actor_of(model: ActorCritic) -> MiniMindLM:
    """其中的策略。"""
    return model.actor
