"""推理引擎：连续批处理。``add_request → step → 写完的序列``，对话、评测与强化学习的采样共用这一个。

每个在写的样本占缓存的一个槽位，前 B 个槽位总是在写的：写完的行立刻离开，最后一行搬来补它的位置，
排队的请求随即住进空出的槽位。同一个提示要 n 个样本时，提示只算一次，KV 抄给各行。

一个请求的随机数只由它自己的种子与样本序号决定（:func:`minimind.inference.sampling.uniforms`），
与同时还有谁在跑、批有多大、先来后到都无关。算出的概率却会随批的大小差在舍入上：fp32 约 1e-6，同一个种子写出的就是同一段文字
（两个候选恰好差在 1e-6 以内才会不同）；bf16、fp16 约百分之一，写不了多少个就会分岔，int8 介于两者之间，都不保证。

用法::

    engine = Engine(model, eos_ids={2})
    engine.add_request(prompt_ids, SamplingParams(temperature=1.0, seed=7), 64, n=8)
    while engine.has_unfinished:
        for sequence in engine.step():
            print(sequence.ids, sequence.logprobs, sequence.finished)
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from minimind.inference.admission import Admission
from minimind.inference.cuda_graph import GraphedDecode
from minimind.inference.decoder import make_decoder
from minimind.inference.prefix_store import PrefixStore
from minimind.inference.requests import (
    LogitsHook,
    Pending,
    Request,
    Row,
    Sequence,
    context_length,
    room_for_prompt,
)
from minimind.inference.row_state import RowState
from minimind.inference.sampling import SamplingParams
from minimind.inference.speculative import Drafter, check_verifies, propose
from minimind.runtime.fair_share import fair_share

__all__ = ["Engine", "LogitsHook", "Request", "Sequence", "context_length", "room_for_prompt"]


class Engine:
    """连续批处理引擎。

    Args:
        model: 因果语言模型，已在目标设备上；引擎不改它的训练状态，也不用 dropout。
        eos_ids: 遇到就停的 token。
        max_slots: 同时在写的样本数上限。
        max_length: 提示加回答的上限，默认模型的上下文。
        dtype: 计算精度，默认与权重相同。
        stride: 每隔多少个 token 与主机对一次结果；卡上每对一次主机就要等一次设备，采样时可以设大些，
            多写的会丢掉。CPU 上总是 1。
        prefill_chunk: 一步最多读多少个提示位置，长提示读着的时候别人照写；``None`` 不拆，总的最快。
        prefix_cache_tokens: 前缀库最多存多少个位置，0 不用；只有 :class:`~minimind.inference.decoder.FusedDecoder` 能用。
        cuda_graphs: CUDA 上把一步解码录成图，与照常解码核对过才用（:mod:`minimind.inference.cuda_graph`）；别的设备上不起作用。
        draft: 谁来猜后面几个 token（:mod:`minimind.inference.speculative`），猜中的一次写好几个，文字不变；``None`` 不猜。

    Raises:
        UserError: 给了 ``draft``，而这种模型的解码器不会核对。
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        eos_ids: Collection[int],
        max_slots: int = 64,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
        stride: int = 1,
        prefill_chunk: int | None = None,
        prefix_cache_tokens: int = 0,
        cuda_graphs: bool = True,
        draft: Drafter | None = None,
    ):
        if max_slots < 1:
            raise ValueError(f"max_slots 至少为 1，得到 {max_slots}")
        if (prefill_chunk is not None and prefill_chunk < 1) or prefix_cache_tokens < 0:
            raise ValueError(f"prefill_chunk={prefill_chunk}、prefix_cache_tokens={prefix_cache_tokens} 越界")
        self.eos_ids, self.max_slots = frozenset(eos_ids), max_slots
        context = context_length(model)
        self.max_length = min(max_length or context, context)
        self.decoder = make_decoder(model, max_slots, dtype)
        self.device = self.decoder.device
        self.stride = 1 if self.device.type == "cpu" else stride
        self.vocab_size = model.config.vocab_size
        self._next_id = 0
        prefixes = None
        if prefix_cache_tokens and self.decoder.shareable:
            prefixes = PrefixStore(prefix_cache_tokens)
        self._graphs = None
        if cuda_graphs and self.device.type == "cuda" and getattr(self.decoder, "static", False):
            self._graphs = GraphedDecode(self.decoder, max_slots)
        if draft is not None:
            check_verifies(model)
        self._draft = draft
        self._admission = Admission(self.decoder, max_slots, prefill_chunk, prefixes)
        self._rows: list[Row] = []
        self._cancelled: list[Sequence] = []
        self._state = RowState(max_slots, self.vocab_size, self.device)

    # ---------------------------------------------------------------- 对外

    def add_request(
        self,
        prompt_ids: Iterable[int],
        params: SamplingParams,
        max_new_tokens: int,
        **options: Any,
    ) -> int:
        """:meth:`add` 的简便写法；``options`` 是 :class:`Request` 其余的各项（``n``、``hook``……）。"""
        return self.add(Request(list(prompt_ids), params, max_new_tokens, **options))

    def add(self, request: Request) -> int:
        """排进队里，返回请求号。

        Raises:
            UserError: 提示为空或放不下。
        """
        limit = room_for_prompt(len(request.prompt_ids), request.limit, self.max_length)
        if limit < 1 or request.n < 1:
            raise ValueError(f"max_new_tokens 与 n 至少为 1，得到 {request.limit} 与 {request.n}")
        given = request.params.seed
        seed = given if given is not None else int(torch.randint(2**62, ()))
        request_id, self._next_id = self._next_id, self._next_id + 1
        waiting = [Sequence(request_id, index, request.prompt_ids) for index in range(request.n)]
        self._admission.queue.append(Pending(replace(request, limit=limit), seed, waiting))
        return request_id

    @torch.inference_mode()
    def cancel(self, request_id: int, index: int | None = None) -> None:
        """停掉一个请求的全部样本（或只是第 ``index`` 个），槽位立刻空出；下一次 :meth:`step` 以 ``"cancelled"`` 返回。"""

        def chosen(sequence: Sequence) -> bool:
            return sequence.request_id == request_id and index in (None, sequence.index)

        self._cancelled += self._admission.cancel(chosen)
        rows = [i for i, row in enumerate(self._rows) if chosen(row.sequence)]
        self._cancelled += [self._rows[i].sequence for i in rows]
        self._release(rows)

    @property
    def has_unfinished(self) -> bool:
        """还有没返回的样本。"""
        return bool(self._admission.queue or self._rows or self._cancelled)

    @property
    def prompt_tokens(self) -> tuple[int, int]:
        """至今算过与从前缀库抄来的提示位置数。"""
        return self._admission.computed, self._admission.reused

    @property
    def running(self) -> list[Sequence]:
        """正在写的样本；流式输出就看它们的 ``ids`` 长到了哪里。"""
        return [row.sequence for row in self._rows]

    def refresh(self) -> None:
        """模型的权重变了，前缀库作废。正在写的样本沿用旧权重算出的 KV，所以应在空闲时调用。"""
        self.decoder.refresh()
        if self._graphs is not None:
            self._graphs.refresh()
        self._admission.forget()
        for row in self._rows:
            row.shareable = False

    @torch.inference_mode()
    def step(self) -> list[Sequence]:
        """让新来的进场，再让每行写一个（卡上 ``stride`` 个）token；返回刚写完的样本。"""
        finished = self._cancelled
        for sequence in finished:
            sequence.finished = "cancelled"
        self._cancelled = []
        while self._admission.queue and len(self._rows) < self.max_slots:
            finished += self._admit()
            if self._admission.chunk:
                break
        if self._rows:
            finished += self._advance()
        if self.device.type == "cpu":
            fair_share().lap()
        return finished

    def _admit(self) -> list[Sequence]:
        """读一步的提示，进场的各行写下第一个 token；返回一个 token 就写完的。"""
        first = len(self._rows)
        admitted = self._admission.admit(first)
        if admitted.logits is None:
            return []
        self._rows += admitted.rows
        self._state.enter(admitted.rows, first, admitted.seeds)
        ids, logp = self._state.sample(admitted.logits, admitted.rows, first)
        return self._collect(ids.unsqueeze(0), logp.unsqueeze(0), first)

    def _advance(self) -> list[Sequence]:
        """每行写 ``stride`` 个 token，其间不与主机同步；有提议的一次核对几个。"""
        rows, state = len(self._rows), self._state
        if self._draft is not None and (drafts := propose(self._draft, self._rows, state, self.eos_ids)):
            return self._verify(drafts)
        lengths = [row.length for row in self._rows]
        # 谁也不会写过自己的上限；写出结束符的行陪跑到对账为止，多写的丢掉
        steps = min(self.stride, min(row.request.limit - len(row.sequence.ids) for row in self._rows))
        if any(row.hook or row.request.top_logprobs is not None for row in self._rows):
            steps = 1
        written = self._graphs.write(state, self._rows, lengths, steps) if self._graphs else None
        if written is not None:
            return self._collect(*written, 0)
        all_ids, all_logp = [], []
        for offset in range(steps):
            used = [length + offset for length in lengths]
            decode = self._graphs or self.decoder.decode
            logits = decode(state.tokens[:rows], state.positions[:rows], used)
            ids, logp = state.sample(logits, self._rows, 0)
            all_ids.append(ids)
            all_logp.append(logp)
        return self._collect(torch.stack(all_ids), torch.stack(all_logp), 0)

    def _verify(self, drafts: list[list[int]]) -> list[Sequence]:
        """一次读完各行刚写下的词元与它的提议，照常抽样，写下与提议相同的一段和其后的一个。"""
        spans = [[row.sequence.ids[-1], *draft] for row, draft in zip(self._rows, drafts)]
        logits = self.decoder.verify(spans, range(len(spans)), [row.length for row in self._rows])
        ids, logp = self._state.accept(logits, self._rows, drafts)
        for row, tokens in zip(self._rows, ids):
            row.sequence.guessed += len(tokens) - 1
        return self._record(ids, logp, 0)

    def _collect(self, ids: Tensor, logp: Tensor, first: int) -> list[Sequence]:
        """对账：``[步数, 行数]`` 的结果读回主机，记到第 ``first`` 个槽位起的各行。"""
        return self._record(ids.t().tolist(), logp.t().tolist(), first)

    def _record(self, ids: list[list[int]], logp: list[list[float]], first: int) -> list[Sequence]:
        """各行新写的 token 记到第 ``first`` 个槽位起的各行，写完的行离场。"""
        finished, leaving = [], []
        rows = zip(self._rows[first:], ids, logp)
        for slot, (row, tokens, logprobs) in enumerate(rows, start=first):
            sequence = row.sequence
            for token, value in zip(tokens, logprobs):
                sequence.ids.append(token)
                sequence.logprobs.append(value)
                stop = row.hook.accept(token) if row.hook else False
                if stop or token in self.eos_ids:
                    sequence.finished = "stop"
                elif len(sequence.ids) >= row.request.limit:
                    sequence.finished = "length"
                else:
                    continue
                finished.append(sequence)
                leaving.append(slot)
                break
        self._release(leaving)
        return finished

    def _release(self, slots: list[int]) -> None:
        """这些槽位空出来，末尾还在写的行搬来补上。"""
        if not slots:
            return
        for slot in slots:
            self._admission.remember(self._rows[slot], slot)
        self.decoder.free(slots)
        gone, count = set(slots), len(self._rows) - len(slots)
        holes = [slot for slot in slots if slot < count]
        movers = [slot for slot in range(count, len(self._rows)) if slot not in gone]
        if holes:
            length = max(self._rows[slot].length for slot in movers)
            self.decoder.move(movers, holes, length)
            self._state.move(movers, holes)
            for hole, mover in zip(holes, movers):
                self._rows[hole] = self._rows[mover]
        del self._rows[count:]
