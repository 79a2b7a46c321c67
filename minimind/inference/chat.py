"""一场对话：历史、编码、流式回答与速度；命令行与以后的网页共用。"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from minimind.inference.engine import Engine
from minimind.inference.generate import TextStream, context_length, stream_tokens
from minimind.inference.loading import stop_ids
from minimind.inference.sampling import SamplingParams
from minimind.inference.speculative import Drafter
from minimind.tokenizer import encode_chat, encode_pretrain
from minimind.tokenizer.templates import opens_thinking

# 一场对话的前缀库至多多少个 token；26M 的 fp32 每个 8 KB
PREFIX_TOKENS = 16384


@dataclass
class Speed:
    """最近一次回答的用量：新生成的 token 数（不含结束符）与秒数（含读提示）。"""

    tokens: int = 0
    seconds: float = 0.0

    @property
    def per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass
class ChatSession:
    """与一个模型的对话。

    Args:
        model, tokenizer: 已放到目标设备、处于 eval 状态的模型与它的分词器。
        params: 采样参数；有种子时每次回答都从这个种子开始。
        max_new_tokens: 回答的长度上限，实际还受上下文剩余长度限制。
        history_messages: 携带最近多少条历史消息（一问一答是两条）；0 表示每次重新开始。
        plain: 真为续写（预训练权重）：``bos + 原文``，没有对话模板，也不带历史。
        enable_thinking: 传给对话模板的思考开关，``None`` 由模型决定。
        system: 系统提示。
        draft: 造一个猜后面几个词元的人（:mod:`minimind.inference.speculative`）；``None`` 不猜。
    """

    model: torch.nn.Module
    tokenizer: object
    params: SamplingParams
    max_new_tokens: int = 8192
    history_messages: int = 0
    plain: bool = False
    enable_thinking: bool | None = None
    system: str | None = None
    draft: Callable[[], Drafter] | None = None
    messages: list[dict] = field(default_factory=list)
    speed: Speed = field(default_factory=Speed)
    dropped: int = 0

    @functools.cached_property
    def engine(self) -> Engine:
        """各轮共用一个：历史的 KV 在它的前缀库里，下一轮只算新的。"""
        return Engine(
            self.model,
            eos_ids=stop_ids(self.model, self.tokenizer),
            max_slots=1,
            prefix_cache_tokens=min(context_length(self.model), PREFIX_TOKENS),
            draft=self.draft() if self.draft else None,
        )

    def interrupt(self) -> None:
        """回答被 Ctrl-C 打断了：可能停在引擎的一步中间，状态不完整，下一问换一个新的（约 20 毫秒，前缀库重来）。"""
        self.__dict__.pop("engine", None)

    def encode(self, prompt: str) -> list[int]:
        """这一问的 token：先带上历史，放不下就从最早的一轮开始丢，``dropped`` 记丢了几条。

        Raises:
            UserError: 只剩这一问也超过上下文。
        """
        self.dropped = 0
        if self.plain:
            return encode_pretrain(self.tokenizer, prompt)[:-1]
        # 凑成整轮，免得历史以助手的回答开头
        keep = min(self.history_messages + self.history_messages % 2, len(self.messages))
        history = self.messages[len(self.messages) - keep :]
        head = [{"role": "system", "content": self.system}] if self.system else []
        while True:
            turns = [*head, *history, {"role": "user", "content": prompt}]
            ids = encode_chat(
                self.tokenizer, turns, add_generation_prompt=True, enable_thinking=self.enable_thinking
            ).ids
            if len(ids) < context_length(self.model) or not history:
                return ids
            self.dropped += 2
            history = history[2:]

    def reply(self, prompt: str) -> Iterator[str]:
        """流式回答；写完后 ``speed`` 里是这一次的速度，历史里多一问一答。

        Raises:
            UserError: 提示比模型的上下文还长。
        """
        ids = self.encode(prompt)
        stream = TextStream(self.tokenizer)
        self.speed = Speed()
        start = time.perf_counter()
        written: list[str] = []
        prefix = "<think>\n" if not self.plain and opens_thinking(self.tokenizer, ids) else ""
        if prefix:
            yield prefix
        for token in stream_tokens(
            self.model,
            ids,
            max_new_tokens=self.max_new_tokens,
            eos_ids=self.engine.eos_ids,
            params=self.params,
            engine=self.engine,
        ):
            self.speed = Speed(self.speed.tokens + 1, time.perf_counter() - start)
            if piece := stream.push(token):
                written.append(piece)
                yield piece
        if piece := stream.finish():
            written.append(piece)
            yield piece
        self.messages += [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": prefix + "".join(written)},
        ]
