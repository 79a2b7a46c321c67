"""推测解码：先便宜地猜几个词元，一次前向全部核对，猜中的白赚；写出的文字一个不变。

猜的办法有两种。提示查找（:class:`PromptLookup`；prompt lookup，Saxena 2023）：最近两三个词元以前在提示或回答里出现过，就猜后面还跟着
那时的几个。抄上文的人名、数、代码，按格式写的工具调用，多轮里重说的话，都猜得中；不另要模型。
小模型（:class:`~minimind.inference.draft_model.DraftModel`）：同一个分词器的小模型先写几个，大的来核对。

核对不是拒绝采样（Leviathan 2023，Chen 2023），而是更强：那里只保证分布相同，这里连抽到的词元都相同。引擎里一行每一步的
随机数早就定了（:func:`minimind.inference.sampling.uniforms`），给定 logits 抽到哪个就定了；所以猜 k 个，k + 1 个位置各照自己那一步的
随机数抽一遍，与猜的相同的最长一段就是照常解码会写的，它后面抽到的那一个也是。贪心、各种截断、重复惩罚、对数概率都不例外。
只有舍入随一次算几个位置变（fp32 约 1e-6），与随同批几行变是同一回事（:mod:`minimind.inference.engine`）。

没猜中的位置，K、V 写在了这一行的长度之外：注意力看不到那里，下一步就盖掉，前缀库只存长度之内的。
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

from minimind.errors import UserError
from minimind.inference.decoder import fuses
from minimind.inference.requests import Row
from minimind.inference.row_state import RowState

# 同时写的行再多就不猜。26M 单线程，8 行在工具的对话上还快 1.5 倍、一般的对话 1.1 倍；再多没有量过
MOST_ROWS = 8
# 行再多，照着抄对了至少一个才猜：4 行时多核对 4 个位置，一步就贵三成
BOLD_ROWS = 2
# 猜几个：照着抄对了 SURE 个之后猜 LONG 个，之前猜 SHORT 个。26M 单线程 1 行，核对 4 个是照常一步的 0.90 倍（fp32；
# bf16 1.02，int8 1.63），8 个是 1.13（1.23、1.82），16 个是 1.54（1.60、2.33）
SHORT, LONG, SURE = 4, 8, 4
# 头一个猜对的不到这么多就先不猜；按最近约 MEMORY 次算。int8 的账约在三成打平
TRUSTED, MEMORY = 0.3, 8


class Drafter(Protocol):
    """猜后面写什么的人；一个引擎一个。"""

    def guess(self, rows: Sequence[Row], rooms: Sequence[int], state: RowState) -> list[list[int]]:
        """各行后面的至多 ``rooms`` 个词元；没把握的、不许猜的（0）是空的。

        Args:
            rows: 头几个槽位的各行。
            state: 各行每一步的随机数在里面。
        """


def check_verifies(model: Any) -> None:
    """这种模型的解码器会核对提议。

    Raises:
        UserError: 只能走 ``forward`` 的结构不会。
    """
    if not fuses(model):
        raise UserError(
            f"{type(model).__name__} 不能用推测解码",
            where="--draft",
            expected="MiniMind，或与它同构的 Llama、Qwen3",
            fix="去掉 --draft",
        )


def propose(
    drafter: Drafter, rows: Sequence[Row], state: RowState, eos_ids: Collection[int]
) -> list[list[int]]:
    """各行的提议；谁都没有（或行太多）是空列表，照常解码。

    至多猜到这一行的上限之前一个（最后一个由核对时抽），结束符不猜。有干预的行不猜：猜的还没写下，干预的状态就不对。
    """
    if len(rows) > MOST_ROWS:
        return []
    rooms = [0 if row.hook else row.request.limit - len(row.sequence.ids) - 1 for row in rows]
    drafts = []
    for room, draft in zip(rooms, drafter.guess(rows, rooms, state)):
        stop = next((i for i, token in enumerate(draft) if token in eos_ids), room)
        drafts.append(draft[: min(stop, room)])
    return drafts if any(drafts) else []


class Trace:
    """一行至今的词元，与各个二元、三元组最近一次出现之后写的是什么。

    也暗中记分：每写一个就看查到的是不是它，不必真猜。所以提示里就开始记，查不准的文字不花核对的钱。
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.source: int | None = None  # 查到的：下一个词元与这个位置的相同
        self.run = 0  # 照着它已经接连写对了几个
        self.trust = TRUSTED  # 头一个猜对的占几成，近的算得多
        self._after: dict[tuple[int, ...], int] = {}  # n 元组 → 它后面那个词元的位置

    def extend(self, fresh: Sequence[int]) -> None:
        """又写了这些。"""
        tokens, after = self.tokens, self._after
        for token in fresh:
            end = len(tokens)
            if end >= 2:  # 后面那个词元有了才登记，查的时候就不会查到自己
                after[tokens[-2], tokens[-1]] = end
                if end >= 3:
                    after[tokens[-3], tokens[-2], tokens[-1]] = end
            right = self.source is not None and tokens[self.source] == token
            if self.source is not None and not self.run:
                self.trust += (right - self.trust) / MEMORY
            tokens.append(token)
            if right:
                self.source, self.run = self.source + 1, self.run + 1
            else:
                self.source, self.run = self._look_up(), 0

    def _look_up(self) -> int | None:
        found = self._after.get(tuple(self.tokens[-3:]))  # 先三元，查不到再二元
        return self._after.get(tuple(self.tokens[-2:])) if found is None else found

    def ahead(self, count: int) -> list[int]:
        """照查到的往下抄 ``count`` 个；抄到了末尾就接着抄刚抄的（一直重复的文字）。"""
        tokens, out, known = self.tokens, [], len(self.tokens)
        for place in range(self.source, self.source + count):
            out.append(tokens[place] if place < known else out[place - known])
        return out


class PromptLookup:
    """提示查找。照着抄对了几个就多猜些；头一个常常猜错的文字，等抄对了一个才猜。"""

    def guess(self, rows: Sequence[Row], rooms: Sequence[int], state: RowState) -> list[list[int]]:
        return [self._guess(row, room, len(rows) <= BOLD_ROWS) for row, room in zip(rows, rooms)]

    def _guess(self, row: Row, room: int, bold: bool) -> list[int]:
        if room < 1:
            return []
        sequence = row.sequence
        if row.trace is None:
            row.trace = Trace()
            row.trace.extend(sequence.prompt_ids)
        trace: Trace = row.trace
        trace.extend(sequence.ids[len(trace.tokens) - len(sequence.prompt_ids) :])
        if trace.source is None or not (trace.run or (bold and trace.trust >= TRUSTED)):
            return []
        return trace.ahead(min(room, SHORT if trace.run < SURE else LONG))
