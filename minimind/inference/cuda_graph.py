"""CUDA 图：把一步解码录下来，之后一次调用重放。

26M 的一步解码有一百多个小核，每个的计算只有几微秒，时间都花在主机逐个发射上；录成图一次发射完。
图里的形状与地址都是定死的：行数与用到的长度凑成几档，每档头一次遇到时录一张；缓存、权重或各行的状态换了地方，用到它的图就作废重录
（权重就地更新，如强化学习的每一步，地址不变，图照用）。

各行是同一条抽样规则、没有干预也不要候选时，录的是一整步（:meth:`GraphedDecode.write`）：解码、抽样、各行状态往前推一步，
结果放进 ``[步数, 槽位]`` 的台账，主机隔几步读一次，其间只重放。规则不一时只录到 logits（:meth:`GraphedDecode.__call__`），抽样照常。

CUDA 上默认录，可录得对不对不靠信任：每张图录好都先与照常解码的同一步核对（logits；同样的 logits 抽出的词元与推过的状态），录不成或对不上就说一句，
此后照常解码，结果不受影响。录制以外的部分（凑档、补的行、核对、作废）在 CPU 上用同样的代码测，
``tests/inference/test_cuda_graph.py`` 里有几条有卡才跑的对照。

占的显存：全部图共用一份 ``[槽位, V]`` 的 logits 与一份台账；带抽样的图核对完就不留 logits，它与别的中间结果都在图的内存池里，
各张图从不同时重放，同一块地方轮着用。
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.inference.graph_check import difference, experts_difference, step_difference
from minimind.inference.kv_cache import SlotKVCache
from minimind.inference.requests import Row, shared_rule
from minimind.inference.row_state import RowState
from minimind.inference.sampling import SamplingParams

# 录制之前先照常跑几遍：矩阵乘的工作区、惰性载入的核都要先就位，录制时不许分配别的
WARMUP = 2
# 至多记几条抽样规则的图；满了之后，最久没用的那条隔了这么多次没用才让位，免得几条规则轮流来，录个不停
RULES, PATIENCE = 4, 1000
ROUNDS = 16  # 台账一开始多少步；步子更大才加长

logger = logging.getLogger(__name__)


def row_bucket(rows: int, max_slots: int) -> int:
    """行数凑成 1、2、4、8、16、24、32……，不超过槽位数。"""
    bucket = 1 << (rows - 1).bit_length() if rows <= 8 else -(-rows // 8) * 8
    return min(bucket, max_slots)


def length_bucket(used: int) -> int:
    """用到的长度凑成 64 的倍数，再长每翻一倍分四档：多看的键不超过四分之一，档数也不多。"""
    unit = max(SlotKVCache.GRANULE, 1 << max(0, (used - 1).bit_length() - 3))
    return -(-used // unit) * unit


class CudaRecorder:
    """把一个函数录成图；各张图共用一个内存池，因为它们从不同时重放。"""

    def __init__(self, device: torch.device):
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """返回重放它的函数与结果所在的张量。"""
        with torch.cuda.device(self.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARMUP):  # 写的都在用不到的地方，多跑几遍不改变什么
                    run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                out = run()
        return graph.replay, out


@dataclass
class _Graph:
    """一档的图：输入写进 ``tokens``、``positions``，重放之后结果在 ``out``。"""

    tokens: Tensor
    positions: Tensor
    replay: Callable[[], None]
    out: Tensor

    def __call__(self, tokens: Tensor, positions: Tensor, idle: int) -> Tensor:
        """``[B]``、``[B]`` → ``[B, V]``，下一次调用之前有效；补的行写在位置 ``idle``。"""
        rows = len(tokens)
        self.tokens[:rows] = tokens
        self.positions[:rows] = positions
        self.positions[rows:] = idle
        self.replay()
        return self.out[:rows]


class GraphedDecode:
    """:meth:`FusedDecoder.decode` 的录制版，参数与结果相同；:meth:`write` 连抽样也录。

    补的行也会写缓存：它们写在末尾多出的那一列（:class:`SlotKVCache`），读提示与解码都用不到那里。
    补的行的槽位里可能是读到一半的提示，所以不能写在它的任何一个位置上，包括最后一个；它的状态也一个都不动。

    一建好就把解码器换成 :class:`SlotKVCache`，混合专家换成定形的写法，形状才由行数与长度定；要在还没有人写的时候建。

    Args:
        decoder: :class:`minimind.inference.decoder.FusedDecoder`，``static`` 为真的。
        max_slots: 槽位数。
        recorder: 录制的函数，默认 :class:`CudaRecorder`；测试时换成不录、照常跑的。
    """

    def __init__(self, decoder: Any, max_slots: int, recorder: Callable[..., Any] | None = None):
        self.decoder, self.max_slots = decoder, max_slots
        decoder.use_slots()
        decoder.use_static()
        self._given = recorder
        self.recorder = recorder or CudaRecorder(decoder.device)
        # （行数，长度）是只到 logits 的，（行数，长度，规则）是带抽样的
        self.graphs: dict[tuple[Any, ...], Any] = {}
        self.capacity, self.places = 0, decoder.shared.places()
        self.trouble = ""  # 为什么不再录了
        self.mixed = any(layer.experts is not None for layer in decoder.layers)
        self._checked = not self.mixed  # 混合专家的定形写法核对过没有
        self.rules: dict[SamplingParams, int] = {}  # 规则 → 上次用它是第几次
        self._calls = 0
        self._state_places: list[Any] = []
        self.logits = torch.empty(0)
        # 图里读写的，地址都不变：在写的有几行、台账写到第几步、台账
        numbers = {"dtype": torch.long, "device": decoder.device}
        self.count, self.turn = torch.zeros(1, **numbers), torch.zeros(1, **numbers)
        self.ids = torch.zeros(ROUNDS, max_slots, **numbers)
        self.logp = torch.zeros(ROUNDS, max_slots, device=decoder.device)

    def clear(self) -> None:
        """缓存或权重换了地方：全部作废。"""
        self._drop(lambda key: True)

    def refresh(self) -> None:
        """权重变了（解码器已经重新合并过）：就地变的，图照用；换了地方才作废。"""
        places = self.decoder.shared.places()
        if places != self.places:
            self.clear()
            self.places = places

    def __call__(self, tokens: Tensor, positions: Tensor, lengths: Sequence[int]) -> Tensor:
        """见 :meth:`FusedDecoder.decode`；结果在下一次调用之前有效。"""
        if not self.trouble:
            key = row_bucket(len(tokens), self.max_slots), self._fit(max(lengths) + 1)
            make = partial(self._record, *key, tokens, positions, lengths)
            graph = self.graphs.get(key) or self._add(key, make)
            if graph is not None:
                return graph(tokens, positions, self.capacity)
        return self.decoder.decode(tokens, positions, lengths)

    def write(
        self, state: RowState, rows: list[Row], lengths: Sequence[int], steps: int
    ) -> tuple[Tensor, Tensor] | None:
        """各行连写 ``steps`` 个词元，每步只重放一张图，其间不与主机同步。

        Args:
            state: 各行的状态；写完已经往前推了 ``steps`` 步。
            rows: 前几个槽位的各行。
            lengths: 主机上各行已写的位置数。
            steps: 谁也不会写过自己的上限。

        Returns:
            词元与对数概率，都是 ``[steps, 行数]``，下一次调用之前有效；录不了（规则不一、有干预、要候选）是 ``None``，什么也没做。
        """
        rule = None if self.trouble else shared_rule(rows)
        if rule is None or not self._welcome(rule):
            return None
        if steps > len(self.ids):
            self.ids = self.ids.new_zeros(steps, self.max_slots)
            self.logp = self.logp.new_zeros(steps, self.max_slots)
        places = [*state.places(), (self.ids.data_ptr(), len(self.ids))]
        if places != self._state_places:  # 随机数的表加长了，或有了出现过的词元
            self._drop(lambda key: len(key) == 3)
            self._state_places = places
        self.count.fill_(len(rows))
        self.turn.zero_()
        for offset in range(steps):
            self._step(state, rows, rule, lengths, offset)
        return self.ids[:steps, : len(rows)], self.logp[:steps, : len(rows)]

    # ---------------------------------------------------------------- 录、核对、作废

    def _step(
        self, state: RowState, rows: list[Row], rule: SamplingParams, lengths: Sequence[int], offset: int
    ) -> None:
        """写一个词元，记在台账的第 ``offset`` 行。"""
        count, used = len(rows), self._fit(max(lengths) + offset + 1)
        key = row_bucket(count, self.max_slots), used, rule
        replay = self.graphs.get(key)
        if replay is not None:
            return replay()
        now = [length + offset for length in lengths]
        if not self.trouble:
            replay = self._add(key, partial(self._record_step, key, state, count, now, offset))
        if replay is not None:
            return replay()
        logits = self.decoder.decode(state.tokens[:count], state.positions[:count], now)
        self.ids[offset, :count], self.logp[offset, :count] = state.sample(logits, rows, 0)

    def _fit(self, length: int) -> int:
        """看到多长的一档；缓存若因此换了地方，图全部作废。"""
        used = length_bucket(length)
        self.decoder.reserve(0, used)
        if self.decoder.cache.capacity != self.capacity:
            self.clear()
            self.capacity = self.decoder.cache.capacity
        return used

    def _welcome(self, rule: SamplingParams) -> bool:
        """这条规则录不录：见 ``RULES``。"""
        self._calls += 1
        if rule not in self.rules and len(self.rules) >= RULES:
            oldest = min(self.rules, key=self.rules.__getitem__)
            if self._calls - self.rules[oldest] < PATIENCE:
                return False
            del self.rules[oldest]
            self._drop(lambda key: len(key) == 3 and key[2] == oldest)
        self.rules[rule] = self._calls
        return True

    def _drop(self, stale: Callable[[tuple[Any, ...]], bool]) -> None:
        """作废一些图。内存池里的图一张不剩，池子就销毁了，再往里录会出错；那时换一个新池子。"""
        kept = {key: graph for key, graph in self.graphs.items() if not stale(key)}
        if self.graphs and not kept:
            self.recorder = self._given or CudaRecorder(self.decoder.device)
        self.graphs = kept

    def _add(self, key: tuple[Any, ...], make: Callable[[], tuple[Any, str]]) -> Any:
        """录一张，核对过才留下；录不成或对不上就说一句，此后不再录，返回 ``None``。"""
        try:
            graph, self.trouble = make()
        except RuntimeError as error:  # 录制期间的断言、不许的操作、显存不够都是它
            self.trouble = f"录不成（{str(error).strip().splitlines()[0]}）"
        if self.trouble:
            self.graphs = {}
            self.decoder.use_static(False)
            logger.warning(
                "一步解码录成图：%d 行、长 %d 的一张%s；此后照常解码，慢些，结果不变", *key[:2], self.trouble
            )
            return None
        self.graphs[key] = graph
        return graph

    def _record(
        self, rows: int, used: int, tokens: Tensor, positions: Tensor, lengths: Sequence[int]
    ) -> tuple[_Graph, str]:
        """录到 logits 为止；返回图与哪里不对。"""
        want = self._plain(rows, used, tokens, positions, lengths)
        if len(self.logits) != self.max_slots:
            self.logits = want.new_zeros(self.max_slots, want.shape[1])
        static = torch.zeros(rows, dtype=torch.long, device=self.decoder.device)
        # 录制时跑的几遍也写在用不到的地方
        places = torch.full((rows,), self.capacity, dtype=torch.long, device=self.decoder.device)

        def run() -> Tensor:
            return self.logits[:rows].copy_(self.decoder.walk(static, places, used, True))

        graph = _Graph(static, places, *self.recorder(run))
        return graph, self._experts() or difference(graph(tokens, positions, self.capacity), want)

    def _record_step(
        self, key: tuple[Any, ...], state: RowState, count: int, lengths: Sequence[int], offset: int
    ) -> tuple[Callable[[], None], str]:
        """录一整步；返回重放的函数与哪里不对。状态原样，这一步还要再走。"""
        rows, used, rule = key
        want = self._plain(rows, used, state.tokens[:count], state.positions[:count], lengths)
        before = state.snapshot(rows)

        def run() -> Tensor:
            live = torch.arange(rows, device=self.decoder.device) < self.count
            positions = state.positions[:rows].masked_fill(~live, self.capacity)
            logits = self.decoder.walk(state.tokens[:rows], positions, used, True)
            ids, logp = state.advance(logits, rule, live)
            self.ids[:, :rows][self.turn] = ids
            self.logp[:, :rows][self.turn] = logp
            self.turn.add_(live[:1])
            return logits

        try:
            self.count.zero_()  # 录制时跑的几遍：没有在写的行，状态不动，K、V 写在用不到的地方
            replay, out = self.recorder(run)
            self.count.fill_(count)
            self.turn.fill_(offset)
            self.ids[offset].fill_(-1)  # 没写上的看得出来
            replay()
            trouble = self._experts() or difference(out[:count], want)
            drawn = (
                self.ids[offset, :count].clone(),
                self.logp[offset, :count].clone(),
                int(self.turn) - offset,
            )
            return replay, trouble or step_difference(state, before, rule, out, drawn)
        finally:
            state.restore(before)
            self.count.fill_(count)
            self.turn.fill_(offset)

    def _plain(
        self, rows: int, used: int, tokens: Tensor, positions: Tensor, lengths: Sequence[int]
    ) -> Tensor:
        """核对用的 logits ``[B, V]``，照常算；写进缓存的与录的是同样的 K、V。

        混合专家要用完全相同的形状：路由在两个专家几乎同分时随末位的舍入翻过去，半精度、几十行时常有，那不是录错了。
        """
        if not self.mixed:
            return self.decoder.decode(tokens, positions, lengths)
        spare = (0, rows - len(tokens))
        padded = F.pad(tokens, spare), F.pad(positions, spare, value=self.capacity)
        return self.decoder.walk(*padded, used, True)[: len(tokens)]

    def _experts(self) -> str:
        """混合专家的定形写法哪里不对；核对过一次就不再核对。"""
        trouble = "" if self._checked else experts_difference(self.decoder)
        self._checked = not trouble
        return trouble
