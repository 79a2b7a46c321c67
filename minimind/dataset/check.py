"""``minimind data check``：训练之前看清一份数据——坏行、长度、截断、填充、学的是哪一段。"""

from __future__ import annotations

import collections
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from minimind.arguments import Arguments, arg, parse_args
from minimind.console import say
from minimind.dataset.jsonl import DataError, short
from minimind.dataset.schema import KINDS, detect_kind
from minimind.dataset.spec import parse_spec
from minimind.errors import UserError
from minimind.paths import resolve_path
from minimind.ranges import MANY

if TYPE_CHECKING:
    from minimind.dataset.mixture import MixedCache
    from minimind.dataset.token_cache import TokenCache

SHELLS = {
    "gzip": "（gzip 压缩）",
    "zstd": "（zstd 压缩）",
    "json": "（JSON 数组）",
    "parquet": "（Parquet）",
    "arrow": "（Arrow）",
}

# 角色统计抽样多少条：看分布够了，不必为它把几 GB 再解析一遍
SAMPLED_RECORDS = 2000
# 例子最多显示这么多 token
EXAMPLE_TOKENS = 300


@dataclass
class CheckArguments(Arguments):
    """检查数据（jsonl、压缩的、Parquet、Arrow……），报告坏行、长度与截断"""

    file: str = arg(
        "", "文件、文件夹或通配符，几个用逗号隔开，可带权重，写法同 --data_path", metavar="文件", text="paths"
    )
    kind: str = arg("auto", "数据种类", ("auto", *KINDS))
    max_seq_len: int = arg(512, "按这个长度算截断与填充", low=2, high=32768)
    tokenizer_path: str | None = arg(None, "分词器文件夹；不给则用随包的", text="path")
    num_workers: int | None = arg(None, "分词的进程数；不给则用全部核", low=0, high=256)
    examples: int = arg(2, "显示几条例子", low=0, high=MANY)
    histogram: str | None = arg(None, "把长度分布画成图，写到这个 .png 文件", text="path")


def main_check(argv: list[str] | None = None) -> int:
    """检查一份数据并打印报告；有坏行时返回 1。"""
    args = parse_args(CheckArguments, argv, prog="minimind data check")

    from minimind.dataset.cache import open_cache
    from minimind.tokenizer import load_tokenizer

    picture = resolve_path(args.histogram) if args.histogram else None
    if picture and picture.suffix.lower() != ".png":
        raise UserError(
            f"是 {picture.name}", where="--histogram", expected="以 .png 结尾的文件名", fix="改成 长度.png"
        )
    spec = args.file
    parts = parse_spec(spec, "文件")
    kind = detect_kind(parts[0].files[0]) if args.kind == "auto" else args.kind
    tokenizer = load_tokenizer(args.tokenizer_path)
    cache = open_cache(spec, kind, tokenizer, num_workers=args.num_workers, on_bad_line="skip", flag="文件")
    files = getattr(cache, "caches", [cache])

    out = Console(soft_wrap=True, highlight=False)
    for one in files:
        out.print(_overview(one, kind))
        if one.meta["notes"]:
            rows = [(sentence, f"{count:,} 条") for sentence, count in one.meta["notes"].items()]
            out.print(_table("改写的写法与没有用上的字段", rows))
    if len(files) > 1:
        documents, duplicates = len(cache), _count_duplicates(cache)
        out.print(
            _table(
                f"合起来 {len(files)} 个文件",
                [
                    ("文档", f"{documents:,}"),
                    ("完全重复的文档", f"{duplicates:,}（{duplicates / documents:.1%}）"),
                    ("token", f"{int(cache.offsets[-1]):,}"),
                ],
            )
        )
    out.print(_lengths(cache, kind, args.max_seq_len))
    out.print(bars(np.diff(cache.offsets), args.max_seq_len))
    if picture:
        from minimind.dataset.lengths import draw_lengths

        draw_lengths(np.diff(cache.offsets), args.max_seq_len, cache.name, picture)
        say(f"长度分布画在 {picture}")
    out.print(_training(spec, kind, tokenizer, args.max_seq_len, args.num_workers))
    if kind != "pretrain":
        out.print(_roles(cache, kind))
    if kind == "rl":
        out.print(_references(cache))
    for i in np.linspace(0, len(cache) - 1, min(args.examples, len(cache))).astype(int):
        _print_example(out, cache, tokenizer, int(i), kind)
    return max([_print_bad_lines(out, one) for one in files])


