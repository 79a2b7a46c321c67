"""建分词缓存：先检查每一行，再（大文件由一组子进程）分词，写进临时目录，完整之后改名到位。"""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minimind.console import format_duration, progress, say
from minimind.dataset.encode import Chunk, id_dtype
from minimind.dataset.jsonl import DataError, line_ranges
from minimind.dataset.schema import KINDS
from minimind.dataset.sources import shell_of, write_plain
from minimind.dataset.token_cache import (
    FILES,
    FORMAT_VERSION,
    FORMATS_VERSION,
    TEXT_NAME,
    TokenCache,
)
from minimind.dataset.workers import WorkerPool, run_inline
from minimind.errors import UserError
from minimind.runtime.fair_share import available_cpus
from minimind.runtime.files import temporary_folder, unique_tag

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# 一个任务读多少字节；1 GB 的文件两个子进程分词，全部进程合计的峰值 0.5 GB
CHUNK_BYTES = 4 << 20
# 小于这么大的文件在本进程里分词：两秒的活不值得等子进程启动
INLINE_BYTES = 6 << 20
MAX_WORKERS = 16
# meta.json 里留几条坏行作例子
KEPT_BAD_LINES = 20


def bad_kind(error: dict[str, Any]) -> str:
    """坏行按哪一种计数：字段（不论第几个）与期望。"""
    field = re.sub(r"\[\d+\]", "[]", error["field"] or "整行")
    return f"{field}：期望{error['expected'] or '合法的一行'}"


class CacheWriter:
    """边收边写，内存里只有当前这一段。"""

    def __init__(self, folder: Path, dtype: np.dtype):
        self.dtype = dtype
        self.files = {name: (folder / f"{name}.bin").open("wb") for name in ("ids", *FILES)}
        self.num_documents = self.num_tokens = self.num_lines = self.num_spans = 0
        self.bad_count, self.bad = 0, []
        self.bad_kinds: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        for name in ("offsets", "span_offsets"):
            self.files[name].write(np.zeros(1, np.int64).tobytes())

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, *exc) -> None:
        for file in self.files.values():
            if exc[0] is None:
                file.flush()
                os.fsync(file.fileno())
            file.close()

    def add(self, chunk: Chunk, path: Path) -> None:
        def write(name: str, array: np.ndarray, dtype) -> None:
            self.files[name].write(np.ascontiguousarray(array, dtype=dtype))

        write("ids", chunk.ids, self.dtype)
        write("offsets", self.num_tokens + np.cumsum(chunk.lengths, dtype=np.int64), np.int64)
        write("spans", chunk.spans, np.int32)
        write("span_offsets", self.num_spans + np.cumsum(chunk.span_counts, dtype=np.int64), np.int64)
        write("split_hash", chunk.split_hash, np.uint64)
        write("lines", chunk.lines + self.num_lines + 1, np.int64)
        write("positions", chunk.positions, np.int64)
        for error in chunk.bad[: KEPT_BAD_LINES - len(self.bad)]:
            self.bad.append({**error, "file": str(path), "line": self.num_lines + error["line"] + 1})
        self.bad_count += len(chunk.bad)
        self.bad_kinds.update(map(bad_kind, chunk.bad))
        self.notes.update(chunk.notes)
        self.num_documents += len(chunk.lengths)
        self.num_tokens += len(chunk.ids)
        self.num_spans += len(chunk.spans)
        self.num_lines += chunk.num_lines


def check_source(path: Path, kind: str) -> None:
    """读不了的文件、不认识的种类，动手之前就说。"""
    if kind not in KINDS:
        raise UserError(f"不认识的数据种类 {kind}", expected=" | ".join(KINDS))
    shell_of(path)


