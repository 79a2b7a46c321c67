"""采样：让当前的策略回答一批提示，每个提示答若干次。

进出都是 token：抽到的 id 原样拿去训练，从不解码再编码（重新切分会得到另一串 id，那不是策略写的）。
结束符属于回答，也要训练。行为策略的对数概率由抽样的那一方给出，抽样只用温度（不截断），
所以它就是策略自己在 ``logits / temperature`` 下的对数概率；损失里也要用同一个温度。
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minimind.inference.engine import Engine
from minimind.inference.loading import stop_ids
from minimind.inference.sampling import SamplingParams
from minimind.runtime.checkpoint import unwrap
from minimind.runtime.device import mix_seeds

IGNORE = -100


@dataclass
class Rollout:
    """一次采样的结果，共 R = 提示数 × num_generations 条，同一个提示的排在一起。

    Args:
        prompts: ``[R]`` 提示的 id（同组的相同）。
        responses: ``[R]`` 抽到的 id，写出结束符的 **含** 结束符。
        logprobs: ``[R]`` 个 fp32 张量，与各条回答等长，抽样温度下的对数概率。
        truncated: ``[R]`` 真为写到长度上限还没结束。
        texts: ``[R]`` 回答的文字，不含结束符等控制 token。
        group: ``[R]`` 属于第几个提示。
    """

    prompts: list[list[int]]
    responses: list[list[int]]
    logprobs: list[Tensor]
    truncated: list[bool]
    texts: list[str]
    group: list[int]

    def __len__(self) -> int:
        return len(self.responses)

    def piece(self, row: int) -> tuple[list[int], list[int]]:
        """第 ``row`` 条的全部 id 与等长的 labels（未移位）：回答是目标，提示不是。"""
        prompt, response = self.prompts[row], self.responses[row]
        return [*prompt, *response], [*[IGNORE] * len(prompt), *response]


class LocalRollout:
    """用本进程里的模型采样。

    Args:
        model: 策略；可以是 DDP 或 compile 包过的。每次 :meth:`generate` 都用它此刻的权重。
        tokenizer: 用来解码文字，也给出结束符。
        max_new_tokens: 回答的长度上限。
        temperature: 抽样温度，大于 0。
        max_slots: 同时写多少条；更多的排队，写完一条进一条。
        dtype: 采样的计算精度，默认与权重相同。
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        max_slots: int = 64,
        dtype: torch.dtype | None = None,
    ):
        self.tokenizer, self.max_new_tokens, self.temperature = tokenizer, max_new_tokens, temperature
        model = unwrap(model)
        self.eos_ids = stop_ids(model, tokenizer)
        self.engine = Engine(model, eos_ids=self.eos_ids, max_slots=max_slots, dtype=dtype, stride=8)

    def generate(self, prompts: Sequence[Sequence[int]], num_generations: int, seed: int) -> Rollout:
        """每个提示答 ``num_generations`` 次；结果只由权重、提示与 ``seed`` 决定。

        Raises:
            UserError: 提示为空，或超过模型的上下文。
        """
        self.engine.refresh()
        order = {}
        for group, prompt in enumerate(prompts):
            params = SamplingParams(temperature=self.temperature, seed=mix_seeds(seed, group))
            request = self.engine.add_request(prompt, params, self.max_new_tokens, n=num_generations)
            order[request] = group
        done = []
        while self.engine.has_unfinished:
            done += self.engine.step()
        done.sort(key=lambda sequence: (sequence.request_id, sequence.index))
        return Rollout(
            prompts=[sequence.prompt_ids for sequence in done],
            responses=[sequence.ids for sequence in done],
            logprobs=[torch.tensor(sequence.logprobs) for sequence in done],
            truncated=[sequence.finished == "length" for sequence in done],
            texts=decode_responses(self.tokenizer, [sequence.ids for sequence in done]),
            group=[order[sequence.request_id] for sequence in done],
        )


def decode_responses(tokenizer: Any, responses: list[list[int]]) -> list[str]:
    """回答的文字，控制 token 不显示，与对话和评测看到的一样。"""
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in responses]


def response_batch(rollout: Rollout, rows: slice | Sequence[int], pad_id: int = 0) -> dict[str, Any]:
    """挑出几条拼成一批：提示接回答，首尾相连排成一行，注意力不出各条。

    一个填充都没有，所以 :func:`minimind.objectives.logprobs.target_logits` 给出的 ``rows`` 就是
    ``rows`` 里的第几条（0…R'-1）。

    Args:
        rows: 要哪几条；空的得到没有目标的一批（分布式里陪跑用）。
        pad_id: 空批里的占位 token。

    Returns:
        ``input_ids``、``labels``、``position_ids``：int64 ``[1, T]``，回答（含结束符）是目标，labels 未移位；
        ``cu_seqlens`` int32 ``[R' + 1]``、``max_seqlen``、``num_tokens``：与打包的批相同；
        ``old_logps``：fp32 ``[N]``，行为策略的对数概率，次序与目标相同。
    """
    chosen = list(range(len(rollout))[rows]) if isinstance(rows, slice) else list(rows)
    pieces = [rollout.piece(i) for i in chosen] or [([pad_id], [IGNORE])]
    lengths = [len(ids) for ids, _ in pieces]
    tokens = [token for ids, _ in pieces for token in ids]
    labels = [label for _, own in pieces for label in own]
    return {
        "input_ids": torch.tensor([tokens]),
        "labels": torch.tensor([labels]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        "max_seqlen": max(lengths),
        "num_tokens": sum(lengths) if chosen else 0,
        "old_logps": torch.cat([rollout.logprobs[i] for i in chosen] or [torch.zeros(0)]),
    }
