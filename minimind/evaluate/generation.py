"""整批贪心生成，给要模型写出答案的评测用；走推理引擎的连续批处理，写完的立刻让位。"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from minimind.inference.engine import Engine
from minimind.inference.loading import stop_ids
from minimind.inference.sampling import GREEDY


@dataclass(frozen=True)
class Written:
    """模型写的一段。

    Args:
        ids: token，不含结束符。
        text: 解码后的文字；思考、工具调用的标签留着。
        finished: 真为自己写出了结束符，假为写到上限被截断。
    """

    ids: list[int]
    text: str
    finished: bool


def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Written]:
    """每个提示贪心写一个回答，结果与 ``prompts`` 同序。

    Args:
        batch_size: 同时写几个。
        advance: 每写完一个调用一次，用来走进度条。

    Raises:
        UserError: 有提示比模型的上下文还长。
    """
    eos = stop_ids(model, tokenizer)
    engine = Engine(model, eos_ids=eos, max_slots=batch_size)
    # 长短相近的一起读提示，补齐少
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    requests = {engine.add_request(prompts[index], GREEDY, max_new_tokens): index for index in order}
    answers: list[Written | None] = [None] * len(prompts)
    while engine.has_unfinished:
        for sequence in engine.step():
            stopped = sequence.finished == "stop"
            ids = sequence.ids[:-1] if stopped else sequence.ids
            text = tokenizer.decode(ids, skip_special_tokens=True)
            answers[requests[sequence.request_id]] = Written(list(ids), text, stopped)
            advance(1)
    return [answer for answer in answers if answer is not None]
