"""给提示逐词元打分：``/v1/completions`` 的 ``echo`` 用。"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from minimind.serve.tickets import TokenOut


@torch.inference_mode()
def prompt_logprobs(model: nn.Module, prompt: Sequence[int], top: int) -> list[TokenOut]:
    """提示里每个词元在前文之下的对数概率；第一个没有前文，记 ``nan``。

    Args:
        prompt: ``[T]``。
        top: 每处另给几个最可能的。
    """
    device = next(model.parameters()).device
    logits = model(input_ids=torch.tensor([list(prompt)], device=device)).logits[0, :-1]
    first = TokenOut(prompt[0], float("nan"))
    if len(prompt) == 1:
        return [first]
    logp = logits.float().log_softmax(-1)
    own = logp.gather(1, torch.tensor(prompt[1:], device=device)[:, None])[:, 0].tolist()
    values, ids = logp.topk(max(top, 1), dim=-1)
    rest = [
        TokenOut(token, value, tuple(zip(near[:top], nearby[:top])))
        for token, value, near, nearby in zip(prompt[1:], own, ids.tolist(), values.tolist())
    ]
    return [first, *rest]
