"""``minimind data dedup``：去掉完全重复与近似重复的记录，留下先出现的那一条。

完全重复：改写之后的内容（角色、正文、工具调用）逐字相同。近似重复：文字按字切成相邻五字的片段，两条的片段集合的
Jaccard 相似度 |A∩B| / |A∪B| 用 MinHash 估（Broder 1997），LSH 找候选（datasketch）；128 个哈希时估计的标准差
是 √(J(1−J)/128)，J = 0.8 时约 3.5 %。每条约占 4 KB 内存，一百万条约 4 GB；只去完全重复（``--near 0``）时约 0.1 KB。
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
import zlib
from dataclasses import dataclass
from typing import Any

from minimind.arguments import arg, parse_args
from minimind.console import say
from minimind.dataset.normalize import FIELDS
from minimind.dataset.rows import RowArguments, Rows, dump
from minimind.dataset.tables import need
from minimind.errors import UserError
from minimind.paths import resolve_path
from minimind.runtime.files import atomic_write, check_target

HASHES = 128
SHINGLE = 5


@dataclass
class DedupArguments(RowArguments):
    """去掉完全重复与近似重复（MinHash）的记录，留下先出现的"""

    near: float = arg(
        0.8, "片段相似度达到这么多就算近似重复；0 表示只去完全重复（不需要 datasketch）", low=0, high=1
    )
    removed: str | None = arg(None, "去掉了哪些、各与哪一条重复，写到这个 jsonl 文件", text="path")


def content_key(record: dict[str, Any], kind: str) -> bytes:
    """完全重复与否看它：有意义的内容的哈希，编号出处之类不算。"""
    names = FIELDS[kind]
    text = json.dumps([record[name] for name in names], ensure_ascii=False, sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


def plain_words(record: dict[str, Any], kind: str) -> str:
    """近似重复与否看它：全部正文接起来，全角半角、大小写与空白不论。"""
    if kind == "pretrain":
        text = record["text"]
    else:
        names = ("chosen", "rejected") if kind == "dpo" else ("conversations",)
        turns = [turn for name in names for turn in record[name]]
        text = "\n".join(
            f"{turn.get('reasoning_content') or ''}{turn.get('content') or ''}{turn.get('tool_calls') or ''}"
            for turn in turns
        )
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


def shingles(text: str) -> set[bytes]:
    """相邻 :data:`SHINGLE` 个字的片段；更短的文字整个是一段。"""
    return {text[i : i + SHINGLE].encode() for i in range(max(len(text) - SHINGLE + 1, 1))}


class Near:
    """收着留下的各条的 MinHash，找出与新的一条最像的。

    Args:
        threshold: 相似度达到这么多才算。

    Raises:
        UserError: 没有装 datasketch。
    """

    def __init__(self, threshold: float):
        self.library = need("datasketch", "找近似重复")
        self.threshold, self.kept = threshold, {}
        self.index = self.library.MinHashLSH(threshold=threshold, num_perm=HASHES)

    def find(self, text: str) -> tuple[Any, float, Any]:
        """``(最像的一条的名字或 None, 相似度, 这条的 MinHash)``。"""
        minhash = self.library.MinHash(num_perm=HASHES, hashfunc=zlib.crc32)
        minhash.update_batch(shingles(text))
        best, score = None, 0.0
        for name in sorted(self.index.query(minhash)):
            similarity = float(minhash.jaccard(self.kept[name]))
            if similarity >= self.threshold and similarity > score:
                best, score = name, similarity
        return best, score, minhash

    def keep(self, name: Any, minhash: Any) -> None:
        self.kept[name] = minhash
        self.index.insert(name, minhash)


def main_dedup(argv: list[str] | None = None) -> int:
    """写出去重之后的 jsonl，说出各去掉多少；出错时什么也不留下。"""
    args = parse_args(DedupArguments, argv, prog="minimind data dedup")
    rows = Rows.opened(args)
    listing = resolve_path(args.removed) if args.removed else None
    if listing:
        if listing.resolve() in {rows.out.resolve(), *(f.resolve() for p in rows.parts for f in p.files)}:
            raise UserError("与输入或输出是同一个文件", where=f"--removed {listing}", fix="换一个名字")
        check_target(listing, args.force)
    near = Near(args.near) if args.near else None
    seen: dict[bytes, tuple[int, int]] = {}
    files = [file for part in rows.parts for file in part.files]
    number = {file: k for k, file in enumerate(files)}
    removed: list[bytes] = []
    counts = {"kept": 0, "exact": 0, "near": 0}

    def drop(how: str, at: tuple[int, int], first: tuple[int, int], similarity: float) -> None:
        counts[how] += 1
        if listing:
            places = {"file": at, "same_as": first}
            named = {key: f"{files[k]}:{line}" for key, (k, line) in places.items()}
            removed.append(dump({**named, "how": how, "similarity": round(similarity, 4)}))

    def write(file) -> None:
        for path, line, record in rows.read_all():
            at, key = (number[path], line), content_key(record, rows.kind)
            if key in seen:
                drop("exact", at, seen[key], 1.0)
                continue
            seen[key] = at
            if near:
                first, similarity, minhash = near.find(plain_words(record, rows.kind))
                if first is not None:
                    drop("near", at, first, similarity)
                    continue
                near.keep(at, minhash)
            file.write(dump(record))
            counts["kept"] += 1

    atomic_write(rows.out, write)
    if listing:
        atomic_write(listing, lambda file: file.writelines(removed))
    rows.say_bad()
    total = sum(counts.values())
    words = f"完全重复 {counts['exact']:,} 条（{counts['exact'] / total:.1%}）"
    if near:
        words += (
            f"，近似重复（相似度不低于 {args.near:g}）{counts['near']:,} 条（{counts['near'] / total:.1%}）"
        )
    say(f"{total:,} 条里去掉{words}；留下 {counts['kept']:,} 条 → {rows.out}")
    return 0
