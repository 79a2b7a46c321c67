"""提示逐词元的分数：``/v1/completions`` 的 ``echo`` 用。分数由引擎读提示时顺带算出，这里只换成要送的样子。"""

from __future__ import annotations

from minimind.inference.engine import Sequence
from minimind.serve.tickets import TokenOut


def prompt_scores(sample: Sequence) -> list[TokenOut]:
    """提示里每个词元在前文之下的对数概率；第一个没有前文，记 ``nan``。"""
    first, *rest = sample.prompt_ids
    scored = [TokenOut(token, *score) for token, score in zip(rest, sample.scored, strict=True)]
    return [TokenOut(first, float("nan")), *scored]