def _table(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in rows:
        table.add_row(name, escape(value))
    return table


def _overview(cache: TokenCache, kind: str) -> Table:
    meta = cache.meta
    size, tokens, docs = meta["source"]["bytes"], meta["num_tokens"], meta["num_documents"]
    records = docs // 2 if kind == "dpo" else docs
    duplicates = _count_duplicates(cache)
    return _table(
        f"{cache.name}（{kind}）",
        [
            ("行数", f"{meta['num_lines']:,}"),
            ("可用记录", f"{records:,}"),
            ("坏行", f"{meta['bad_count']:,}"),
            ("空行", f"{meta['num_lines'] - meta['bad_count'] - records:,}"),
            ("完全重复的文档", f"{duplicates:,}（{duplicates / docs:.1%}）"),
            ("文件大小", f"{size / 1e6:,.1f} MB{SHELLS.get(meta.get('shell'), '')}"),
            ("token", f"{tokens:,}"),
        ],
    )


def _count_duplicates(cache: TokenCache | MixedCache) -> int:
    """内容与前面某篇逐 token 相同的篇数。"""
    seen: set[int] = set()
    for i in range(len(cache)):
        seen.add(hash(cache.document(i).tobytes()))
    return len(cache) - len(seen)


def _lengths(cache: TokenCache | MixedCache, kind: str, max_seq_len: int) -> Table:
    lengths = np.diff(cache.offsets)
    name = {"pretrain": "每篇", "rl": "每个提示", "dpo": "每一边"}.get(kind, "每段对话")
    rows = [(f"p{q}", f"{np.percentile(lengths, q):,.0f}") for q in (50, 90, 99)]
    over = int((lengths > max_seq_len).sum())
    return _table(
        f"{name}的 token 数",
        [
            ("平均", f"{lengths.mean():,.1f}"),
            *rows,
            ("最长", f"{lengths.max():,}（{_place(cache, int(lengths.argmax()))}）"),
            (f"超过 {max_seq_len}", f"{over:,}（{over / len(lengths):.1%}）"),
        ],
    )


def _place(cache: TokenCache | MixedCache, i: int) -> str:
    """第 i 篇在哪里；几个文件时带上文件名。"""
    file, line = cache.origin(i)
    return f"第 {line} 行" if file == cache.source else f"{file.name} 第 {line} 行"


def bars(lengths: np.ndarray, max_seq_len: int, rows: int = 10, width: int = 40) -> Table:
    """终端里的长度分布：到 99 分位为止等分几格，更长的合在最后一格。"""
    top = max(int(np.percentile(lengths, 99)), 1)
    step = max(-(-top // rows), 1)
    counts = np.bincount(np.minimum(lengths // step, rows), minlength=rows + 1)
    table = Table(title="长度分布（token 数）", title_justify="left", show_header=False, box=None)
    for column in ("right", "left", "right"):
        table.add_column(justify=column)  # type: ignore[arg-type]
    for k, count in enumerate(counts.tolist()):
        if k == rows and not count:
            continue
        name = f"{k * step:,}–{(k + 1) * step - 1:,}" if k < rows else f"{k * step:,} 以上"
        bar = "█" * round(width * count / counts.max()) or ("▏" if count else "")
        style = "yellow" if k * step > max_seq_len else None
        table.add_row(name, bar, f"{count:,}", style=style)
    return table


def _training(spec: str, kind: str, tokenizer, max_seq_len: int, num_workers: int | None) -> Table:
    """按 ``max_seq_len`` 训练时会怎样：截断、丢弃、填充、目标数。"""
    from minimind.dataset.lm_dataset import DATASETS

    title = f"按 --max_seq_len {max_seq_len} 训练"
    try:
        dataset = DATASETS[kind](spec, tokenizer, max_seq_len, on_bad_line="skip", num_workers=num_workers)
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
    elif kind == "kto":
        rows = [
            ("可用的回答", f"{stats['answers']:,}"),
            ("截断", f"{stats['truncated']:,}（{stats['truncated_share']:.1%}）"),
            ("截断而不学的 token", f"{dataset.cut_tokens:,}"),
            ("没有任何目标而丢弃", f"{stats['dropped']:,}"),
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
    shares = stats.get("shares", [])
    rows += [
        (f"一轮里 {name}", f"{count:,} 条（{size:,} 条可用，占 {count / sum(s[2] for s in shares):.2%}）")
        for name, size, count in shares
    ]
    return _table(title, rows)


def _share(stats: dict[str, Any], max_seq_len: int) -> float:
    return stats["targets"] / max(stats["rows"] * max_seq_len, 1)


def _roles(cache: TokenCache | MixedCache, kind: str) -> Table:
    """抽样统计角色次序。"""
    shapes: collections.Counter[str] = collections.Counter()
    picked = np.unique(np.linspace(0, len(cache) - 1, min(SAMPLED_RECORDS, len(cache))).astype(int))
    for i in picked.tolist():
        turns = cache.record(i)["chosen" if kind == "dpo" else "conversations"]
        roles = [turn["role"] for turn in turns]
        shapes["→".join(roles) if len(roles) <= 6 else f"{'→'.join(roles[:4])}→…（{len(roles)} 回合）"] += 1
    rows = [(shape, f"{count / len(picked):.1%}") for shape, count in shapes.most_common(6)]
    return _table(f"角色次序（抽样 {len(picked):,} 条）", rows)


def _references(cache: TokenCache | MixedCache) -> Table:
    """参考答案：空的有多少，最常见的是哪些。"""
    from minimind.dataset.lm_dataset import reference_counts

    counts = reference_counts(cache, np.arange(len(cache)))
    total, empty = counts.total(), counts.pop("", 0)
    rows = [("没有参考答案（空的或占位的词）", f"{empty:,}（{empty / total:.1%}）")]
    rows += [(short(answer), f"{count / total:.1%}") for answer, count in counts.most_common(3) if count > 1]
    return _table(f"参考答案（抽样 {total:,} 条）", rows)


def _print_example(out: Console, cache: TokenCache | MixedCache, tokenizer, i: int, kind: str) -> None:
    """打印渲染后的一条；要学的部分着色，没有颜色时用 ⟦ ⟧ 括起。"""
    ids = cache.document(i)
    spans = cache.spans[cache.span_offsets[i] : cache.span_offsets[i + 1]].tolist()
    if kind == "pretrain":
        spans = [[1, len(ids)]]
    side = ("（chosen）", "（rejected）")[i % 2] if kind == "dpo" else ""
    out.print(f"\n例：{_place(cache, i)}{side}，{len(ids)} 个 token，⟦绿色⟧ 的部分是训练目标", style="bold")
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
        out.print(f"\n{cache.name}：没有坏行", style="green")
        return 0
    out.print(
        f"\n{cache.name}：坏行 {count:,} 条，训练会在第一条停下（--on_bad_line skip 跳过它们）：",
        style="bold red",
    )
    if len(cache.meta["bad_kinds"]) > 1:
        for name, times in cache.meta["bad_kinds"].items():
            out.print(f"  {times:,} 条 {name}", markup=False)
    for data in cache.meta["bad"]:
        error = DataError.from_dict(data)
        out.print("  " + str(error.at(cache.source, error.line)), markup=False)
    if count > len(cache.meta["bad"]):
        out.print(f"  ……另有 {count - len(cache.meta['bad']):,} 条")
    return 1
