"""生成循环：一行的流式生成给对话用，整批的生成给评测用。

循环写在这里而不用 transformers 的 ``generate``：后者的内部缓存类每个大版本都变。
两个入口都认任何 ``forward(input_ids, attention_mask, past_key_values, use_cache, logits_to_keep)`` 的因果模型。
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minimind.inference.engine import context_length, room_for_prompt
from minimind.inference.kv_cache import StaticKVCache
from minimind.inference.sampling import GREEDY, SamplingParams, sample

# 在加速卡上每隔这么多步才问一次「都写完了吗」：每问一次主机就要等设备一次
SYNC_EVERY = 8


@dataclass(frozen=True)
class Completion:
    """一段生成结果。

    Args:
        ids: 新生成的 token，不含结束符。
        finished: 真为模型自己写出了结束符，假为写到长度上限被截断。
    """

    ids: list[int]
    finished: bool


def new_cache(model: torch.nn.Module, batch_size: int, max_length: int):
    """我们的模型用预分配缓存；从 HF 目录加载的其他结构用 transformers 自己的。"""
    if model.config.model_type == "minimind":
        return StaticKVCache.for_model(model, batch_size, max_length)
    from transformers import DynamicCache

    return DynamicCache()


def _seen_mask(prompt: Tensor, vocab_size: int, valid: Tensor | None = None) -> Tensor:
    """``[B, T]`` 的提示里出现过哪些 token，``[B, V]`` bool；``valid`` 为假的（填充）位置不算。"""
    counts = torch.zeros(prompt.size(0), vocab_size, dtype=torch.int32, device=prompt.device)
    ones = torch.ones_like(prompt, dtype=torch.int32) if valid is None else valid.to(torch.int32)
    return counts.scatter_add_(1, prompt, ones) > 0


@torch.inference_mode()
def stream_tokens(
    model: torch.nn.Module,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    eos_ids: Collection[int],
    params: SamplingParams = GREEDY,
) -> Iterator[int]:
    """逐个产出新 token，遇到结束符（不产出）或长度上限为止。

    Raises:
        UserError: 提示比模型的上下文还长。
    """
    limit = room_for_prompt(len(prompt_ids), max_new_tokens, context_length(model))
    device = next(model.parameters()).device
    generator = params.make_generator(device)
    cache = new_cache(model, 1, len(prompt_ids) + limit)
    input_ids = torch.tensor([list(prompt_ids)], dtype=torch.long, device=device)
    seen = None
    for _ in range(limit):
        output = model(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits = output.logits[:, -1]
        if params.repetition_penalty != 1.0 and seen is None:
            seen = _seen_mask(input_ids, logits.size(-1))
        next_id = sample(logits, params, generator, seen)
        token = int(next_id)
        if token in eos_ids:
            return
        yield token
        input_ids = next_id.unsqueeze(-1)
        if seen is not None:
            seen.scatter_(1, input_ids, True)


class TextStream:
    """把 token 流变成可以直接打印的文字：凑不成完整 UTF-8 字符的字节先留着。

    一个汉字三个字节，可能分在两三个 token 里；只解码其中一部分会得到替换符 U+FFFD。
    未写完的字符至多在末尾占一个替换符，所以只需扣住最后一个替换符。
    解码时带上前一组已显示的 token：SentencePiece 一类的分词器会去掉开头的空格，单独解码会丢词间空格。
    """

    def __init__(self, tokenizer, skip_special_tokens: bool = True):
        self.tokenizer, self.skip_special_tokens = tokenizer, skip_special_tokens
        self.shown: list[int] = []
        self.pending: list[int] = []
        self.sent = 0

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(
            ids, skip_special_tokens=self.skip_special_tokens, clean_up_tokenization_spaces=False
        )

    def push(self, token: int) -> str:
        """放入一个 token，返回此刻可以显示的新文字（可能是空串）。"""
        self.pending.append(token)
        text = self._decode(self.shown + self.pending)
        if text.endswith("\ufffd"):
            piece = text[self.sent : -1]
            self.sent = max(self.sent, len(text) - 1)
            return piece
        piece = text[self.sent :]
        self.shown, self.pending = self.pending, []
        self.sent = len(self._decode(self.shown))
        return piece

    def finish(self) -> str:
        """流结束时还扣着的文字。"""
        piece = self._decode(self.shown + self.pending)[self.sent :] if self.pending else ""
        self.shown, self.pending, self.sent = [], [], 0
        return piece


def stream_generate(
    model: torch.nn.Module,
    tokenizer,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    params: SamplingParams = GREEDY,
    eos_ids: Collection[int] | None = None,
) -> Iterator[str]:
    """逐段产出文字；参数同 :func:`stream_tokens`，结束符默认取分词器的 ``eos_token_id``。"""
    stream = TextStream(tokenizer)
    eos_ids = {tokenizer.eos_token_id} if eos_ids is None else eos_ids
    for token in stream_tokens(
        model, prompt_ids, max_new_tokens=max_new_tokens, eos_ids=eos_ids, params=params
    ):
        if piece := stream.push(token):
            yield piece
    if piece := stream.finish():
        yield piece


def _left_pad(prompts: Sequence[Sequence[int]], pad_id: int, device) -> tuple[Tensor, Tensor]:
    """左填充成 ``[B, T]``，连同 ``[B, T]`` bool 的有效位置。"""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad_id, dtype=torch.long)
    valid = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
        valid[row, longest - len(prompt) :] = True
    return ids.to(device), valid.to(device)


def _generate_rows(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    limit: int,
    eos: Tensor,
    pad_id: int,
    params: SamplingParams,
    generator: torch.Generator | None,
) -> list[Completion]:
    """一个批次；写完的行超过一半时从缓存里拿掉，短答案不必陪长答案算到底。"""
    device = eos.device
    input_ids, valid = _left_pad(prompts, pad_id, device)
    rows, width = input_ids.shape
    cache = new_cache(model, rows, width + limit)
    # 长度相同就不需要掩码，注意力走最快的那条路
    mask = None
    if any(len(prompt) != width for prompt in prompts):
        mask = torch.cat([valid, valid.new_ones(rows, limit)], dim=1)
    written = torch.full((rows, limit), -1, dtype=torch.long, device=device)
    stopped = torch.zeros(rows, dtype=torch.bool, device=device)
    alive = torch.arange(rows, device=device)
    seen = None
    for step in range(limit):
        # 提示用 [B, T] 的掩码；之后每步只有一个查询，直接给 [B, 1, 1, S]，模型不必再问「有没有填充」
        visible = mask
        if mask is not None:
            visible = valid.long() if step == 0 else mask[:, None, None, : width + step]
        output = model(
            input_ids=input_ids,
            attention_mask=visible,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits = output.logits[:, -1]
        if params.repetition_penalty != 1.0 and seen is None:
            seen = _seen_mask(input_ids, logits.size(-1), valid)
        next_ids = sample(logits, params, generator, seen)
        stopped[alive] |= torch.isin(next_ids, eos)
        written[alive, step] = torch.where(stopped[alive], -1, next_ids)
        input_ids = next_ids.unsqueeze(-1)
        if seen is not None:
            seen.scatter_(1, input_ids, True)
        if device.type != "cpu" and step % SYNC_EVERY != SYNC_EVERY - 1:
            continue
        keep = (~stopped[alive]).nonzero().squeeze(-1)
        if keep.numel() == 0:
            break
        if keep.numel() * 2 <= alive.numel() and isinstance(cache, StaticKVCache):
            cache.keep_rows(keep)
            alive, input_ids = alive[keep], input_ids[keep]
            mask = None if mask is None else mask[keep]
            seen = None if seen is None else seen[keep]
    return [
        Completion([token for token in row if token >= 0], bool(done))
        for row, done in zip(written.tolist(), stopped.tolist())
    ]


@torch.inference_mode()
def generate_batch(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Collection[int],
    pad_id: int = 0,
    params: SamplingParams = GREEDY,
    batch_size: int = 64,
) -> Iterator[tuple[int, Completion]]:
    """整批生成，按长度相近的分组，逐条产出 ``(提示的序号, 结果)``（次序不定，便于显示进度）。

    左填充不改变结果：RoPE 只看相对位置，填充位置被掩码遮住。

    Raises:
        UserError: 有提示比模型的上下文还长。
    """
    context = context_length(model)
    limits = [room_for_prompt(len(prompt), max_new_tokens, context) for prompt in prompts]
    device = next(model.parameters()).device
    eos = torch.tensor(sorted(eos_ids), dtype=torch.long, device=device)
    generator = params.make_generator(device)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), batch_size):
        group = order[start : start + batch_size]
        rows = _generate_rows(
            model,
            [prompts[index] for index in group],
            min(limits[index] for index in group),
            eos,
            pad_id,
            params,
            generator,
        )
        yield from zip(group, rows)
