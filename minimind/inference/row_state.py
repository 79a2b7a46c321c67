"""正在写的各行在设备上的状态，与从 logits 到下一个 token 的一步：主机不必等设备。"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minimind.inference.requests import Row
from minimind.inference.sampling import SamplingParams, sample_rows, sample_same, uniforms


class RowState:
    """各槽位刚写下的 token、它的位置、已写几个、随机数、出现过的 token。

    Args:
        max_slots: 槽位数。
        vocab_size: 词表大小。
        device: 与模型一致。
    """

    def __init__(self, max_slots: int, vocab_size: int, device: torch.device):
        self.max_slots, self.vocab_size, self.device = max_slots, vocab_size, device
        self.tokens = torch.zeros(max_slots, dtype=torch.long, device=device)
        self.positions = torch.zeros(max_slots, dtype=torch.long, device=device)
        self.written = torch.zeros(max_slots, dtype=torch.long, device=device)
        self.uniforms = torch.zeros(max_slots, 0, device=device)
        self.seen: Tensor | None = None  # 有谁要重复惩罚才建

    def enter(self, rows: Sequence[Row], first: int, seeds: Sequence[int]) -> None:
        """新行住进第 ``first`` 个起的槽位：位置、随机数与出现过的 token。"""
        longest = max(row.request.limit for row in rows)
        if self.uniforms.shape[1] < longest:
            # 至少翻倍：搬一次家，录好的抽样就要重录
            width = max(longest, 2 * self.uniforms.shape[1])
            grown = torch.zeros(self.max_slots, width, device=self.device)
            grown[:, : self.uniforms.shape[1]] = self.uniforms
            self.uniforms = grown
        table = torch.zeros(len(rows), self.uniforms.shape[1])
        for line, row, seed in zip(table, rows, seeds):
            if not row.request.params.greedy:
                line[: row.request.limit] = torch.from_numpy(
                    uniforms(seed, row.sequence.index, row.request.limit)
                )
        block = slice(first, first + len(rows))
        self.uniforms[block] = table.to(self.device)
        # 位置指刚写下的 token；第一个 token 抽出来之后才是提示的长度
        lengths = [len(row.sequence.prompt_ids) - 1 for row in rows]
        self.positions[block] = torch.tensor(lengths, device=self.device)
        self.written[block] = 0
        if any(row.request.params.repetition_penalty != 1 for row in rows) and self.seen is None:
            shape = (self.max_slots, self.vocab_size)
            self.seen = torch.zeros(shape, dtype=torch.bool, device=self.device)
        if self.seen is not None:
            self.seen[block] = False
            for slot, row in enumerate(rows, start=first):
                self.seen[slot, torch.tensor(row.sequence.prompt_ids, device=self.device)] = True

    def sample(self, logits: Tensor, rows: Sequence[Row], first: int) -> tuple[Tensor, Tensor]:
        """第 ``first`` 个槽位起的各行抽一个 token，并把状态往前推一步。

        Args:
            logits: ``[行数, V]``。
            rows: 这些行。

        Returns:
            token 与对数概率，都是 ``[行数]``。
        """
        block = slice(first, first + len(rows))
        params = [row.request.params for row in rows]
        # 贪心用不着随机数：单路时省下四个小算子
        uniform = None if all(one.greedy for one in params) else self._uniform(block)
        penalised = self.seen is not None and any(one.repetition_penalty != 1 for one in params)
        watched = [i for i, row in enumerate(rows) if row.request.top_logprobs is not None]
        plain = logits[watched].float() if watched else None
        logits = adjust(logits, rows)
        ids, logp = sample_rows(logits, params, uniform, self.seen[block] if penalised else None)
        if watched:
            note_top(plain, ids[watched], [rows[i] for i in watched])
        self.tokens[block] = ids
        self.positions[block] += 1
        self.written[block] += 1
        if self.seen is not None:
            self.seen[block].scatter_(1, ids[:, None], True)
        return ids, logp

    def advance(self, logits: Tensor, rule: SamplingParams, live: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`sample`，从第 0 个槽位起，各行同一条规则，没有干预也不要候选：全在设备上，地址都不变，能录进图里。

        Args:
            logits: ``[行数, V]``，行数可以补过。
            rule: 见 :attr:`SamplingParams.rule`。
            live: ``[行数]`` bool，补的行是假：它们的状态一个也不动。
        """
        block = slice(0, len(logits))
        uniform = None if rule.greedy else self._uniform(block)
        penalised = self.seen is not None and rule.repetition_penalty != 1
        ids, logp = sample_same(logits, rule, uniform, self.seen[block] if penalised else None)
        self.tokens[block] = torch.where(live, ids, self.tokens[block])
        self.positions[block].add_(live)
        self.written[block].add_(live)
        if self.seen is not None:
            line = ids[:, None]
            self.seen[block].scatter_(1, line, self.seen[block].gather(1, line) | live[:, None])
        return ids, logp

    def _uniform(self, block: slice) -> Tensor:
        """各行这一步的随机数 ``[行数]``。"""
        step = self.written[block].clamp_max(self.uniforms.shape[1] - 1)
        return self.uniforms[block].gather(1, step[:, None])[:, 0]

    def places(self) -> list[tuple[int, ...]]:
        """各张量在哪里、什么形状：录进图里的 :meth:`advance` 只在这些都没动时还能用。"""
        held = (self.tokens, self.positions, self.written, self.uniforms, self.seen)
        return [(one.data_ptr(), *one.shape) for one in held if one is not None]

    def snapshot(self, rows: int) -> list[Tensor]:
        """前 ``rows`` 个槽位里每步会变的那些，另存一份。"""
        return [state[:rows].clone() for state in self._changing()]

    def restore(self, kept: list[Tensor]) -> None:
        """:meth:`snapshot` 的结果写回去。"""
        for state, old in zip(self._changing(), kept):
            state[: len(old)] = old

    def _changing(self) -> list[Tensor]:
        held = (self.tokens, self.positions, self.written, self.seen)
        return [one for one in held if one is not None]

    def accept(
        self, logits: Tensor, rows: Sequence[Row], drafts: Sequence[Sequence[int]]
    ) -> tuple[list[list[int]], list[list[float]]]:
        """核对提议：每个位置照它自己那一步的随机数抽，与提议相同的一段连同其后抽到的一个都算写下了。

        Args:
            logits: ``[N, V]``，各行首尾相连：刚写下的词元与它的各个提议，一个一行。
            rows: 头几个槽位的各行；有干预的没有提议（前一个没写下，干预的状态就不对）。
            drafts: 各行的提议，可以是空的。

        Returns:
            各行写下的 token 与对数概率。
        """
        lines = [row for row, draft in zip(rows, drafts) for _ in range(len(draft) + 1)]
        places = [(slot, step) for slot, draft in enumerate(drafts) for step in range(len(draft) + 1)]
        slots, steps = torch.tensor(places, device=self.device).unbind(1)
        params = [row.request.params for row in lines]
        uniform = None
        if not all(one.greedy for one in params):
            uniform = self.uniforms[slots, self.written[slots] + steps]
        seen = None
        if self.seen is not None and any(one.repetition_penalty != 1 for one in params):
            seen = self.seen[slots]
            for line, (slot, step) in enumerate(places):
                seen[line, list(drafts[slot][:step])] = True
        watched = [i for i, row in enumerate(lines) if row.request.top_logprobs is not None]
        plain = logits[watched].float() if watched else None
        ids, logp = sample_rows(adjust(logits, lines), params, uniform, seen)
        drawn, scores = ids.tolist(), logp.tolist()
        tokens, logprobs, begin = [], [], 0
        for draft in drafts:
            right = 0
            while right < len(draft) and drawn[begin + right] == draft[right]:
                right += 1
            tokens.append(drawn[begin : begin + right + 1])
            logprobs.append(scores[begin : begin + right + 1])
            begin += len(draft) + 1
        if watched:
            kept = [(k, i) for k, i in enumerate(watched) if places[i][1] < len(tokens[places[i][0]])]
            index, written = zip(*kept)
            note_top(plain[list(index)], ids[list(written)], [lines[i] for i in written])
        block, counts = slice(0, len(rows)), torch.tensor([len(one) for one in tokens], device=self.device)
        self.tokens[block] = torch.tensor([one[-1] for one in tokens], device=self.device)
        self.positions[block] += counts
        self.written[block] += counts
        if self.seen is not None:
            for slot, one in enumerate(tokens):
                self.seen[slot, one] = True
        return tokens, logprobs

    def move(self, source: list[int], target: list[int]) -> None:
        """``source`` 各槽位的状态搬到 ``target``。"""
        for state in (self.tokens, self.positions, self.written, self.uniforms, self.seen):
            if state is not None:
                state[target] = state[source]


def adjust(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """各行自己的干预；没有干预的行不动。"""
    hooked = [(i, row.hook) for i, row in enumerate(rows) if row.hook]
    if hooked:
        logits = logits.float() if logits.dtype != torch.float32 else logits.clone()
        for i, hook in hooked:
            hook.adjust(logits[i])
    return logits


def note_top(logits: Tensor, ids: Tensor, rows: Sequence[Row]) -> None:
    """记下候选：``logits [W, V]`` 是模型原本的，``ids [W]`` 是抽到的。"""
    logp = logits.log_softmax(-1)
    own = logp.gather(1, ids[:, None])[:, 0].tolist()
    values, near = logp.topk(max(1, max(row.request.top_logprobs for row in rows)), dim=-1)
    for row, mine, value, token in zip(rows, own, values.tolist(), near.tolist()):
        k = row.request.top_logprobs
        row.sequence.top.append((mine, tuple(zip(token[:k], value[:k]))))
