"""CUDA 图：把一步解码录下来，之后一次调用重放。

26M 的一步解码有一百多个小核，每个的计算只有几微秒，时间都花在主机逐个发射上；录成图一次发射完。
图里的形状与地址都是定死的：行数与用到的长度凑成几档，每档头一次遇到时录一张；缓存或权重换了地方，图就全部作废重录
（权重就地更新，如强化学习的每一步，地址不变，图照用）。

CUDA 上默认录，可录得对不对不靠信任：每张图录好都先与照常解码的同一步核对，录不成或对不上就说一句，此后照常解码，
结果不受影响。**核对之后的这一版没有在显卡上跑过**：录制以外的部分（凑档、补的行、核对、作废）在 CPU 上用同样的代码测过，
``tests/inference/test_cuda_graph.py`` 里有一条有卡才跑的对照。
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minimind.inference.kv_cache import SlotKVCache

# 录制之前先照常跑几遍：矩阵乘的工作区、惰性载入的核都要先就位，录制时不许分配别的
WARMUP = 2
# 与照常解码核对：差不超过 logits 最大绝对值的这些。核相同，本该逐位相同；注意力看的长度凑过整，求和的次序会不同
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}

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
                for _ in range(WARMUP):  # 写的是同样的 K、V，多跑几遍不改变什么
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
        """``[B]``、``[B]`` → ``[B, V]``；补的行写在位置 ``idle``。"""
        rows = len(tokens)
        self.tokens[:rows] = tokens
        self.positions[:rows] = positions
        self.positions[rows:] = idle
        self.replay()
        return self.out[:rows].clone()


class GraphedDecode:
    """:meth:`FusedDecoder.decode` 的录制版，参数与结果相同。

    补的行也会写缓存：它们写在末尾多出的那一列（:class:`SlotKVCache`），读提示与解码都用不到那里。
    补的行的槽位里可能是读到一半的提示，所以不能写在它的任何一个位置上，包括最后一个。

    一建好就把解码器换成 :class:`SlotKVCache`，形状才由行数与长度定；要在还没有人写的时候建。

    Args:
        decoder: :class:`minimind.inference.decoder.FusedDecoder`，稠密模型（混合专家按路由分组，形状不定，录不了）。
        max_slots: 槽位数。
        recorder: 录制的函数，默认 :class:`CudaRecorder`；测试时换成不录、照常跑的。
    """

    def __init__(self, decoder: Any, max_slots: int, recorder: Callable[..., Any] | None = None):
        self.decoder, self.max_slots = decoder, max_slots
        decoder.use_slots()
        self._given = recorder
        self.recorder = recorder or CudaRecorder(decoder.device)
        self.graphs: dict[tuple[int, int], _Graph] = {}
        self.capacity, self.places = 0, decoder.shared.places()
        self.trouble = ""  # 为什么不再录了

    def clear(self) -> None:
        """缓存或权重换了地方：全部作废。

        内存池里的图一张不剩，池子就销毁了，再往里录会出错；所以换一个新池子。
        """
        if self.graphs:
            self.graphs.clear()
            self.recorder = self._given or CudaRecorder(self.decoder.device)

    def refresh(self) -> None:
        """权重变了（解码器已经重新合并过）：就地变的，图照用；换了地方才作废。"""
        places = self.decoder.shared.places()
        if places != self.places:
            self.clear()
            self.places = places

    def __call__(self, tokens: Tensor, positions: Tensor, lengths: Sequence[int]) -> Tensor:
        """见 :meth:`FusedDecoder.decode`。"""
        if self.trouble:
            return self.decoder.decode(tokens, positions, lengths)
        rows, used = len(tokens), length_bucket(max(lengths) + 1)
        self.decoder.reserve(0, used)
        if self.decoder.cache.capacity != self.capacity:
            self.clear()
            self.capacity = self.decoder.cache.capacity
        key = row_bucket(rows, self.max_slots), used
        graph = self.graphs.get(key)
        if graph is not None:
            return graph(tokens, positions, self.capacity)
        plain = self.decoder.decode(tokens, positions, lengths)  # 与录的写进缓存的是同样的 K、V
        try:
            graph = self._record(*key)
            out = graph(tokens, positions, self.capacity)
            self.trouble = _difference(out, plain)
        except RuntimeError as error:  # 录制期间的断言、不许的操作、显存不够都是它
            self.trouble = f"录不成（{str(error).strip().splitlines()[0]}）"
        if self.trouble:
            self.graphs.clear()
            logger.warning(
                "一步解码录成图：%d 行、长 %d 的一张%s；此后照常解码，慢些，结果不变", *key, self.trouble
            )
            return plain
        self.graphs[key] = graph
        return out  # 与以后重放的是同一种舍入：同一个请求再来一遍，写的还是那些

    def _record(self, rows: int, used: int) -> _Graph:
        device = self.decoder.device
        tokens = torch.zeros(rows, dtype=torch.long, device=device)
        # 录制时跑的几遍也写在用不到的地方
        positions = torch.full((rows,), self.capacity, dtype=torch.long, device=device)
        replay, out = self.recorder(lambda: self.decoder.walk(tokens, positions, used, True))
        return _Graph(tokens, positions, replay, out)


def _difference(got: Tensor, want: Tensor) -> str:
    """两份 logits ``[B, V]`` 差得太多时说差多少，否则是空串。"""
    scale, gap = want.float().abs().max().item(), (got.float() - want.float()).abs().max().item()
    limit = TOLERANCE[want.dtype] * max(scale, 1.0)
    return "" if gap <= limit else f"与照常解码差 {gap:.3g}（不该超过 {limit:.3g}）"
