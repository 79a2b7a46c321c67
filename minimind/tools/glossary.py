"""小词典：训练语言模型会遇到的几十个词，中英对照，各一句解释。"""

from __future__ import annotations

import difflib
from typing import Any

from minimind.tools.base import Tool, ToolError

_ENTRIES = """
token | 词元 | 模型读写的最小单位，一个词元常是一个词或一两个汉字
tokenizer | 分词器 | 把文字切成词元的程序
vocabulary | 词表 | 全部词元的清单
embedding | 词嵌入 | 把词元变成一串数
attention | 注意力 | 每个位置按相关程度从前文取信息
head | 注意力头 | 注意力里各看各的一份
layer | 层 | 注意力加前馈，一层接一层
parameter | 参数 | 模型里要学的数
weight | 权重 | 参数的另一个叫法，也指存下来的参数文件
gradient | 梯度 | 每个参数往哪边动损失会变小
loss | 损失 | 模型错得多厉害，越小越好
optimizer | 优化器 | 根据梯度更新参数的办法
learning rate | 学习率 | 每一步走多大
batch | 批 | 一起算的若干条数据
epoch | 轮 | 把全部数据看一遍
checkpoint | 存档 | 训练途中存下的一切，可以接着练
pretraining | 预训练 | 读大量文字，学会接下一个词元
fine-tuning | 微调 | 在预训练之后用少量数据教会做事
reinforcement learning | 强化学习 | 让模型自己写，按奖励变好
reward | 奖励 | 给一个回答打的分
policy | 策略 | 强化学习里正在练的模型
rollout | 采样轨迹 | 强化学习里模型自己写出的一段
advantage | 优势 | 这个回答比平常好多少
distillation | 蒸馏 | 让小模型学大模型的输出
quantization | 量化 | 用更少的位数存参数
inference | 推理 | 用练好的模型生成
sampling | 采样 | 按概率抽下一个词元
temperature | 温度 | 采样时越高越随机
beam search | 束搜索 | 同时留着几条最可能的续写
prompt | 提示 | 交给模型的文字
context | 上下文 | 模型一次能看到的全部词元
kv cache | 键值缓存 | 存下算过的前文，免得重算
hallucination | 幻觉 | 说得像真的，其实没有的事
overfitting | 过拟合 | 记住了训练数据，没见过的反而差
perplexity | 困惑度 | 平均每步像在几个词里犹豫
benchmark | 基准 | 用来比较的固定考题
mixture of experts | 混合专家 | 每个词元只用一部分前馈网络
transformer | 变换器 | 由注意力与前馈堆成的网络
"""


def _read() -> dict[str, dict[str, str]]:
    table = {}
    for line in _ENTRIES.strip().splitlines():
        english, chinese, meaning = (part.strip() for part in line.split("|"))
        entry = {"english": english, "chinese": chinese, "meaning": meaning}
        table[english] = table[chinese] = entry
    return table


_TABLE = _read()


def look_up(word: str) -> dict[str, Any]:
    """查一个词，中英文都行，不分大小写。

    Raises:
        ToolError: 没有这个词；附最接近的几个。
    """
    key = word.strip().lower()
    for spelling in (key, key.removesuffix("s")):
        if spelling in _TABLE:
            return dict(_TABLE[spelling])
    close = difflib.get_close_matches(key[:40], _TABLE, n=3, cutoff=0.5)
    hint = f"，相近的有 {'、'.join(close)}" if close else ""
    raise ToolError(f"没有 {word[:20]} 这个词{hint}")


GLOSSARY = Tool("look_up", "查词典", {"word": {"type": "string"}}, look_up)
