"""配比：每个家族写多少预训练文本、多少段对话、几道留出题。按实测的难学程度调，改这一处就够。"""

from __future__ import annotations

from typing import NamedTuple


class Share(NamedTuple):
    """规模为 1 时的量：``pretrain`` 是预训练文本的 KB 数，``sft`` 是对话段数，``evaluate`` 是留出题数。"""

    pretrain: int
    sft: int
    evaluate: int = 24


SHARES: dict[str, Share] = {
    # 记住再说出来：每条事实在预训练里约说八十到一百遍，少于五十遍就记不牢
    "fact_place": Share(400, 800),
    "fact_person": Share(330, 660),
    "fact_animal": Share(240, 500),
    "fact_product": Share(170, 340),
    "fact_festival": Share(140, 280),
    "tale": Share(90, 0, 0),
    "antonym": Share(170, 300),
    "english": Share(130, 250),
    "chinese": Share(130, 250),
    "otter": Share(75, 140),
    "category": Share(120, 250),
    "weekday": Share(110, 240),
    "times": Share(80, 200),
    # 算
    "add": Share(110, 400),
    "sub": Share(110, 400),
    "bigger": Share(85, 300),
    "extreme": Share(100, 300),
    "convert": Share(85, 250),
    "date": Share(120, 400),
    # 从上文里取
    "pick": Share(200, 450),
    "reverse": Share(170, 450),
    "count": Share(130, 250),
    "repeat": Share(120, 250),
    "story": Share(210, 500),
    "memory": Share(250, 500),
    "manner": Share(130, 300),
    "tool_call": Share(100, 300),
    "tool_result": Share(100, 200),
    # 固定的话
    "identity": Share(40, 250),
    "smalltalk": Share(30, 200),
    "lora_identity": Share(0, 0),
    # hard：SFT 里只露个面，留给推理与强化学习
    "sum3": Share(40, 160),
    "word2": Share(45, 160),
    "word3": Share(45, 160),
    "carry": Share(20, 40),
    "sort": Share(20, 40),
    "sequence": Share(20, 40),
    "clock": Share(20, 40),
    "story_hard": Share(40, 40),
}
