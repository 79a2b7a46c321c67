"""``minimind data check``：训练之前看清一份数据——坏行、长度、截断、填充、学的是哪一段。"""

from __future__ import annotations

import collections
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from minimind.arguments import Arguments, arg, parse_args
from minimind.dataset.jsonl import DataError, short
from minimind.dataset.schema import KINDS, detect_kind
from minimind.errors import UserError
from minimind.paths import resolve_path
from minimind.ranges import MANY

if TYPE_CHECKING:
    from minimind.dataset.token_cache import TokenCache

# 角色统计抽样多少条：看分布够了，不必为它把几 GB 再解析一遍
SAMPLED_RECORDS = 2000
# 例子最多显示这么多 token
EXAMPLE_TOKENS = 300


@dataclass
class CheckArguments(Arguments):
    """检查 jsonl 数据，报告坏行、长度与截断"""

    file: str = arg("", "jsonl 文件", metavar="文件", text="path")
    kind: str = arg("auto", "数据种类", ("auto", *KINDS))
    max_seq_len: int = arg(512, "按这个长度算截断与填充", low=2, high=32768)
    tokenizer_path: str | None = arg(None, "分词器文件夹；不给则用随包的", text="path")
    num_workers: int | None = arg(None, "分词的进程数；不给则用全部核", low=0, high=256)
    examples: int = arg(2, "显示几条例子", low=0, high=MANY)


def main_check(argv: list[str] | None = None) -> int:
    """检查一份数据并打印报告；有坏行时返回 1。"""
    args = parse_args(CheckArguments, argv, prog="minimind data check")

    from minimind.dataset.cache import build_cache
    from minimind.tokenizer import load_tokenizer

    path = resolve_path(args.file)
    kind = detect_kind(path) if args.kind == "auto" else args.kind
    tokenizer = load_tokenizer(args.tokenizer_path)
    cache = build_cache(path, kind, tokenizer, num_workers=args.num_workers, on_bad_line="skip")

    out = Console(soft_wrap=True, highlight=False)
    out.print(_overview(cache, path, kind))
    out.print(_lengths(cache, kind, args.max_seq_len))
    out.print(_training(path, kind, tokenizer, args.max_seq_len, args.num_workers))
    if cache.meta["notes"]:
        rows = [(sentence, f"{count:,} 条") for sentence, count in cache.meta["notes"].items()]
        out.print(_table("改写的写法与没有用上的字段", rows))
    if kind != "pretrain":
        out.print(_roles(cache, kind))
    if kind == "rl":
        out.print(_references(cache))
    for i in np.linspace(0, len(cache) - 1, min(args.examples, len(cache))).astype(int):
        _print_example(out, cache, tokenizer, int(i), kind)
    return _print_bad_lines(out, cache)


