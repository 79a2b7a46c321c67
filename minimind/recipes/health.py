"""偏好与蒸馏的体征：由一行日志看出的毛病，说成中文句子；强化学习的在 :mod:`minimind.rl.health`。

一段里没有一次正常的更新（float16 的缩放还在找位置）时没有指标，不说什么。
"""

from __future__ import annotations

import math


def preference_health(record: dict[str, float]) -> list[str]:
    """DPO：没学到、在走样、该停了。"""
    found = []
    if "margin" not in record:
        return found
    if record["step"] >= 50 and record["accuracy"] < 0.55:
        found.append(
            "准确率还在 50 % 上下，模型没学到偏好：学习率太小，或 chosen 与 rejected 的差别不一致（标反了？）。"
        )
    if record["reward_chosen"] < -1 and record["reward_rejected"] < -1:
        found.append(
            "好坏两个回答的概率都在大跌，模型正在走样：加大 --beta、减小 --learning_rate 或少训几步。"
        )
    if record["margin"] > 10:
        found.append("优势已经很大，偏好早就分开了，再训下去只会离参考模型越来越远：可以停了。")
    return found


def distillation_health(record: dict[str, float]) -> list[str]:
    """蒸馏：教师不合数据，或教师就是学生。"""
    found = []
    if "divergence" not in record:
        return found
    if record["step"] >= 50 and record["divergence"] > record.get("ce", math.inf) + 1:
        found.append("与教师的距离比交叉熵还大：教师与数据说的不是一回事，检查教师是不是这份数据上训练的。")
    if record["divergence"] < 1e-4:
        found.append("与教师的距离几乎是零：学生已经和教师一样，或两者就是同一个权重。")
    return found
