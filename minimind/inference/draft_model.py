"""推测解码里的小模型：同一个分词器的小模型先写几个，大的一次核对。

小的用大的那一步的同一个随机数抽（:func:`minimind.inference.sampling.uniforms`）：两边的分布相近，抽到的就多半相同，温度 1 也一样。
抽到什么只影响猜得准不准，写出的文字仍由大的定（:mod:`minimind.inference.speculative`）。
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from minimind.inference.decoder import FusedDecoder
from minimind.inference.requests import Row, context_length
from minimind.inference.row_state import RowState
from minimind.inference.sampling import sample_rows
from minimind.inference.shared import SharedModel

# 同时写的行再多，核对的钱就比省下的多（26M 的 4 行各多核对 4 个，一步贵九成）
MOST_ROWS = 2
WIDTH = 4
# 最近约 MEMORY 次里头一个猜对的不到 TRUSTED，就歇 REST 个词元再试
TRUSTED, MEMORY, REST = 0.3, 8, 32
# 一次要读的超过这么多个，就用读提示的路
LONG_SPAN = 32


@dataclass
class _Seat:
    """大的一行在小的这里：``known`` 是它当时的长度，``draft`` 是接着猜的，除末一个外 K、V 都在缓存里。"""

    row: Row
    known: int = 0
    draft: tuple[int, ...] = ()
    trust: float = 0.5
    wake: int = 0

    def catch_up(self, tokens: Sequence[int]) -> int:
        """缓存里有多少个位置还对；顺便给上一次猜的记分。"""
        read = self.known
        if self.draft:
            self.trust += ((tokens[self.known] == self.draft[0]) - self.trust) / MEMORY
        for token, mine in zip(tokens[self.known : -1], self.draft[:-1]):
            if token != mine:
                break
            read += 1
        return read


class DraftModel:
    """小模型。

    Args:
        model: 与大的同一个分词器、同一设备；几个引擎可以共用一份排好的权重，各有自己的缓存。
    """

    def __init__(self, model: SharedModel):
        self.decoder = FusedDecoder(model, MOST_ROWS)
        self.context = context_length(model)
        self._seats: list[_Seat | None] = [None] * MOST_ROWS

    def guess(self, rows: Sequence[Row], rooms: Sequence[int], state: RowState) -> list[list[int]]:
        drafts: list[list[int]] = [[] for _ in rows]
        if len(rows) > MOST_ROWS:
            return drafts
        self._seat(rows)
        slots, spans, starts, asked = [], [], [], []
        for index, (row, room) in enumerate(zip(rows, rooms)):
            slot = next(i for i, seat in enumerate(self._seats) if seat is not None and seat.row is row)
            seat, tokens = self._seats[slot], [*row.sequence.prompt_ids, *row.sequence.ids]
            width = min(room, WIDTH, self.context - len(tokens))
            if width < 1 or len(row.sequence.ids) < seat.wake:
                continue
            start = seat.catch_up(tokens)
            seat.known, seat.draft = start, ()
            if seat.trust < TRUSTED:
                seat.trust, seat.wake = TRUSTED, len(row.sequence.ids) + REST
                continue
            slots.append(slot)
            spans.append(tokens[start:])
            starts.append(start)
            asked.append((index, width))
            seat.known = len(tokens)
        if asked:
            self._write(rows, slots, spans, starts, asked, state, drafts)
        for slot, (index, _) in zip(slots, asked):
            self._seats[slot].draft = tuple(drafts[index])
        return drafts

    def _seat(self, rows: Sequence[Row]) -> None:
        """走了的让出槽位，新来的坐下。"""
        present = {id(row) for row in rows}
        for slot, seat in enumerate(self._seats):
            if seat is not None and id(seat.row) not in present:
                self._seats[slot] = None
                self.decoder.free([slot])
        seated = {id(seat.row) for seat in self._seats if seat is not None}
        for row in rows:
            if id(row) not in seated:
                self._seats[self._seats.index(None)] = _Seat(row)

    def _write(
        self,
        rows: Sequence[Row],
        slots: list[int],
        spans: list[list[int]],
        starts: list[int],
        asked: list[tuple[int, int]],
        state: RowState,
        drafts: list[list[int]],
    ) -> None:
        """读完还没读的，然后各写各的几个，记进 ``drafts``。"""
        logits, step = self._read(spans, slots, starts), 0
        ends = [start + len(span) for start, span in zip(starts, spans)]
        while asked:
            index = [i for i, _ in asked]
            params = [rows[i].request.params for i in index]
            uniform = None
            if not all(one.greedy for one in params):
                uniform = state.uniforms[index, state.written[index] + step]
            for i, token in zip(index, sample_rows(logits, params, uniform)[0].tolist()):
                drafts[i].append(token)
            step += 1
            alive = [k for k, (_, width) in enumerate(asked) if width > step]
            asked, slots, ends = ([part[k] for k in alive] for part in (asked, slots, ends))
            if asked:
                spans = [drafts[i][-1:] for i, _ in asked]
                logits = self._read(spans, slots, [end + step - 1 for end in ends])

    def _read(self, spans: list[list[int]], slots: list[int], starts: list[int]) -> Tensor:
        """各段末尾的 logits ``[B, V]``。"""
        lengths = [len(span) for span in spans]
        if max(lengths) > LONG_SPAN:
            return self.decoder.prefill(spans, slots, starts)
        ends = [sum(lengths[: i + 1]) - 1 for i in range(len(lengths))]
        return self.decoder.verify(spans, slots, starts)[ends]
