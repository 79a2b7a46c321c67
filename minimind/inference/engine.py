"""推理引擎：连续批处理。``add_request → step → 写完的序列``，对话、评测与强化学习的采样共用这一个。

每个在写的样本占缓存的一个槽位，前 B 个槽位总是在写的：写完的行立刻离开，最后一行搬来补它的位置，
排队的请求随即住进空出的槽位。同一个提示要 n 个样本时，提示只算一次，KV 抄给各行。

一个请求的随机数只由它自己的种子与样本序号决定（:func:`minimind.inference.sampling.uniforms`），
与同时还有谁在跑、批有多大、先来后到都无关。

用法::

    engine = Engine(model, eos_ids={2})
    engine.add_request(prompt_ids, SamplingParams(temperature=1.0, seed=7), 64, n=8)
    while engine.has_unfinished:
        for sequence in engine.step():
            print(sequence.ids, sequence.logprobs, sequence.finished)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from minimind.errors import UserError
from minimind.inference.decoder import make_decoder
from minimind.inference.sampling import SamplingParams, sample_rows, uniforms

# 一次最多读这么多个提示位置（含补齐）：再多并不更快，只是占内存
PREFILL_TOKENS = 8192


class LogitsHook(Protocol):
    """对一个样本的干预：文法约束、词元偏置……每个样本一份，可以有状态。"""

    def adjust(self, logits: Tensor) -> None:
        """抽样之前就地改 ``[V]`` fp32 的 logits。"""

    def accept(self, token: int) -> bool:
        """写下了这个 token；返回真就到此为止（``"stop"``）。"""


@dataclass
class Sequence:
    """一个样本。

    Args:
        request_id, index: 哪个请求的第几个样本。
        prompt_ids: 提示。
        ids: 抽到的 token，抽到结束符时 **含** 结束符。
        logprobs: 与 ``ids`` 等长，抽样时（惩罚、温度、截断之后的分布下）的对数概率；贪心时按温度 1。
        finished: ``"stop"`` 写出结束符，``"length"`` 到长度上限，``"cancelled"`` 被取消，``None`` 还在写。
        top: 要了候选时，各 token 在 *模型自己* 的分布（温度 1，惩罚与干预之前）下的对数概率，与最可能的几个
            ``(id, 对数概率)``。
    """

    request_id: int
    index: int
    prompt_ids: list[int]
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: str | None = None
    top: list[tuple[float, tuple[tuple[int, float], ...]]] = field(default_factory=list)


@dataclass
class _Request:
    id: int
    prompt_ids: list[int]
    params: SamplingParams
    limit: int
    seed: int
    waiting: list[Sequence]
    hook: Callable[[], LogitsHook] | None = None
    top_logprobs: int | None = None
    kept: Any = None  # 槽位不够 n 个时，提示的 KV 与末尾 logits 先存着


@dataclass
class _Row:
    sequence: Sequence
    params: SamplingParams
    limit: int
    hook: LogitsHook | None = None
    top_logprobs: int | None = None

    @property
    def length(self) -> int:
        """缓存里已写的位置数：最新的 token 下一步才写进去。"""
        return len(self.sequence.prompt_ids) + len(self.sequence.ids) - 1


def context_length(model: nn.Module) -> int:
    """模型位置表的长度，即提示加回答最多多少个 token。"""
    return int(model.config.max_position_embeddings)


def room_for_prompt(prompt_length: int, max_new_tokens: int, context: int) -> int:
    """还能生成多少个 token。

    Raises:
        UserError: 提示为空，或提示已占满上下文。
    """
    if prompt_length == 0:
        raise UserError("提示里没有任何 token", expected="至少一个 token", fix="输入一些文字")
    if prompt_length >= context:
        raise UserError(
            f"提示有 {prompt_length} 个 token，模型的上下文只有 {context} 个",
            expected=f"提示不超过 {context - 1} 个 token，至少留一个给回答",
            fix="缩短提示或减少 --historys 携带的历史",
        )
    return min(max_new_tokens, context - prompt_length)


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
    ):
        if max_slots < 1:
            raise ValueError(f"max_slots 至少为 1，得到 {max_slots}")
        self.eos_ids, self.max_slots = frozenset(eos_ids), max_slots
        context = context_length(model)
        self.max_length = min(max_length or context, context)
        self.decoder = make_decoder(model, max_slots, dtype)
        self.device = self.decoder.device
        self.stride = 1 if self.device.type == "cpu" else stride
        self.vocab_size = model.config.vocab_size
        self._next_id = 0
        self._waiting: deque[_Request] = deque()
        self._rows: list[_Row] = []
        self._cancelled: list[Sequence] = []
        # 各槽位的状态，在设备上：刚写下的 token、它的位置、已写几个、随机数、出现过的 token
        self._tokens = torch.zeros(max_slots, dtype=torch.long, device=self.device)
        self._positions = torch.zeros(max_slots, dtype=torch.long, device=self.device)
        self._written = torch.zeros(max_slots, dtype=torch.long, device=self.device)
        self._uniforms = torch.zeros(max_slots, 0, device=self.device)
        self._seen: Tensor | None = None

    # ---------------------------------------------------------------- 对外

    def add_request(
        self,
        prompt_ids: Iterable[int],
        params: SamplingParams,
        max_new_tokens: int,
        *,
        n: int = 1,
        hook: Callable[[], LogitsHook] | None = None,
        top_logprobs: int | None = None,
    ) -> int:
        """排进队里，返回请求号；``n`` 个样本共用一次提示的计算。

        Args:
            hook: 给每个样本造一份干预；有干预的样本在场时每个 token 都要与主机对一次。
            top_logprobs: 每个 token 另记几个候选，0 表示只记它自己的，``None`` 不记。

        Raises:
            UserError: 提示为空或放不下。
        """
        prompt = list(prompt_ids)
        limit = room_for_prompt(len(prompt), max_new_tokens, self.max_length)
        if limit < 1 or n < 1:
            raise ValueError(f"max_new_tokens 与 n 至少为 1，得到 {max_new_tokens} 与 {n}")
        seed = params.seed if params.seed is not None else int(torch.randint(2**62, ()))
        request_id, self._next_id = self._next_id, self._next_id + 1
        waiting = [Sequence(request_id, index, prompt) for index in range(n)]
        self._waiting.append(_Request(request_id, prompt, params, limit, seed, waiting, hook, top_logprobs))
        return request_id

    @torch.inference_mode()
    def cancel(self, request_id: int, index: int | None = None) -> None:
        """停掉一个请求的全部样本（或只是第 ``index`` 个），槽位立刻空出；下一次 :meth:`step` 以 ``"cancelled"`` 返回。"""

        def chosen(sequence: Sequence) -> bool:
            return sequence.request_id == request_id and index in (None, sequence.index)

        for request in [r for r in self._waiting if r.id == request_id]:
            self._cancelled += [sequence for sequence in request.waiting if chosen(sequence)]
            request.waiting = [sequence for sequence in request.waiting if not chosen(sequence)]
            if not request.waiting:
                self._waiting.remove(request)
        rows = [i for i, row in enumerate(self._rows) if chosen(row.sequence)]
        self._cancelled += [self._rows[i].sequence for i in rows]
        self._release(rows)

    @property
    def has_unfinished(self) -> bool:
        """还有没返回的样本。"""
        return bool(self._waiting or self._rows or self._cancelled)

    @property
    def running(self) -> list[Sequence]:
        """正在写的样本；流式输出就看它们的 ``ids`` 长到了哪里。"""
        return [row.sequence for row in self._rows]

    def refresh(self) -> None:
        """模型的权重变了。正在写的样本沿用旧权重算出的 KV，所以应在空闲时调用。"""
        self.decoder.refresh()

    @torch.inference_mode()
    def step(self) -> list[Sequence]:
        """让新来的进场，再让每行写一个（卡上 ``stride`` 个）token；返回刚写完的样本。"""
        finished = self._cancelled
        for sequence in finished:
            sequence.finished = "cancelled"
        self._cancelled = []
        while self._waiting and len(self._rows) < self.max_slots:
            finished += self._admit()
        if self._rows:
            finished += self._advance()
        return finished

    # ---------------------------------------------------------------- 进场

    def _admit(self) -> list[Sequence]:
        """从队首取一批请求读提示，写下各行的第一个 token；返回一个 token 就写完的。"""
        first = len(self._rows)
        free = self.max_slots - first
        batch: list[tuple[_Request, int]] = []  # 请求与它这次进来的样本数
        width = 0
        while self._waiting and free:
            request = self._waiting[0]
            width = max(width, len(request.prompt_ids))
            if batch and (request.kept is not None or width * (len(batch) + 1) > PREFILL_TOKENS):
                break
            count = min(free, len(request.waiting))
            batch.append((request, count))
            free -= count
            if count == len(request.waiting):
                self._waiting.popleft()
            if request.kept is not None:
                break
        rows, logits = self._read_prompts(batch, first)
        self._rows += rows
        self._set_rows(first, batch)
        ids, logp = self._sample(logits, first)
        return self._record(ids.unsqueeze(0), logp.unsqueeze(0), first)

    def _read_prompts(self, batch: list[tuple[_Request, int]], first: int) -> tuple[list[_Row], Tensor]:
        """提示的 KV 写进第 ``first`` 个起的槽位，返回新行与它们的 logits ``[行数, V]``。"""
        starts, slot = [], first
        for _, count in batch:
            starts.append(slot)
            slot += count
        request, count = batch[0]
        if request.kept is not None:
            kept, logits = request.kept
            self.decoder.restore(kept, list(range(first, slot)))
        else:
            logits = self.decoder.prefill([request.prompt_ids for request, _ in batch], starts)
            request, count = batch[-1]
            if count < len(request.waiting):
                request.kept = self.decoder.keep(starts[-1], len(request.prompt_ids)), logits[-1:].clone()
            for (request, count), start in zip(batch, starts):
                if count > 1:
                    targets = list(range(start + 1, start + count))
                    self.decoder.copy([start] * len(targets), targets, len(request.prompt_ids))
        rows = []
        for request, count in batch:
            taken, request.waiting = request.waiting[:count], request.waiting[count:]
            for sequence in taken:
                hook = request.hook() if request.hook else None
                rows.append(_Row(sequence, request.params, request.limit, hook, request.top_logprobs))
        counts = torch.tensor([count for _, count in batch], device=self.device)
        return rows, logits.repeat_interleave(counts, dim=0, output_size=len(rows))

    def _set_rows(self, first: int, batch: list[tuple[_Request, int]]) -> None:
        """新行的位置、随机数与出现过的 token。"""
        rows = self._rows[first:]
        longest = max(row.limit for row in rows)
        if self._uniforms.shape[1] < longest:
            grown = torch.zeros(self.max_slots, longest, device=self.device)
            grown[:, : self._uniforms.shape[1]] = self._uniforms
            self._uniforms = grown
        table = torch.zeros(len(rows), self._uniforms.shape[1])
        seeds = [request.seed for request, count in batch for _ in range(count)]
        for line, row, seed in zip(table, rows, seeds):
            if not row.params.greedy:
                line[: row.limit] = torch.from_numpy(uniforms(seed, row.sequence.index, row.limit))
        block = slice(first, len(self._rows))
        self._uniforms[block] = table.to(self.device)
        # 位置指刚写下的 token；第一个 token 抽出来之后才是提示的长度
        lengths = [len(row.sequence.prompt_ids) - 1 for row in rows]
        self._positions[block] = torch.tensor(lengths, device=self.device)
        self._written[block] = 0
        if any(row.params.repetition_penalty != 1 for row in rows) and self._seen is None:
            self._seen = torch.zeros(self.max_slots, self.vocab_size, dtype=torch.bool, device=self.device)
        if self._seen is not None:
            self._seen[block] = False
            for slot, row in enumerate(rows, start=first):
                self._seen[slot, torch.tensor(row.sequence.prompt_ids, device=self.device)] = True

    # ---------------------------------------------------------------- 前进

    def _advance(self) -> list[Sequence]:
        """每行写 ``stride`` 个 token，其间不与主机同步。"""
        rows = len(self._rows)
        lengths = [row.length for row in self._rows]
        # 谁也不会写过自己的上限；写出结束符的行陪跑到对账为止，多写的丢掉
        steps = min(self.stride, min(row.limit - len(row.sequence.ids) for row in self._rows))
        if any(row.hook or row.top_logprobs is not None for row in self._rows):
            steps = 1
        all_ids, all_logp = [], []
        for offset in range(steps):
            used = [length + offset for length in lengths]
            logits = self.decoder.decode(self._tokens[:rows], self._positions[:rows], used)
            ids, logp = self._sample(logits, 0)
            all_ids.append(ids)
            all_logp.append(logp)
        return self._record(torch.stack(all_ids), torch.stack(all_logp), 0)

    def _sample(self, logits: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """第 ``first`` 个槽位起的各行抽一个 token，并把设备上的状态往前推一步。"""
        block = slice(first, len(self._rows))
        step = self._written[block].clamp_max(self._uniforms.shape[1] - 1)
        uniform = self._uniforms[block].gather(1, step[:, None])[:, 0]
        params = [row.params for row in self._rows[first:]]
        penalised = self._seen is not None and any(one.repetition_penalty != 1 for one in params)
        watched = [i for i, row in enumerate(self._rows[first:]) if row.top_logprobs is not None]
        plain = logits[watched].float() if watched else None
        logits = self._adjust(logits, first)
        ids, logp = sample_rows(logits, params, uniform, self._seen[block] if penalised else None)
        if watched:
            self._note_top(plain, ids[watched], [self._rows[first + i] for i in watched])
        self._tokens[block] = ids
        self._positions[block] += 1
        self._written[block] += 1
        if self._seen is not None:
            self._seen[block].scatter_(1, ids[:, None], True)
        return ids, logp

    def _adjust(self, logits: Tensor, first: int) -> Tensor:
        """各行自己的干预；没有干预的行不动。"""
        hooked = [(i, row.hook) for i, row in enumerate(self._rows[first:]) if row.hook]
        if hooked:
            logits = logits.float() if logits.dtype != torch.float32 else logits.clone()
            for i, hook in hooked:
                hook.adjust(logits[i])
        return logits

    @staticmethod
    def _note_top(logits: Tensor, ids: Tensor, rows: list[_Row]) -> None:
        """``logits [W, V]`` 是模型原本的，``ids [W]`` 是抽到的。"""
        logp = logits.log_softmax(-1)
        own = logp.gather(1, ids[:, None])[:, 0].tolist()
        values, near = logp.topk(max(1, max(row.top_logprobs for row in rows)), dim=-1)
        for row, mine, value, token in zip(rows, own, values.tolist(), near.tolist()):
            k = row.top_logprobs
            row.sequence.top.append((mine, tuple(zip(token[:k], value[:k]))))

    def _record(self, ids: Tensor, logp: Tensor, first: int) -> list[Sequence]:
        """把 ``[步数, 行数]`` 的结果记到各行，写完的行离场。"""
        finished, leaving = [], []
        rows = zip(self._rows[first:], ids.t().tolist(), logp.t().tolist())
        for slot, (row, tokens, logprobs) in enumerate(rows, start=first):
            sequence = row.sequence
            for token, value in zip(tokens, logprobs):
                sequence.ids.append(token)
                sequence.logprobs.append(value)
                stop = row.hook.accept(token) if row.hook else False
                if stop or token in self.eos_ids:
                    sequence.finished = "stop"
                elif len(sequence.ids) >= row.limit:
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
        gone, count = set(slots), len(self._rows) - len(slots)
        holes = [slot for slot in slots if slot < count]
        movers = [slot for slot in range(count, len(self._rows)) if slot not in gone]
        if holes:
            length = max(self._rows[slot].length for slot in movers)
            self.decoder.move(movers, holes, length)
            for state in (self._tokens, self._positions, self._written, self._uniforms, self._seen):
                if state is not None:
                    state[holes] = state[movers]
            for hole, mover in zip(holes, movers):
                self._rows[hole] = self._rows[mover]
        del self._rows[count:]
