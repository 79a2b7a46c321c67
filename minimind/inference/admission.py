"""进场：排着的请求依次读提示，读完的样本住进槽位。

一步最多读 ``chunk`` 个位置，长提示分几步读，其间别人照写不误；同一步里读得完的几条首尾相连一起算。
先来先读，任何时候至多一个请求读到一半：它暂住最后一个槽位，读完的那一步搬到在写的各行后面。排在它后面而半步之内
读得完的可以先进场，用去这一步的一半；长的那个至少得另一半，所以饿不着。
不设 ``chunk`` 时提示从不拆开，空出的槽位一次填满再写：强化学习的采样与评测只看总的快慢。

开头与前缀库里相同的部分直接抄来。同一个提示要 n 个样本时只读一次，抄给各行；槽位不够 n 个，就把读好的另存一份。
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from minimind.inference.prefix_store import PrefixStore
from minimind.inference.prompt_attention import BlockedAttention
from minimind.inference.requests import Pending, Row, Sequence

# 不设 chunk 时一批读多少个位置。CPU 上再多反而慢（26M 单线程，128 个 token 一条：512 个位置 4,230、2,048 个
# 4,290、8,192 个 3,210 词元/秒，放不进高速缓存了）；卡上少发几次核
BATCH_TOKENS = {"cpu": 2048}
BATCH_TOKENS_DEVICE = 8192

# 要拆时一步读多少个位置：CPU 上 256 个一步已经满速（3,990 词元/秒，512 个 3,680），四个核约等一两步解码；
# 卡上太少填不满
CHUNK = {"cpu": 256}
CHUNK_DEVICE = 2048

# 没读完的停在它的整倍数上：CPU 的注意力一块 64 个查询，零头是新的形状，oneDNN 要现编内核（一次几十毫秒）
BLOCK = BlockedAttention.BLOCK

# 提示读到多深时一步只读一半：CPU 上一个位置的注意力在这里约等于其余的计算，别人等的时间才不会越来越长
DEEP = 4096

# 一步最多往队里看多少个请求
LOOK_AHEAD = 64


def default_chunk(device: torch.device) -> int:
    """交互的服务在这种设备上一步读多少个提示位置。"""
    return CHUNK.get(device.type, CHUNK_DEVICE)


@dataclass
class _Piece:
    """这一步给一个请求做的事：``[start, stop)`` 读进 ``slot``，读完则 ``count`` 个样本从 ``slot`` 起进场。"""

    pending: Pending
    start: int
    stop: int
    slot: int
    count: int
    reused: Tensor | None = None  # 从前缀库抄来的开头


@dataclass
class Admitted:
    """这一步进场的各行、它们的种子与提示末尾的 logits ``[行数, V]``。"""

    rows: list[Row]
    seeds: list[int]
    logits: Tensor | None = None


class Admission:
    """排队与读提示。

    Args:
        decoder: 读提示、抄 KV 的解码器。
        max_slots: 槽位数。
        chunk: 一步最多读多少个位置；``None`` 不拆。
        prefixes: 前缀库；``None`` 不用。
    """

    def __init__(self, decoder: Any, max_slots: int, chunk: int | None, prefixes: PrefixStore | None):
        self.decoder, self.max_slots, self.chunk, self.prefixes = decoder, max_slots, chunk, prefixes
        self.budget = chunk or BATCH_TOKENS.get(decoder.device.type, BATCH_TOKENS_DEVICE)
        self.queue: deque[Pending] = deque()
        self.computed = self.reused = 0

    def cancel(self, chosen: Callable[[Sequence], bool]) -> list[Sequence]:
        """去掉还没进场的样本；样本全没了的请求离队，读到一半的也是，它暂住的槽位随之空出。"""
        gone = []
        for pending in self.queue:
            gone += [sequence for sequence in pending.waiting if chosen(sequence)]
            pending.waiting = [sequence for sequence in pending.waiting if not chosen(sequence)]
            if not pending.waiting and pending.kept is None and pending.read:
                self.decoder.free([self.max_slots - 1])
        self.queue = deque(pending for pending in self.queue if pending.waiting)
        return gone

    def forget(self) -> None:
        """权重变了：前缀库清空，已经读了的不再存进去。"""
        if self.prefixes is not None:
            self.prefixes.clear()
        for pending in self.queue:
            pending.shareable = pending.shareable and not pending.read

    def remember(self, row: Row, slot: int) -> None:
        """离场的一行，提示与回答都存进前缀库。"""
        if self.prefixes is not None and row.shareable:
            self._store([*row.sequence.prompt_ids, *row.sequence.ids][: row.length], slot)

    def admit(self, first: int) -> Admitted:
        """读一步的提示，读完的从第 ``first`` 个槽位起依次进场。"""
        pieces = self._plan(first)
        for piece in pieces:
            self._place(piece)
        fresh = [piece for piece in pieces if piece.stop > piece.start]
        logits: list[Tensor] = []
        if fresh:
            prompts = [piece.pending.prompt_ids[piece.start : piece.stop] for piece in fresh]
            starts, slots = [piece.start for piece in fresh], [piece.slot for piece in fresh]
            scoring = {i: piece for i, piece in enumerate(fresh) if piece.pending.request.score is not None}
            watch = {i: partial(piece.pending.note, piece.start) for i, piece in scoring.items()}
            extra = {"watch": watch} if watch else {}
            logits = list(self.decoder.prefill(prompts, slots, starts, **extra))
            self.computed += sum(map(len, prompts))
        admitted, lines = Admitted([], []), []
        for piece in pieces:
            line = logits.pop(0) if piece.stop > piece.start else piece.pending.kept[1]
            if piece.count:
                self._enter(piece, line, admitted)
                lines += [line] * piece.count
        if lines:
            admitted.logits = torch.stack(lines)
        return admitted

    # ---------------------------------------------------------------- 一步的各段

    def _plan(self, first: int) -> list[_Piece]:
        """这一步读哪些；读完的离队（还有样本没槽位的除外）。"""
        pieces: list[_Piece] = []
        budget, slot, limit, position = self.budget, first, self.max_slots, 0
        while slot < limit and position < min(len(self.queue), LOOK_AHEAD):
            pending = self.queue[position]
            length, need = len(pending.prompt_ids), self._need(pending)
            if need and budget <= 0:
                break
            room, depth = need, length - need
            if need > self._bearable(budget, depth):
                if not self.chunk and pieces:
                    break
                if limit < self.max_slots:  # 已有一个读到一半，这一个要等它
                    position += 1
                    continue
                if self.chunk:
                    room = self._bearable(self._share(position, budget), depth)
            start, reused = self._begin(pending)
            stop = min(length, start + room)
            if stop < length and stop - stop % BLOCK > start:
                stop -= stop % BLOCK
            budget -= (stop - start) * (DEEP + start) // DEEP if self.chunk else stop - start
            if stop < length:
                pieces.append(_Piece(pending, start, stop, self.max_slots - 1, 0, reused))
                limit, position = self.max_slots - 1, position + 1
                continue
            count = min(limit - slot, len(pending.waiting))
            pieces.append(_Piece(pending, start, stop, slot, count, reused))
            slot += count
            if count == len(pending.waiting):
                del self.queue[position]
            else:
                position += 1
        return pieces

    def _need(self, pending: Pending) -> int:
        """还要算多少个提示位置。"""
        if pending.kept is not None:
            return 0
        known = pending.read
        if not known and self._reusable(pending):
            known = self.prefixes.reach(pending.prompt_ids[:-1])
        return len(pending.prompt_ids) - known

    def _reusable(self, pending: Pending) -> bool:
        """能不能从前缀库抄。"""
        return self.prefixes is not None and pending.shareable and pending.request.score is None

    def _share(self, position: int, budget: int) -> int:
        """读不完的长提示这一步读多少：后面有半步就读得完的，让一半给它们。"""
        behind = islice(self.queue, position + 1, LOOK_AHEAD)
        return budget - budget // 2 if any(self._need(one) <= budget // 2 for one in behind) else budget

    def _bearable(self, budget: int, depth: int) -> int:
        """已经读了 ``depth`` 个的提示这一步至多再读几个：读得越深，每个位置要看的键越多。"""
        return -(-budget * DEEP // (DEEP + depth)) if self.chunk else budget

    def _begin(self, pending: Pending) -> tuple[int, Tensor | None]:
        """从第几个位置读起，与从前缀库抄来的开头。"""
        if pending.kept is not None:
            return len(pending.prompt_ids), None
        if pending.read or not self._reusable(pending):
            return pending.read, None
        start, reused = self.prefixes.match(pending.prompt_ids[:-1])  # 至少算一个，要它的 logits
        pending.cached = start
        self.reused += start
        return start, reused

    def _place(self, piece: _Piece) -> None:
        """``start`` 之前的 KV 到位：另存的、前缀库的，或上一步读了一半的。"""
        pending, slot = piece.pending, piece.slot
        if not pending.read or pending.kept is not None:
            whole = len(pending.prompt_ids)
            self.decoder.open(slot, whole, alone=piece.stop < whole)
        if pending.kept is not None:
            self.decoder.restore(pending.kept[0], [slot])
        elif piece.reused is not None:
            self.decoder.restore(piece.reused, [slot])
        elif pending.read and slot != self.max_slots - 1:
            self.decoder.move([self.max_slots - 1], [slot], pending.read)
        pending.read = piece.stop

    def _enter(self, piece: _Piece, logits: Tensor, admitted: Admitted) -> None:
        """读完了：KV 抄给各个样本，存进前缀库，还有样本没进来的另存一份。"""
        pending, length = piece.pending, piece.stop
        if pending.kept is None and pending.shareable and self.prefixes is not None:
            self._store(pending.prompt_ids, piece.slot)
        if piece.count > 1:
            targets = list(range(piece.slot + 1, piece.slot + piece.count))
            self.decoder.copy([piece.slot] * len(targets), targets, length)
        taken, pending.waiting = pending.waiting[: piece.count], pending.waiting[piece.count :]
        if pending.waiting and pending.kept is None:
            pending.kept = self.decoder.keep(piece.slot, length), logits.clone()
        for sequence in taken:
            sequence.cached, sequence.scored = pending.cached, pending.scored
            hook = pending.request.hook() if pending.request.hook else None
            row = Row(sequence, pending.request, hook, pending.shareable)
            admitted.rows.append(row)
            admitted.seeds.append(pending.seed)

    def _store(self, ids: list[int], slot: int) -> None:
        self.prefixes.insert(ids, lambda start, stop: self.decoder.keep(slot, stop, start))
