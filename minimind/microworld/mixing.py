"""配比：每个家族写多少预训练文本、多少段对话、几道留出题。按实测的难学程度调，改这一处就够。"""

from __future__ import annotations

from typing import NamedTuple


class Share(NamedTuple):
    """规模为 1 时的量：``pretrain`` 是预训练文本的 KB 数，``sft`` 是对话段数，``evaluate`` 是留出题数。"""

    pretrain: int
    sft: int
    evaluate: int = 24


SHARES: dict[str, Share] = {
    # 记住再说出来：每条事实在预训练里约说六十到一百遍，再少就记不牢
    "fact_place": Share(390, 800),
    "fact_person": Share(330, 700),
    "fact_animal": Share(310, 600),
    "fact_product": Share(230, 460),
    "fact_festival": Share(190, 400),
    "tale": Share(80, 0, 0),
    "word_noun": Share(300, 600),
    "word_adjective": Share(300, 520),
    "word_english": Share(190, 400),
    "weekday": Share(110, 240),
    # 算
    "add": Share(150, 600),
    "sub": Share(150, 500),
    "extreme": Share(100, 350),
    "convert": Share(85, 300),
    "date": Share(120, 400),
    # 从上文里取
    "pick": Share(120, 350),
    "reverse": Share(120, 350),
    "count": Share(110, 300),
    "repeat": Share(80, 220),
    "story": Share(160, 400),
    "memory": Share(320, 620),
    "manner": Share(110, 300),
    "tool_call": Share(160, 320),
    "tool_result": Share(100, 220),
    # 固定的话
    "identity": Share(40, 250),
    "smalltalk": Share(30, 200),
    "lora_identity": Share(0, 0, 60),
    # hard：SFT 里只露个面，留给推理与强化学习。三种多步题多给些：见过的步骤太少（各 160 段）时步骤写出来也多半是错的，
    # 强化学习六十步才涨二十点；各 360 段时二十步就涨二十五点，而微调的成绩不变（三成四）
    "sum3": Share(40, 360),
    "word2": Share(45, 360),
    "word3": Share(45, 360),
    "times": Share(40, 60),
    "bigger": Share(15, 40),
    "carry": Share(15, 40),
    "sort": Share(15, 40),
    "sequence": Share(15, 40),
    "clock": Share(15, 40),
    "story_hard": Share(30, 40),
}
