"""配比：每个家族在预训练文本、SFT 里各占多少，留出几道题。按实测的难学程度调，改这一处就够。"""

from __future__ import annotations

from typing import NamedTuple


class Share(NamedTuple):
    """``pretrain``、``sft`` 是份额（相对权重），``evaluate`` 是留出题数。"""

    pretrain: float
    sft: float
    evaluate: int = 24


SHARES: dict[str, Share] = {
    # 记住再说出来
    "fact_place": Share(5.0, 2.0),
    "fact_person": Share(4.2, 1.8),
    "fact_animal": Share(3.3, 1.4),
    "fact_product": Share(2.6, 1.1),
    "fact_festival": Share(2.0, 0.8),
    "tale": Share(1.5, 0.0, 0),
    "antonym": Share(3.0, 1.0),
    "english": Share(3.0, 1.0),
    "chinese": Share(3.0, 1.0),
    "otter": Share(1.5, 0.6),
    "category": Share(1.0, 0.5),
    "times": Share(1.5, 0.6),
    # 算
    "add": Share(5.0, 1.6),
    "sub": Share(5.0, 1.6),
    "bigger": Share(2.0, 1.0),
    "extreme": Share(2.5, 1.0),
    "sort": Share(2.5, 1.2),
    "sequence": Share(3.0, 1.2),
    "convert": Share(1.5, 0.7),
    "date": Share(3.0, 1.2),
    "weekday": Share(3.0, 1.2),
    "clock": Share(3.0, 1.2),
    # 从上文里取
    "pick": Share(2.5, 1.2),
    "reverse": Share(2.5, 1.2),
    "count": Share(1.5, 0.7),
    "repeat": Share(1.2, 0.7),
    "story": Share(6.0, 2.0),
    "memory": Share(3.0, 1.4),
    "manner": Share(1.5, 1.0),
    "tool_call": Share(1.5, 0.8),
    "tool_result": Share(1.5, 0.5),
    # 固定的话
    "identity": Share(0.6, 0.7),
    "smalltalk": Share(0.3, 0.5),
    "lora_identity": Share(0.0, 0.0),
    # 多步题
    "sum3": Share(1.0, 0.8),
    "word2": Share(1.0, 0.8),
    "twice": Share(1.0, 0.8),
}
