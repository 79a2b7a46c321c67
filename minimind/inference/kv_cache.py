"""预分配的 KV 缓存：一次申请，逐步写入，返回视图，不随 token 拼接。

每步 ``torch.cat`` 会把整段缓存重抄一遍，生成 n 个 token 要搬 O(n²) 的数据；预分配后每步只写一个位置。
接口与 transformers 的 ``DynamicCache`` 相同（``update`` / ``get_seq_length``），模型两种都认。
"""

from __future__ import annotations

import torch
from torch import Tensor


class StaticKVCache:
    """固定容量的 KV 缓存。

    Args:
        num_layers: 层数。
        batch_size: 行数。
        num_kv_heads: KV 头数（GQA 不展开）。
        max_length: 最多放多少个位置（提示加新生成的）。
        head_dim: 每个头的维数。
        dtype, device: 与模型一致。

    ``keys[layer]``、``values[layer]`` 形状 ``[B, H_kv, max_length, D]``；没写到的部分不初始化
    （CPU 上 ``torch.empty`` 不占物理内存，容量开大不要紧）。
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        num_kv_heads: int,
        max_length: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        shape = (batch_size, num_kv_heads, max_length, head_dim)
        self.max_length = max_length
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self._lengths = [0] * num_layers

    @classmethod
    def for_model(cls, model: torch.nn.Module, batch_size: int, max_length: int) -> StaticKVCache:
        """按模型的配置、精度与设备开缓存；``head_dim`` 没写在配置里时由隐藏维度推出。"""
        config = model.config
        heads = config.num_attention_heads
        parameter = next(model.parameters())
        return cls(
            config.num_hidden_layers,
            batch_size,
            getattr(config, "num_key_value_heads", None) or heads,
            max_length,
            getattr(config, "head_dim", None) or config.hidden_size // heads,
            dtype=parameter.dtype,
            device=parameter.device,
        )

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """写入一段新的 K、V，返回这一层到目前为止的全部。

        Args:
            key, value: ``[B, H_kv, T, D]``。
            layer_idx: 第几层。

        Returns:
            两个 ``[B, H_kv, 已有长度 + T, D]`` 的视图，不复制。

        Raises:
            ValueError: 超出容量。
        """
        start = self._lengths[layer_idx]
        end = start + key.size(2)
        if end > self.max_length:
            raise ValueError(f"KV 缓存容量 {self.max_length} 不够写到位置 {end}，建缓存时请给足 max_length")
        self.keys[layer_idx][:, :, start:end] = key
        self.values[layer_idx][:, :, start:end] = value
        self._lengths[layer_idx] = end
        return self.keys[layer_idx][:, :, :end], self.values[layer_idx][:, :, :end]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """已写入多少个位置。"""
        return self._lengths[layer_idx]


class SlotKVCache:
    """卡上的 KV 缓存：行就是槽位，每个槽位自己有长度，由引擎记；各槽位一样长，一次核算完所有的行。

    K、V 并排放在一个张量 ``store`` ``[层, 槽位, 2·H_kv, 容量 + 1, D]`` 里（前一半头是 K），一个新位置的 K、V 一次写进去；
    ``keys``、``values`` 是它的两半。每个槽位从 0 起左对齐，所以新来的请求可以在别的行写到一半时住进空槽位，不必等齐。
    没写到的位置是 0：它们会进注意力再被掩掉，若是随机的内存可能是 NaN，掩掉也还是 NaN。
    容量不够时至少长四分之一，只抄用到的。

    末尾多出的一列（位置 :attr:`capacity`）谁的词元也不放：录制的解码（:mod:`minimind.inference.cuda_graph`）补的行往那里写。

    Args:
        num_layers, num_slots, num_kv_heads, head_dim: 尺寸。
    """

    GRANULE = 64  # 列数取它的倍数，免得只差几个位置也重新申请

    def __init__(
        self,
        num_layers: int,
        num_slots: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.num_kv_heads = num_kv_heads
        shape = (num_layers, num_slots, 2 * num_kv_heads, 0, head_dim)
        self.store = torch.zeros(shape, dtype=dtype, device=device)
        self._used = 0

    @property
    def keys(self) -> Tensor:
        return self.store[:, :, : self.num_kv_heads]

    @property
    def values(self) -> Tensor:
        return self.store[:, :, self.num_kv_heads :]

    @property
    def capacity(self) -> int:
        """每个槽位放得下多少个位置。"""
        return max(0, self.store.shape[3] - 1)

    def reserve(self, length: int) -> None:
        """保证每个槽位放得下 ``length`` 个位置。"""
        old = self.capacity
        if length > old:
            columns = -(-(max(length, old + old // 4) + 1) // self.GRANULE) * self.GRANULE
            grown = self.store.new_zeros((*self.store.shape[:3], columns, self.store.shape[4]))
            grown[:, :, :, : self._used] = self.store[:, :, :, : self._used]
            self.store = grown
        self._used = max(self._used, length)

    def copy(self, source: list[int], target: list[int], length: int) -> None:
        """把 ``source`` 各槽位的前 ``length`` 个位置抄到 ``target``（两边不相交）。"""
        for layer in self.store:
            layer[target, :, :length] = layer[source, :, :length]