def _table(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in rows:
        table.add_row(name, escape(value))
    return table


def _overview(cache: TokenCache, path: Path, kind: str) -> Table:
    meta = cache.meta
    size, tokens, docs = meta["source"]["bytes"], meta["num_tokens"], meta["num_documents"]
    records = docs // 2 if kind == "dpo" else docs
    duplicates = _count_duplicates(cache)
    return _table(
        f"{path.name}（{kind}）",
        [
            ("行数", f"{meta['num_lines']:,}"),
            ("可用记录", f"{records:,}"),
            ("坏行", f"{meta['bad_count']:,}"),
            ("空行", f"{meta['num_lines'] - meta['bad_count'] - records:,}"),
            ("完全重复的文档", f"{duplicates:,}（{duplicates / docs:.1%}）"),
            ("文件大小", f"{size / 1e6:,.1f} MB"),
            ("token", f"{tokens:,}"),
        ],
    )


def _count_duplicates(cache: TokenCache) -> int:
    """内容与前面某篇逐 token 相同的篇数。"""
    seen: set[int] = set()
    for i in range(len(cache)):
        seen.add(hash(cache.document(i).tobytes()))
    return len(cache) - len(seen)


def _lengths(cache: TokenCache, kind: str, max_seq_len: int) -> Table:
    lengths = np.diff(cache.offsets)
    name = {"pretrain": "每篇", "rl": "每个提示", "dpo": "每一边"}.get(kind, "每段对话")
    rows = [(f"p{q}", f"{np.percentile(lengths, q):,.0f}") for q in (50, 90, 99)]
    over = int((lengths > max_seq_len).sum())
    return _table(
        f"{name}的 token 数",
        [
            ("平均", f"{lengths.mean():,.1f}"),
            *rows,
            ("最长", f"{lengths.max():,}（第 {int(cache.lines[lengths.argmax()])} 行）"),
            (f"超过 {max_seq_len}", f"{over:,}（{over / len(lengths):.1%}）"),
        ],
    )


def _training(path: Path, kind: str, tokenizer, max_seq_len: int, num_workers: int | None) -> Table:
    """按 ``max_seq_len`` 训练时会怎样：截断、丢弃、填充、目标数。"""
    from minimind.dataset.lm_dataset import DATASETS

    title = f"按 --max_seq_len {max_seq_len} 训练"
    try:
        dataset = DATASETS[kind](path, tokenizer, max_seq_len, on_bad_line="skip", num_workers=num_workers)
    except DataError:
        raise
    except UserError as error:
        return _table(title, [("不能训练", str(error))])
    stats: dict[str, Any] = dataset.stats
    if kind == "rl":
        rows = [("可用的提示", f"{stats['prompts']:,}"), ("过长而丢弃", f"{stats['dropped']:,}")]
    elif kind == "dpo":
        rows = [
            ("可用的对", f"{stats['pairs']:,}"),
            ("截断", f"{stats['truncated']:,}（{stats['truncated_share']:.1%}）"),
            ("截断而不学的 token", f"{dataset.cut_tokens:,}"),
            ("截断后看不出分歧而丢弃", f"{stats['dropped']:,}"),
        ]
    else:
        rows = [
            ("打包后的行数", f"{stats['rows']:,}"),
            ("填充占比", f"{stats['padding_share']:.2%}"),
            ("目标 token", f"{stats['targets']:,}（占位置的 {_share(stats, max_seq_len):.1%}）"),
        ]
        if kind == "pretrain":
            rows.append(("切成几块的文档", f"{stats['split_documents']:,}（一个 token 也不丢）"))
        else:
            rows.append(("截断的对话", f"{stats['truncated']:,}（{stats['truncated_share']:.1%}）"))
            rows.append(("截断而不学的 token", f"{stats['cut_tokens']:,}"))
            rows.append(("没有任何目标而丢弃", f"{stats['dropped']:,}"))
    return _table(title, rows)


def _share(stats: dict[str, Any], max_seq_len: int) -> float:
    return stats["targets"] / max(stats["rows"] * max_seq_len, 1)


def _roles(cache: TokenCache, kind: str) -> Table:
    """抽样统计角色次序。"""
    shapes: collections.Counter[str] = collections.Counter()
    picked = np.unique(np.linspace(0, len(cache) - 1, min(SAMPLED_RECORDS, len(cache))).astype(int))
    for i in picked.tolist():
        turns = cache.record(i)["chosen" if kind == "dpo" else "conversations"]
        roles = [turn["role"] for turn in turns]
        shapes["→".join(roles) if len(roles) <= 6 else f"{'→'.join(roles[:4])}→…（{len(roles)} 回合）"] += 1
    rows = [(shape, f"{count / len(picked):.1%}") for shape, count in shapes.most_common(6)]
    return _table(f"角色次序（抽样 {len(picked):,} 条）", rows)


def _references(cache: TokenCache) -> Table:
    """参考答案：空的有多少，最常见的是哪些。"""
    from minimind.dataset.lm_dataset import reference_counts

    counts = reference_counts(cache, np.arange(len(cache)))
    total, empty = counts.total(), counts.pop("", 0)
    rows = [("没有参考答案（空的或占位的词）", f"{empty:,}（{empty / total:.1%}）")]
    rows += [(short(answer), f"{count / total:.1%}") for answer, count in counts.most_common(3) if count > 1]
    return _table(f"参考答案（抽样 {total:,} 条）", rows)


def _print_example(out: Console, cache: TokenCache, tokenizer, i: int, kind: str) -> None:
    """打印渲染后的一条；要学的部分着色，没有颜色时用 ⟦ ⟧ 括起。"""
    ids = cache.document(i)
    spans = cache.spans[cache.span_offsets[i] : cache.span_offsets[i + 1]].tolist()
    if kind == "pretrain":
        spans = [[1, len(ids)]]
    side = ("（chosen）", "（rejected）")[i % 2] if kind == "dpo" else ""
    out.print(
        f"\n例：第 {int(cache.lines[i])} 行{side}，{len(ids)} 个 token，⟦绿色⟧ 的部分是训练目标", style="bold"
    )
    at, limit = 0, min(len(ids), EXAMPLE_TOKENS)
    for begin, end in [*spans, [limit, limit]]:
        begin, end = min(begin, limit), min(end, limit)
        out.print(escape(tokenizer.decode(ids[at:begin])), end="")
        if end > begin:
            out.print(f"[green]⟦{escape(tokenizer.decode(ids[begin:end]))}⟧[/green]", end="")
        at = end
    out.print("……" if limit < len(ids) else "")


def _print_bad_lines(out: Console, cache: TokenCache) -> int:
    count = cache.meta["bad_count"]
    if not count:
        out.print("\n没有坏行", style="green")
        return 0
    out.print(f"\n坏行 {count:,} 条，训练会在第一条停下（--on_bad_line skip 跳过它们）：", style="bold red")
    if len(cache.meta["bad_kinds"]) > 1:
        for name, times in cache.meta["bad_kinds"].items():
            out.print(f"  {times:,} 条 {name}", markup=False)
    for data in cache.meta["bad"]:
        error = DataError.from_dict(data)
        out.print("  " + str(error.at(cache.source, error.line)), markup=False)
    if count > len(cache.meta["bad"]):
        out.print(f"  ……另有 {count - len(cache.meta['bad']):,} 条")
    return 1
