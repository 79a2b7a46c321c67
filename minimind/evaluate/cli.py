"""``minimind eval world`` 与 ``minimind eval bpb``；别的评测各在自己的模块里。"""

from __future__ import annotations

from dataclasses import dataclass

from minimind.arguments import arg, parse_args
from minimind.errors import UserError, guard
from minimind.evaluate.common import (
    EvalArguments,
    Rate,
    Stopwatch,
    data_file,
    pick,
    print_table,
    rate,
    save_result,
)
from minimind.ranges import MANY


@dataclass
class WorldArguments(EvalArguments, group="考题"):
    """微世界的考题：留出的题贪心作答，逐题判分。"""

    data_path: str | None = arg(None, "考题 eval.jsonl；不给则现造一份内置的（几秒）", text="path")
    kind: str | None = arg(None, "只考对话题或填空题；不给则按权重的种类", ("chat", "cloze"))
    tasks: str | None = arg(None, "只考这些任务，逗号分隔，例如 add,tool_call", text="filled")
    max_new_tokens: int = arg(96, "回答最多多少个 token", low=1, high=MANY)
    batch_size: int = arg(64, "同时写几题", low=1, high=65536)
    save_items: int = arg(0, "结果文件里附上每一题的回答", (0, 1))


@guard
def main_world(argv: list[str] | None = None) -> None:
    """``minimind eval world``。"""
    from minimind.evaluate.microworld import by_task, evaluate_items, read_items
    from minimind.microworld import ensure_microworld

    args = parse_args(WorldArguments, argv)
    if args.data_path:
        path = data_file(args.data_path, "", "微世界的 eval.jsonl")
    else:
        path = ensure_microworld() / "eval.jsonl"
    items = read_items(path)
    if args.tasks:
        wanted = {name.strip() for name in args.tasks.split(",") if name.strip()}
        known = dict.fromkeys(item["task"] for item in items)
        if unknown := wanted - set(known):
            raise UserError(
                f"没有任务 {'、'.join(sorted(unknown))}", expected="、".join(known), fix="改 --tasks"
            )
        items = [item for item in items if item["task"] in wanted]
    loaded, clock = args.load(), Stopwatch()
    kind = args.kind or ("cloze" if loaded.plain else "chat")
    items = pick([item for item in items if item["kind"] == kind], args.limit, args.seed)
    if not items:
        raise UserError(f"没有 {kind} 题", where=str(path), fix="改 --tasks 或 --kind")
    results = evaluate_items(
        loaded.model,
        loaded.tokenizer,
        items,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        description="微世界",
    )
    groups = by_task(results)
    levels = dict.fromkeys(item["level"] for item in items)
    rates = {task: rate([answered.score >= 1 for answered in group]) for task, group in groups.items()}
    rows = [
        (task, groups[task][0].item["level"], f"{value.total:,}", value.show())
        for task, value in rates.items()
    ]
    summary = {}
    for level in levels:
        summary[level] = rate([r.score >= 1 for r in results if r.item["level"] == level])
        rows.append((f"合计 {level}", level, f"{summary[level].total:,}", summary[level].show()))
    print_table(f"{loaded.source.name} · 微世界 {kind}", ["任务", "难度", "题数", "答对 [95 % 区间]"], rows)
    result = {
        "data": path.name,
        "kind": kind,
        "questions": len(items),
        "methods": {level: value.to_dict() for level, value in summary.items()},
        "tasks": {task: value.to_dict() for task, value in rates.items()},
        "stopped": Rate(sum(r.finished for r in results), len(results)).to_dict(),
    }
    if args.save_items:
        result["items"] = [
            {
                "task": r.item["task"],
                "prompt": r.item["prompt"],
                "answer": r.item["answer"],
                "response": r.response,
                "score": r.score,
            }
            for r in results
        ]
    save_result(args, "world", loaded, clock, result)


@dataclass
class BpbArguments(EvalArguments, group="文件"):
    """一个文件的每字节比特数：与分词器无关，越低越好。"""

    data_path: str | None = arg(
        None,
        'jsonl（{"text"} 数全文，{"conversations"} 只数助手的话）或纯文本（整个文件是一篇）',
        text="path",
    )
    max_length: int = arg(
        512,
        "每行多少个 token；更长的文档切成几行，每行重新开始。比训练时长会让模型外推",
        low=2,
        high=32768,
    )
    batch_size: int = arg(16, "每批几行", low=1, high=65536)


@guard
def main_bpb(argv: list[str] | None = None) -> None:
    """``minimind eval bpb``；``--limit`` 数的是行。"""
    from minimind.evaluate.bpb import text_loss

    args = parse_args(BpbArguments, argv)
    path = data_file(args.data_path, "pretrain_heldout.jsonl", "jsonl 或纯文本文件")
    loaded, clock = args.load(), Stopwatch()
    result = text_loss(
        loaded.model,
        loaded.tokenizer,
        path,
        max_length=args.max_length,
        batch_size=args.batch_size,
        max_rows=args.limit,
    )
    rows = [
        ("每字节比特数（bits per byte）", f"{result['bpb']:.4f}"),
        ("每 token 损失（nat）", f"{result['loss']:.4f}"),
        ("目标 token", f"{result['tokens']:,}"),
        ("UTF-8 字节", f"{result['bytes']:,}"),
        ("每 token 几个字节", f"{result['bytes'] / max(result['tokens'], 1):.3f}"),
    ]
    print_table(f"{loaded.source.name} · {path.name}", ["项目", "值"], rows)
    save_result(args, "bpb", loaded, clock, {"data": path.name, **result})