def build_tokens(
    folder: Path,
    path: Path,
    kind: str,
    tokenizer: PreTrainedTokenizerFast,
    num_workers: int | None,
    on_bad_line: str,
    options: dict[str, Any],
) -> TokenCache:
    """给 ``path`` 分词，写成缓存 ``folder``；参数同 :func:`minimind.dataset.cache.build_cache`，锁由它拿着。"""
    if num_workers is None:
        num_workers = min(available_cpus(), MAX_WORKERS)
    with _plain_text(path, folder) as text:
        size = text.stat().st_size
        num_workers = min(num_workers, -(-size // CHUNK_BYTES))
        inline = num_workers <= 1 or size <= INLINE_BYTES
        setup = {"path": text, "kind": kind, "tokenizer": tokenizer, "options": options}
        with _PoolOrInline(0 if inline else num_workers, setup) as run:
            if on_bad_line == "error":
                _scan(run, path, text)
            return _tokenize(run, folder, path, text, kind, tokenizer)


@contextmanager
def _plain_text(path: Path, folder: Path) -> Iterator[Path]:
    """``path`` 的 jsonl 文本：本来就是的原样给出，别的外壳解进缓存旁边的临时目录，用完就删。"""
    if shell_of(path) == "plain":
        yield path
        return
    with temporary_folder(folder.with_name(f"{folder.name}-text")) as temporary:
        text = temporary / TEXT_NAME
        if path.stat().st_size > INLINE_BYTES:
            say(f"{path.name}：解成 jsonl 再分词…")
        write_plain(path, text)
        yield text


class _PoolOrInline:
    """把“有没有子进程”收在一处：``run(tasks)`` 按次序给出结果。"""

    def __init__(self, num_workers: int, setup: dict):
        self.pool = WorkerPool(num_workers, setup) if num_workers else None
        self.run = self.pool.map if self.pool else functools.partial(run_inline, setup)
        self.saved = os.environ.get("TOKENIZERS_PARALLELISM")

    def __enter__(self):
        if self.pool is None and self.saved is None:
            # 在本进程里用过 tokenizers 的多线程后再 fork（DataLoader），它会打印一大段警告
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        return self.run

    def __exit__(self, *exc) -> None:
        if self.pool is not None:
            self.pool.__exit__(*exc)
        elif self.saved is None:
            os.environ.pop("TOKENIZERS_PARALLELISM", None)


def _scan(run, path: Path, text: Path) -> None:
    """检查每一行，第一个坏行就报错；此时还没有写过缓存。``text`` 是 ``path`` 的 jsonl 文本。"""
    line = 0
    ranges = list(line_ranges(text, CHUNK_BYTES))
    with progress(f"检查 {path.name}", text.stat().st_size / 1e6, "MB") as bar:
        for (start, end), (num_lines, bad) in zip(ranges, run([("scan", *r) for r in ranges]), strict=True):
            if bad:
                raise DataError.from_dict(bad[0]).at(path, line + bad[0]["line"] + 1)
            line += num_lines
            bar.advance((end - start) / 1e6)


def make_folder(folder: Path, tries: int = 20) -> None:
    """建目录连同上级；别的进程收走空目录（见 :func:`minimind.dataset.cache.build_cache`）时再来一次。"""
    for attempt in range(tries):
        try:
            folder.mkdir(parents=True)
            return
        except FileNotFoundError:
            if attempt == tries - 1:
                raise


def _tokenize(run, folder: Path, path: Path, text: Path, kind: str, tokenizer: Any) -> TokenCache:
    """分词，写进临时目录，完整之后改名到位。``text`` 是 ``path`` 的 jsonl 文本。"""
    size = text.stat().st_size
    folder.parent.mkdir(parents=True, exist_ok=True)
    # 上次被 kill -9 的残留；持着这份内容的锁，不会删到别人正在写的
    for stale in folder.parent.glob(f"{folder.name}.tmp*"):
        shutil.rmtree(stale, ignore_errors=True)
    free = shutil.disk_usage(folder.parent).free
    if free < size * 0.7:  # 实测缓存约为原文件的 0.6 倍
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    temporary = folder.with_name(f"{folder.name}.tmp-{unique_tag()}")
    make_folder(temporary)
    started = time.monotonic()
    try:
        with CacheWriter(temporary, id_dtype(tokenizer)) as writer:
            ranges = list(line_ranges(text, CHUNK_BYTES))
            with progress(f"分词 {path.name}", size / 1e6, "MB") as bar:
                tasks = [("encode", *r) for r in ranges]
                try:
                    for (start, end), chunk in zip(ranges, run(tasks), strict=True):
                        writer.add(chunk, path)
                        bar.advance((end - start) / 1e6)
                except DataError as error:  # 分词器才发现的问题：行号还是段内的
                    if error.file is None:
                        raise error.at(path, writer.num_lines + (error.line or 0) + 1) from error
                    raise
        if not writer.num_documents:
            first = DataError.from_dict(writer.bad[0]) if writer.bad else None
            raise first or UserError(f"{path} 里没有一条记录", expected="每行一个 JSON 对象")
        meta = {
            "version": FORMAT_VERSION,
            "kind": kind,
            "dtype": writer.dtype.name,
            "num_documents": writer.num_documents,
            "num_tokens": writer.num_tokens,
            "num_lines": writer.num_lines,
            "source": {"path": str(path), "bytes": path.stat().st_size},
            "shell": shell_of(path),
            "formats": FORMATS_VERSION,
            "seconds": round(time.monotonic() - started, 3),
            "bad_count": writer.bad_count,
            "bad": writer.bad,
            "bad_kinds": dict(writer.bad_kinds.most_common()),
            "notes": dict(writer.notes.most_common()),
            "files": {name: (temporary / f"{name}.bin").stat().st_size for name in ("ids", *FILES)},
        }
        with (temporary / "meta.json").open("w", encoding="utf-8") as file:
            json.dump(meta, file, ensure_ascii=False, indent=1)
            file.flush()
            os.fsync(file.fileno())
        if text != path and kind != "pretrain":  # 预训练之外的还要按行取原文
            os.replace(text, temporary / TEXT_NAME)
        try:
            os.rename(temporary, folder)
        except OSError as error:  # 同样内容的另一个文件刚好也建完了
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if size > INLINE_BYTES:
        seconds = time.monotonic() - started
        say(
            f"分词完成：{writer.num_documents:,} 篇，{writer.num_tokens / 1e6:.1f} M token，"
            f"用时 {format_duration(seconds)}（{size / 1e6 / seconds:.1f} MB/s）"
        )
    return TokenCache(folder, path)
