"""一份分词缓存在磁盘上的样子，与怎么读它；写出的是 :class:`minimind.dataset.building.CacheWriter`。"""

from __future__ import annotations

import functools
import itertools
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from minimind.dataset.packing import Packing
from minimind.runtime.files import temporary_folder

# 文件布局或编码方式变了就加一，旧缓存自然作废
FORMAT_VERSION = 3
# 认得的写法变多了就加一：只有记着坏行的旧缓存作废（见 cache.py）
FORMATS_VERSION = 1
# 压缩或列式文件解出的 jsonl，在缓存文件夹里的名字
TEXT_NAME = "text.jsonl"

FILES = {
    "offsets": np.int64,
    "spans": np.int32,
    "span_offsets": np.int64,
    "split_hash": np.uint64,
    "lines": np.int64,
    "positions": np.int64,
}


class TokenCache:
    """打开的缓存，只读。N 篇文档（dpo 每条记录两篇：chosen、rejected）。

    Attributes:
        ids: 全部 token，首尾相接，uint16 或 uint32 的内存映射 ``[tokens]``。
        offsets: 第 i 篇是 ``ids[offsets[i] : offsets[i + 1]]``，``[N + 1]``。
        spans, span_offsets: 目标区间，见 :func:`minimind.dataset.packing.trim_to_turns`；只有 sft、dpo 有。
        split_hash: 内容哈希 ``uint64 [N]``，划分训练与验证用。
        lines: 在源文件里的行号，从 1 起 ``[N]``。
        positions: 那一行的字节位置 ``[N]``。
        meta: meta.json 的内容。
        source: 源文件；缓存可能由同样内容的另一个文件建成，所以打开时给出。
    """

    weighted = False  # 一个文件，没有份额可配；几个文件的见 :class:`minimind.dataset.mixture.MixedCache`

    def __init__(self, folder: Path, source: Path):
        self.folder, self.source = folder, source
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text("utf-8"))
        for name, dtype in FILES.items():
            setattr(self, name, self._map(name, dtype))
        self.spans = self.spans.reshape(-1, 2)
        self._check_size("ids")
        self.dtype = np.dtype(self.meta["dtype"])
        self._handle: int | None = None

    def __reduce__(self):
        # 送给 DataLoader 的子进程时只送路径，到那边重新打开
        return TokenCache, (self.folder, self.source)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __del__(self):
        if getattr(self, "_handle", None) is not None:
            os.close(self._handle)

    @functools.cached_property
    def ids(self) -> np.ndarray:
        return self._map("ids", self.dtype)

    def tokens(self, begin: int, end: int) -> np.ndarray:
        """``ids[begin:end]`` 的一份拷贝。

        用 pread 而不是内存映射：逐行随机读时，映射每次缺页带进 64 KB，不久整个文件都算进常驻内存。
        1 GB 的 jsonl 随机读十万行，映射涨 578 MB，pread 涨 38 MB；每行 13 微秒对 10 微秒，差别看不出。
        """
        if not hasattr(os, "pread"):  # Windows
            return self.ids[begin:end]
        if self._handle is None:
            self._handle = os.open(self.folder / "ids.bin", os.O_RDONLY)
        width = self.dtype.itemsize
        return np.frombuffer(os.pread(self._handle, (end - begin) * width, begin * width), self.dtype)

    def document(self, i: int) -> np.ndarray:
        """第 i 篇的全部 token。"""
        return self.tokens(int(self.offsets[i]), int(self.offsets[i + 1]))

    @property
    def name(self) -> str:
        """说给人听的名字。"""
        return self.source.name

    def origin(self, i: int) -> tuple[Path, int]:
        """第 i 篇来自 ``(哪个文件, 第几行)``，行号从 1 起。"""
        return self.source, int(self.lines[i])

    def record(self, i: int) -> dict[str, Any]:
        """第 i 篇的原始记录，从源文件（压缩或列式的，从解出的文本）读那一行。"""
        from minimind.dataset.schema import read_record  # 取样本只要 token；要看原文的才读格式规则
        from minimind.dataset.sources import raw_lines

        text = self.folder / TEXT_NAME
        if not text.is_file():
            text = self.source
            if self.meta.get("shell", "plain") != "plain":  # 预训练的不留文本；平时用不到，慢慢找
                raw = next(itertools.islice(raw_lines(text), int(self.lines[i]) - 1, None))
                return read_record(raw, self.meta["kind"])
        with text.open("rb") as file:
            file.seek(int(self.positions[i]))
            return read_record(file.readline(), self.meta["kind"])

    def _check_size(self, name: str) -> Path:
        """断电可能留下截短的文件；打开时就发现，而不是训练到一半。"""
        file = self.folder / f"{name}.bin"
        if file.stat().st_size != self.meta["files"][name]:
            raise ValueError(f"{file} 的大小与记录不符")
        return file

    def _map(self, name: str, dtype) -> np.ndarray:
        file = self._check_size(name)
        if not self.meta["files"][name]:  # 空文件不能映射
            return np.zeros(0, dtype)
        # 退回普通数组的外壳：memmap 子类取一个标量要多花一微秒
        return np.memmap(file, dtype=dtype, mode="r").view(np.ndarray)


# ---- 拼行方案存在缓存旁边：语料再大，第二次启动也不用重算 ----


def read_plan(folder: Path) -> tuple[Packing, dict[str, Any]] | None:
    """存着的方案与它的统计；没有或不完整时为 ``None``。"""
    try:
        stats = json.loads((folder / "stats.json").read_text("utf-8"))
        arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in Packing._fields]
    except (OSError, ValueError):
        return None
    return Packing(*(array.view(np.ndarray) for array in arrays)), stats


def write_plan(folder: Path, packing: Packing, stats: dict[str, Any]) -> None:
    """存下方案；别的进程先存好了，或目录只读、磁盘满：方案可以重算，不存也能训练。"""
    with suppress(OSError), temporary_folder(folder) as temporary:
        for name, array in zip(Packing._fields, packing, strict=True):
            np.save(temporary / f"{name}.npy", array)
        (temporary / "stats.json").write_text(json.dumps(stats), "utf-8")
        os.rename(temporary, folder)
