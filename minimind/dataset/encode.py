"""一段 jsonl → id、目标区间与划分哈希：缓存的子进程与主进程共用的那一步。"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minimind.dataset.conversation import split_prompt
from minimind.dataset.jsonl import DataError, read_lines
from minimind.dataset.schema import read_record
from minimind.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# 一次送进分词器的文本量（字节）。Encoding 对象每个 token 占上百字节，整段 4 MiB 一起送会多占 100 多 MB
BATCH_BYTES = 256 << 10


@dataclass
class Chunk:
    """一段文件的编码结果；``bad`` 非空时其余字段仍是好行的结果。

    dpo 的一条记录产生相邻的两篇：先 chosen 后 rejected。
    """

    ids: np.ndarray  # uint16 或 uint32 [tokens]
    lengths: np.ndarray  # int32 [docs]
    spans: np.ndarray  # int32 [spans, 2]，目标区间，相对文档开头
    span_counts: np.ndarray  # int32 [docs]
    split_hash: np.ndarray  # uint64 [docs]，划分训练与验证用
    lines: np.ndarray  # int64 [docs]，段内行号，从 0 起
    positions: np.ndarray  # int64 [docs]，该行在文件里的字节位置
    num_lines: int
    bad: list[dict] = field(default_factory=list)  # DataError.to_dict，line 为段内行号（从 0 起）
    notes: dict[str, int] = field(default_factory=dict)  # 改写与没用上的字段：一句话 → 几条记录


def id_dtype(tokenizer: PreTrainedTokenizerFast) -> np.dtype:
    """装得下词表的最窄整数。"""
    return np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)


def split_key(record: dict[str, Any], kind: str) -> int:
    """决定这条记录归训练还是验证的 64 位哈希，只看内容。

    对话取最后一个助手回合之前的部分：同一个提问的几种回答落在同一边，验证集的提问不会在训练集里见过。
    """
    if kind == "pretrain":
        text = record["text"]
    else:
        turns = record["chosen" if kind == "dpo" else "conversations"]
        last = max((i for i, t in enumerate(turns) if t["role"] == "assistant"), default=len(turns))
        prompt = [[t["role"], t.get("content")] for t in turns[:last]]
        text = json.dumps(prompt, ensure_ascii=False)
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def scan_chunk(path: Path, start: int, end: int, kind: str) -> tuple[int, list[dict]]:
    """只检查、不分词，返回 (行数, 坏行)。

    先把整个文件检查一遍再分词：检查每核 100 MB/s 以上，分词只有几 MB/s，坏行不该等几小时才报。
    """
    bad: list[dict] = []
    number = -1
    for number, error_or_record in enumerate(_parse(read_lines(path, start, end), kind)):
        if isinstance(error_or_record, DataError):
            bad.append({**error_or_record.to_dict(), "line": number})
    return number + 1, bad


def encode_chunk(
    path: Path, start: int, end: int, kind: str, tokenizer: PreTrainedTokenizerFast, options: dict[str, Any]
) -> Chunk:
    """读 ``[start, end)`` 里的行并编码。

    Args:
        kind: 数据种类。
        options: ``enable_thinking``（只用于 rl 的生成提示）。
    """
    raw_lines = read_lines(path, start, end)
    offsets = start + np.cumsum([0] + [len(raw) + 1 for raw in raw_lines])
    bad: list[dict] = []
    parts: list[tuple[np.ndarray, list[int], list[tuple[int, int]], list[int]]] = []
    split_hash: list[int] = []
    lines: list[int] = []
    notes: Counter[str] = Counter()

    for batch in _batches(raw_lines, kind, bad, notes):
        try:
            encoded = _encode_batch([record for _, record in batch], kind, tokenizer, options)
        except UserError as error:  # 校验放过而分词器不收的：找出是哪一行
            raise _locate(batch, kind, tokenizer, options, error) from error
        parts.append(_flatten(encoded, id_dtype(tokenizer)))
        copies = 2 if kind == "dpo" else 1
        for number, record in batch:
            split_hash += [split_key(record, kind)] * copies
            lines += [number] * copies

    lines_array = np.asarray(lines, dtype=np.int64)
    return Chunk(
        ids=np.concatenate([p[0] for p in parts]) if parts else np.zeros(0, id_dtype(tokenizer)),
        lengths=np.asarray(list(itertools.chain(*(p[1] for p in parts))), dtype=np.int32),
        spans=np.asarray(list(itertools.chain(*(p[2] for p in parts))), dtype=np.int32).reshape(-1, 2),
        span_counts=np.asarray(list(itertools.chain(*(p[3] for p in parts))), dtype=np.int32),
        split_hash=np.asarray(split_hash, dtype=np.uint64),
        lines=lines_array,
        positions=offsets[lines_array].astype(np.int64) if len(lines_array) else lines_array,
        num_lines=len(raw_lines),
        bad=bad,
        notes=dict(notes),
    )


def _parse(
    raw_lines: Iterable[bytes], kind: str, notes: Counter[str] | None = None
) -> Iterator[dict | DataError | None]:
    """逐行给出记录、错误或 None（空行）；好行里的改写按记录数计进 ``notes``。"""
    said: set[str] = set()
    for raw in raw_lines:
        said.clear()
        try:
            record = read_record(raw, kind, said.add)
        except DataError as error:
            yield error
        else:
            if notes is not None and said:
                notes.update(said)
            yield record


def _batches(
    raw_lines: list[bytes], kind: str, bad: list[dict], notes: Counter[str]
) -> Iterator[list[tuple[int, dict]]]:
    """把好行按 ``BATCH_BYTES`` 分批；坏行记进 ``bad``，改写计进 ``notes``。"""
    batch: list[tuple[int, dict]] = []
    size = 0
    for number, record in enumerate(_parse(raw_lines, kind, notes)):
        if record is None:
            continue
        if isinstance(record, DataError):
            bad.append({**record.to_dict(), "line": number})
            continue
        batch.append((number, record))
        size += len(raw_lines[number])
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode_batch(records, kind, tokenizer, options) -> list[tuple[list[int], list[bool] | None]]:
    """一批记录 → 每篇 (id, 目标掩码)；掩码为 None 表示没有目标区间（预训练全是目标，提示全不是）。"""
    from minimind.tokenizer import encode_chat_batch, encode_plain_batch, encode_pretrain

    if kind == "pretrain":
        bos, eos = encode_pretrain(tokenizer, "")
        texts = encode_plain_batch(tokenizer, [record["text"] for record in records])
        return [([bos, *ids, eos], None) for ids in texts]
    if kind == "rl":
        prompts = [split_prompt(record["conversations"])[0] for record in records]
        encoded = encode_chat_batch(
            tokenizer, prompts, add_generation_prompt=True, enable_thinking=options.get("enable_thinking")
        )
        return [(item.ids, None) for item in encoded]
    if kind == "dpo":
        conversations = [record[side] for record in records for side in ("chosen", "rejected")]
    else:
        conversations = [record["conversations"] for record in records]
    encoded = [(item.ids, item.target) for item in encode_chat_batch(tokenizer, conversations)]
    if kind == "dpo":
        for chosen, rejected in zip(encoded[::2], encoded[1::2], strict=True):
            shared_history_is_context(chosen, rejected)
    return encoded


def shared_history_is_context(
    chosen: tuple[list[int], list[bool]], rejected: tuple[list[int], list[bool]]
) -> None:
    """偏好对的两边：只有第一个不同的回合起才是“回答”，之前共同的历史只是上文；就地改目标掩码。

    共同的历史两边逐 token 相同，在 h = Δ_w − Δ_l 里本该抵消；可一按长度平均（ipo、sigmoid_norm、``--sft_coef``），
    两边的分母不同就抵消不掉，历史上的漂移会变成偏好。不同的那个回合整个都算，开头相同的几个词也在内。

    Args:
        chosen, rejected: ``(ids, 目标掩码)``，由同一个渲染器渲染。
    """
    pairs = zip(chosen[0], rejected[0], strict=False)
    differs = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(chosen[0]), len(rejected[0])))
    for _, target in (chosen, rejected):
        begin = differs
        while begin and target[begin - 1]:  # 退到这个回合的开头；回合之间隔着不是目标的角色标记
            begin -= 1
        target[:begin] = [False] * begin


def _flatten(encoded, dtype):
    """列表的列表 → 一个数组；掩码 → 区间。"""
    lengths = [len(ids) for ids, _ in encoded]
    total = sum(lengths)
    ids = np.fromiter(itertools.chain.from_iterable(ids for ids, _ in encoded), dtype, total)
    if not encoded or encoded[0][1] is None:
        return ids, lengths, [], [0] * len(lengths)
    mask = np.fromiter(itertools.chain.from_iterable(target for _, target in encoded), np.int8, total)
    starts = np.cumsum(lengths) - lengths
    mask[starts] = 0  # 每篇的第一个 token 没有上文，永远不是目标；顺带保证区间不跨文档
    edges = np.diff(mask, prepend=0, append=0)
    begin, end = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    doc = np.searchsorted(starts, begin, side="right") - 1
    spans = np.stack([begin - starts[doc], end - starts[doc]], axis=1)
    return ids, lengths, spans.tolist(), np.bincount(doc, minlength=len(lengths)).tolist()


def _locate(batch, kind, tokenizer, options, error: UserError) -> DataError:
    """一批里有一条编不出来：逐条重试，找出它。"""
    for number, record in batch:
        try:
            _encode_batch([record], kind, tokenizer, options)
        except UserError as single:
            return DataError(
                single.what, expected=single.expected, fix=single.fix or "改正或删掉这一行", line=number
            )
    raise error
