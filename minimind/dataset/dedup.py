"""``minimind data dedup``：去掉完全重复与近似重复的记录，留下先出现的那一条。

完全重复：改写之后的内容（角色、正文、工具调用；强化学习的还有答案与资料）逐字相同。近似重复：文字按字切成相邻五字的片段，
两条的片段集合的 Jaccard 相似度 |A∩B| / |A∪B| 用 MinHash 估（Broder 1997），LSH 找候选（datasketch）；128 个哈希时估计的标准差
是 √(J(1−J)/128)，J = 0.8 时约 3.5 %，这样的一对有 95 % 进得了候选，0.85 的 99 %。强化学习的答案、资料或 KTO 的好坏不同的，文字再像也都留下。
每条约占 6 KB 内存，一百万条约 6 GB；只去完全重复（``--near 0``）时约 0.1 KB。
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from minimind.arguments import arg, parse_args
from minimind.console import say
from minimind.dataset.normalize import FIELDS
from minimind.dataset.rows import RowArguments, Rows, dump
from minimind.dataset.tables import need
from minimind.dataset.turns import HARMLESS
from minimind.errors import UserError
from minimind.paths import resolve_path
from minimind.runtime.files import atomic_write, check_target

HASHES = 128
SHINGLE = 5
# 找候选宁多勿漏（误报、漏报的权重）：候选反正逐个核对，漏掉的却再也找不回来。两样并重时 0.8 处只有四成进得了候选
LSH_WEIGHTS = (0.05, 0.95)
# 找候选用的门槛到此为止：再高就只剩一条带，库不收
MAX_LSH_THRESHOLD = 0.95


@dataclass
class DedupArguments(RowArguments):
    """去掉完全重复与近似重复（MinHash）的记录，留下先出现的"""

    near: float = arg(
        0.8, "片段相似度达到这么多就算近似重复；0 表示只去完全重复（不需要 datasketch）", low=0, high=1
    )
    removed: str | None = arg(None, "去掉了哪些、各与哪一条重复，写到这个 jsonl 文件", text="path")


def content_key(record: dict[str, Any], kind: str) -> bytes:
    """完全重复与否看它：有意义的内容的哈希，编号出处之类不算。"""
    return _hash([[record[name] for name in FIELDS[kind]], _besides(record, kind)])


def verdict_key(record: dict[str, Any], kind: str) -> bytes:
    """文字之外定对错的东西的哈希：它不同的两条，文字再像也不是重复。"""
    return _hash([record["label"] if kind == "kto" else None, _besides(record, kind)])


def _besides(record: dict[str, Any], kind: str) -> dict[str, Any]:
    """强化学习的记录整条交给奖励函数：同一个提问，答案（``gt``）或资料（``lookup``）不同就是两道题。"""
    if kind != "rl":
        return {}
    return {
        name: value for name, value in record.items() if name not in HARMLESS and name not in FIELDS[kind]
    }


def _hash(value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False, sort_keys=True)
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
        self.threshold, self.kept, self.verdicts = threshold, {}, {}
        self.index = self.library.MinHashLSH(
            threshold=min(threshold, MAX_LSH_THRESHOLD), num_perm=HASHES, weights=LSH_WEIGHTS
        )

    def find(self, text: str, verdict: bytes = b"") -> tuple[Any, float, Any]:
        """``(最像的一条的名字或 None, 相似度, 这条的 MinHash)``；只同 ``verdict`` 相同的比。"""
        minhash = self.library.MinHash(num_perm=HASHES, hashfunc=zlib.crc32)
        minhash.update_batch(shingles(text))
        best, score = None, 0.0
        for name in sorted(self.index.query(minhash)):
            if self.verdicts[name] != verdict:
                continue
            similarity = float((minhash.hashvalues == self.kept[name]).mean())
            if similarity >= self.threshold and similarity > score:
                best, score = name, similarity
        return best, score, minhash

    def keep(self, name: Any, minhash: Any, verdict: bytes = b"") -> None:
        # 哈希是 32 位的，库用 64 位存着
        self.kept[name], self.verdicts[name] = minhash.hashvalues.astype(np.uint32), verdict
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
                verdict = verdict_key(record, rows.kind)
                first, similarity, minhash = near.find(plain_words(record, rows.kind), verdict)
                if first is not None:
                    drop("near", at, first, similarity)
                    continue
                near.keep(at, minhash, verdict)
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
