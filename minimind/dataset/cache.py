"""分词缓存：一个文件只分一次词，之后几毫秒打开，多大都一样。

缓存放在 ``.cache/minimind``（仓库根或当前目录下；数据目录可能只读，所以不放在数据旁边），环境变量
``MINIMIND_CACHE`` 可以改地方，整个文件夹随时可以删。里面::

    index/<路径的哈希>.json   路径 → (大小, 修改时间) 与内容哈希；没变就不用重读文件
    tokens/<键>/             一份缓存；键由内容、分词器、种类与格式版本决定，文件改名或复制后仍能用
        meta.json  ids.bin  offsets.bin  spans.bin  span_offsets.bin  split_hash.bin  lines.bin  positions.bin
        plans/               拼行方案，见 token_cache.py
        text.jsonl           压缩或列式文件解出的文本（预训练不留），按行取原始记录用
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minimind.console import say
from minimind.dataset.spec import parse_spec
from minimind.dataset.token_cache import FORMAT_VERSION, FORMATS_VERSION, TokenCache
from minimind.errors import UserError
from minimind.paths import base_dir, resolve_path
from minimind.runtime.files import file_lock, replacing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from minimind.dataset.mixture import MixedCache

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


def open_cache(
    spec: str | Path, kind: str, tokenizer: Any, *args: Any, flag: str = "--data_path", **options: Any
) -> TokenCache | MixedCache:
    """打开 ``spec``（:mod:`minimind.dataset.spec`）里全部文件的缓存，没有就建；只有一个文件时就是它自己的缓存。

    其余参数见 :func:`build_cache`。
    """
    parts = parse_spec(spec, flag)
    caches = [build_cache(file, kind, tokenizer, *args, **options) for part in parts for file in part.files]
    if len(caches) == 1:
        return caches[0]
    from minimind.dataset.mixture import MixedCache

    return MixedCache(caches, [(part.name, len(part.files), part.weight) for part in parts])


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
        path: 数据文件，任一种外壳（:mod:`minimind.dataset.sources`）。
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
    if on_bad_line not in ("error", "skip"):
        raise UserError(f"不认识的 --on_bad_line {on_bad_line}", expected="error | skip")
    path = resolve_path(path)
    root = cache_root(cache_dir)
    identity = _identity(tokenizer, kind, options)
    content = remembered_hash(root, path)
    cache = _open(root, content, identity, path) if content else None
    if cache is None:
        from minimind.dataset.building import build_tokens, check_source  # 打开现成的缓存用不着读源文件的那些

        check_source(path, kind)
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
                    cache = build_tokens(
                        _folder(root, content, identity),
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


def cached_tokens(path: Path, kind: str, tokenizer: PreTrainedTokenizerFast) -> int | None:
    """``path`` 已经分过词：共多少词元；还没有为 None，什么也不建。"""
    root = cache_root()
    content = remembered_hash(root, path)
    cache = _open(root, content, _identity(tokenizer, kind, None), path) if content else None
    return None if cache is None else int(cache.offsets[-1])


def _identity(tokenizer: PreTrainedTokenizerFast, kind: str, options: dict[str, Any] | None) -> list:
    """内容之外，缓存还由什么决定。"""
    from minimind.tokenizer import tokenizer_fingerprint
    from minimind.tokenizer.layouts import OURS
    from minimind.tokenizer.templates import layout_of

    identity = [tokenizer_fingerprint(tokenizer), kind, options or {}, FORMAT_VERSION]
    layout = layout_of(tokenizer)
    if layout != OURS:  # 同一个分词器，从前的版本都按本项目的布局渲染
        identity.append(getattr(layout, "name", "template"))
    return identity


def _apply_bad_lines(cache: TokenCache, on_bad_line: str) -> None:
    """缓存里记着坏行：error 时照样报错（缓存可能是以 skip 建的），skip 时报告条数，每份缓存只说一遍。

    改写了的写法与没有用上的字段也在这里说一遍：训练前看得见，哪些内容换了样子、哪些没有学。
    """
    count, notes = cache.meta["bad_count"], cache.meta["notes"]
    first = None
    if count:
        from minimind.dataset.jsonl import DataError

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
        cache = TokenCache(folder, path)
        # 从前读不懂的写法现在也许读得懂：有坏行的旧缓存重新来过
        if cache.meta["bad_count"] and cache.meta.get("formats") != FORMATS_VERSION:
            say(f"{path.name}：上次有 {cache.meta['bad_count']:,} 条坏行，认得的写法变多了，重新分词")
            shutil.rmtree(folder, ignore_errors=True)
            return None
        return cache
    except (OSError, ValueError, KeyError):
        say(f"缓存 {folder} 不完整，重新生成")
        shutil.rmtree(folder, ignore_errors=True)
        return None


def _folder(root: Path, content: str, identity: list) -> Path:
    key = json.dumps([content, *identity], sort_keys=True)
    return root / "tokens" / hashlib.blake2b(key.encode(), digest_size=12).hexdigest()


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


# ---- 内容的哈希：文件没变就不用重读，几十 GB 的语料也能立刻打开 ----


def file_stat(path: Path) -> list[int]:
    """认出“文件没变”的依据；ctime 能发现保留了修改时间的覆盖（cp -p、rsync -t）。"""
    info = os.stat(path)
    return [info.st_size, info.st_mtime_ns, info.st_ctime_ns]


def index_file(root: Path, path: Path) -> Path:
    name = hashlib.blake2b(os.fsencode(os.path.realpath(path)), digest_size=16).hexdigest()
    return root / "index" / f"{name}.json"


def remembered_hash(root: Path, path: Path) -> str | None:
    """文件没变时返回上次算的内容哈希。"""
    try:
        entry = json.loads(index_file(root, path).read_text("utf-8"))
        return entry["content"] if entry["stat"] == file_stat(path) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # 没有记录，或记录写坏了：重新算


def remember_hash(root: Path, path: Path, stat: list[int], content: str) -> None:
    # 刚写完的文件可能在同一个时间刻度里再变一次而大小、时间都不变：两秒之内的不记，下次重算
    if time.time_ns() - max(stat[1:]) < 2_000_000_000:
        return
    file = index_file(root, path)
    text = json.dumps({"path": str(path), "stat": stat, "content": content}, ensure_ascii=False)
    with replacing(file) as temporary:
        temporary.write_text(text, "utf-8", "surrogateescape")


def hash_file(path: Path) -> str:
    """全文件的 blake2b，约 0.8 GB/s；没有专用指令的机器上 sha256 只有它的四成。"""
    digest = hashlib.blake2b(digest_size=20)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
