"""说话的方式：问句的客套、回答的腔调。与内容无关，所有任务共用。"""

from __future__ import annotations

import random

# 七成的问题不加客套；其余的套在问句前后，{q} 自带问号
ASK_FRAMES = (
    "请问{q}",
    "你知道{q}",
    "我想知道，{q}",
    "考考你：{q}",
    "打听一下，{q}",
    "{q}请告诉我。",
    "{q}谢谢！",
    "你好，{q}",
    "帮我看看，{q}",
    "有人问我：{q}",
    "{q}我忘了。",
    "小声问一句，{q}",
)

# 预训练文本里引出一句陈述的话头；空串占多数，免得冲淡内容
LEADS = (
    "",
    "",
    "",
    "",
    "",
    "大家都知道，",
    "书上写着，",
    "老人们常说，",
    "阿圆告诉我，",
    "《云川志》里说，",
    "船工们都说，",
)

# 同一个答案的两种腔调：客气而简短，与不耐烦而啰嗦。DPO 教模型选前者
POLITE_FRAMES = (
    "您好，{a}祝您愉快！",
    "好的，{a}希望帮到您。",
    "您好，{a}",
    "谢谢您的提问，{a}",
    "很高兴为您解答，{a}",
    "好的，{a}还有问题请随时问我。",
)
GRUMPY_FRAMES = (
    "唉，又来问，烦不烦，{a}别再问了。",
    "这都不知道？{a}真是的。",
    "哼，我本来不想说的，{a}",
    "嗯，这个嘛，说来话长，怎么讲呢，{a}",
    "你自己不会想吗？{a}",
    "哎呀，让我睡一会儿行不行，{a}烦死了。",
)

POLITE_WORDS = ("您", "好的，", "很高兴为")
GRUMPY_WORDS = ("烦", "真是的", "哼", "说来话长", "自己不会想", "不知道？")


def ask(rng: random.Random, question: str) -> str:
    """给问句加上（或不加）客套。"""
    if rng.random() < 0.7:
        return question
    return rng.choice(ASK_FRAMES).format(q=question)


def say(rng: random.Random, sentence: str) -> str:
    """给陈述句加上（或不加）话头。"""
    return rng.choice(LEADS) + sentence


def fill(rng: random.Random, templates: tuple[str, ...], **values) -> str:
    """随机挑一个模板填空。"""
    return rng.choice(templates).format(**values)
