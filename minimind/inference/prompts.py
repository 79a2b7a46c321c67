"""试一试模型用的固定问题：对话的自动测试与训练途中的样例共用。"""

from __future__ import annotations

CHAT_PROMPTS = (
    "你是谁？",
    "介绍一下你自己会做什么。",
    "为什么天空是蓝色的？",
    "3 加 5 等于多少？",
    "解释一下光合作用的基本过程。",
    "用 Python 写一个求最大公约数的函数。",
    "明天要下雨，出门前该准备什么？",
    "Please introduce yourself in one sentence.",
)
# 预训练权重只会续写，给它一个开头
PLAIN_PROMPTS = (
    "从前有一座山，",
    "春天来了，",
    "世界上最长的河流",
    "科学家发现，",
    "学习编程的第一步是",
    "Once upon a time,",
)
