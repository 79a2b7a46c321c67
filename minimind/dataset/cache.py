"""分词缓存：一个 jsonl 只分一次词，之后几毫秒打开，多大都一样。

缓存放在 ``.cache/minimind``（仓库根或当前目录下；数据目录可能只读，所以不放在数据旁边），环境变量
``MINIMIND_CACHE`` 可以改地方，整个文件夹随时可以删。里面::

    index/<路径的哈希>.json   路径 → (大小, 修改时间) 与内容哈希；没变就不用重读文件
    tokens/<键>/             一份缓存；键由内容、分词器、种类与格式版本决定，文件改名或复制后仍能用
        meta.json  ids.bin  offsets.bin  spans.bin  span_offsets.bin  split_hash.bin  lines.bin  positions.bin
        plans/               拼行方案，见 packed.py
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minimind.console import format_duration, progress, say
from minimind.cpus import available_cpus
from minimind.dataset.content_index import file_stat, hash_file, index_file, remember_hash, remembered_hash
from minimind.dataset.encode import id_dtype
from minimind.dataset.jsonl import DataError, check_readable, line_ranges
from minimind.dataset.schema import KINDS
from minimind.dataset.token_cache import FILES, FORMAT_VERSION, CacheWriter, TokenCache
from minimind.dataset.workers import WorkerPool, run_inline
from minimind.errors import UserError
from minimind.paths import base_dir, resolve_path
from minimind.runtime.files import file_lock, unique_tag

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# 一个任务读多少字节；1 GB 的文件两个子进程分词，全部进程合计的峰值 0.5 GB
CHUNK_BYTES = 4 << 20
# 小于这么大的文件在本进程里分词：两秒的活不值得等子进程启动
INLINE_BYTES = 6 << 20
MAX_WORKERS = 16
# torchrun 的其余进程晚这么久才去抢锁，让会显示进度条的主进程来分词
RANK_DELAY_SECONDS = 2.0

_reported: set[Path] = set()  # 本进程里已报告过坏行的缓存


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """缓存放哪里：参数、环境变量 ``MINIMIND_CACHE``、``.cache/minimind``，依次取第一个有的。"""
    if cache_dir is not None:
        return resolve_path(cache_dir)
    if os.environ.get("MINIMIND_CACHE"):
        return Path(os.environ["MINIMIND_CACHE"]).expanduser().absolute()
    return base_dir() / ".cache" / "minimind"


def build_cache(
    path: str | Path,
    kind: str,
    tokenizer: PreTrainedTokenizerFast,
    cache_dir: str | Path | None = None,
    num_workers: int | None = None,
    on_bad_line: str = "error",
    options: dict[str, Any] | None = None,
) -> TokenCache:
    """打开 ``path`` 的分词缓存，没有就建。多个进程同时调用时一个建、其余等。

    Args:
        path: jsonl 文件。
        kind: :data:`minimind.dataset.schema.KINDS` 之一。
        tokenizer: 分词器。
        cache_dir: 见 :func:`cache_root`。
        num_workers: 分词的子进程数，默认全部核（至多 16）；0 或 1 表示在本进程里做。
        on_bad_line: ``error`` 遇坏行报错、什么也不留下；``skip`` 跳过并报告条数。
        options: 影响编码的选项（rl 的 ``enable_thinking``），是缓存键的一部分。

    Raises:
        DataError: 坏行。
        UserError: 文件不存在、磁盘满、缓存目录不可写等。
    """
    from minimind.tokenizer import tokenizer_fingerprint

    if kind not in KINDS:
        raise UserError(f"不认识的数据种类 {kind}", expected=" | ".join(KINDS))
    if on_bad_line not in ("error", "skip"):
        raise UserError(f"不认识的 --on_bad_line {on_bad_line}", expected="error | skip")
    path = resolve_path(path)
    check_readable(path)
    root = cache_root(cache_dir)
    identity = [tokenizer_fingerprint(tokenizer), kind, options or {}, FORMAT_VERSION]

    content = remembered_hash(root, path)
    cache = _open(root, content, identity, path) if content else None
    if cache is None:
        if int(os.environ.get("LOCAL_RANK", "0")):
            time.sleep(RANK_DELAY_SECONDS)
        with _translate_os_errors(root), _lock(root, path):
            content = remembered_hash(root, path)  # 等锁的时候别人可能已经建好
            stat = file_stat(path)
            if content is None:
                content = hash_file(path)
            # 内容相同的另一个文件可能正在别的进程里建：源文件的锁管不到它，所以再按内容锁一次
            with file_lock(root / "locks" / f"{_folder(root, content, identity).name}.lock"):
                cache = _open(root, content, identity, path)
                if cache is None:
                    cache = _build(
                        root,
                        content,
                        identity,
                        path,
                        kind,
                        tokenizer,
                        num_workers,
                        on_bad_line,
                        options or {},
                    )
            if file_stat(path) != stat:
                shutil.rmtree(cache.folder, ignore_errors=True)
                raise UserError(
                    f"{path} 在分词过程中被改动了", fix="等写入它的程序结束后再运行；缓存没有保留"
                )
            remember_hash(root, path, stat, content)
    _apply_bad_lines(cache, on_bad_line)
    return cache


def _apply_bad_lines(cache: TokenCache, on_bad_line: str) -> None:
    """缓存里记着坏行：error 时照样报错（缓存可能是以 skip 建的），skip 时报告条数，每份缓存只说一遍。

    改写了的写法与没有用上的字段也在这里说一遍：训练前看得见，哪些内容换了样子、哪些没有学。
    """
    count, notes = cache.meta["bad_count"], cache.meta["notes"]
    first = None
    if count:
        first = DataError.from_dict(cache.meta["bad"][0])
        first = first.at(cache.source, first.line)
        if on_bad_line == "error":
            raise first
    # 训练集与验证集、检查与统计各打开一次同一份缓存
    if cache.folder in _reported:
        return
    _reported.add(cache.folder)
    if first:
        say(
            f"{cache.source.name}：跳过了 {count:,} 条坏行（共 {cache.meta['num_lines']:,} 行），第一条：{first}"
        )
    if notes:
        said = "；".join(f"{sentence} {count:,} 条" for sentence, count in notes.items())
        say(f"{cache.source.name}：{said}。")


def _open(root: Path, content: str, identity: list, path: Path) -> TokenCache | None:
    """打开已有的缓存；没有、或文件残缺（例如断电）时返回 None。"""
    folder = _folder(root, content, identity)
    if not folder.is_dir():
        return None
    try:
        return TokenCache(folder, path)
    except (OSError, ValueError, KeyError):
        say(f"缓存 {folder} 不完整，重新生成")
        shutil.rmtree(folder, ignore_errors=True)
        return None


def _folder(root: Path, content: str, identity: list) -> Path:
    key = json.dumps([content, *identity], sort_keys=True)
    return root / "tokens" / hashlib.blake2b(key.encode(), digest_size=12).hexdigest()


# ---- 建缓存 ----


@contextmanager
def _lock(root: Path, path: Path) -> Iterator[None]:
    """每个源文件一把锁；出来时把空目录也收走，失败的运行不留任何东西。"""
    lock = root / "locks" / index_file(root, path).with_suffix(".lock").name
    try:
        with file_lock(lock, lambda: say(f"另一个进程正在为 {path.name} 分词，等它完成")):
            yield
    finally:
        for folder in (lock.parent, root / "tokens", root / "index", root, root.parent):
            if folder == root.parent and folder.name != ".cache":
                break
            with suppress(OSError):  # 非空就留着
                folder.rmdir()


@contextmanager
def _translate_os_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = {
            errno.ENOSPC: "磁盘满了",
            errno.EDQUOT: "磁盘配额用完了",
            errno.EACCES: "没有写权限",
            errno.EROFS: "那里是只读的",
        }.get(error.errno, error.strerror)
        raise UserError(
            f"写不了分词缓存 {root}：{reason}",
            fix="用环境变量 MINIMIND_CACHE 指到一个有空间、可写的目录",
        ) from error


def _build(root, content, identity, path, kind, tokenizer, num_workers, on_bad_line, options) -> TokenCache:
    size = path.stat().st_size
    if num_workers is None:
        num_workers = min(available_cpus(), MAX_WORKERS)
    num_workers = min(num_workers, -(-size // CHUNK_BYTES))
    inline = num_workers <= 1 or size <= INLINE_BYTES
    setup = {"path": path, "kind": kind, "tokenizer": tokenizer, "options": options}
    with _PoolOrInline(0 if inline else num_workers, setup) as run:
        if on_bad_line == "error":
            _scan(run, path, size)
        return _tokenize(run, root, content, identity, path, size, kind, tokenizer)


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


def _scan(run, path: Path, size: int) -> None:
    """检查每一行，第一个坏行就报错；此时还没有写过任何东西。"""
    line = 0
    ranges = list(line_ranges(path, CHUNK_BYTES))
    with progress(f"检查 {path.name}", size / 1e6, "MB") as bar:
        for (start, end), (num_lines, bad) in zip(ranges, run([("scan", *r) for r in ranges]), strict=True):
            if bad:
                raise DataError.from_dict(bad[0]).at(path, line + bad[0]["line"] + 1)
            line += num_lines
            bar.advance((end - start) / 1e6)


def make_folder(folder: Path, tries: int = 20) -> None:
    """建目录连同上级；别的进程收走空目录（见 :func:`_lock`）时再来一次。"""
    for attempt in range(tries):
        try:
            folder.mkdir(parents=True)
            return
        except FileNotFoundError:
            if attempt == tries - 1:
                raise


def _tokenize(run, root, content, identity, path, size, kind, tokenizer) -> TokenCache:
    """分词，写进临时目录，完整之后改名到位。"""
    folder = _folder(root, content, identity)
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
            ranges = list(line_ranges(path, CHUNK_BYTES))
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
            "source": {"path": str(path), "bytes": size},
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
