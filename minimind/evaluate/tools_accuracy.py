"""工具调用的正确率：在对话里每个助手该说话的地方问模型，看它写的调用与标准答案差在哪一步。

该调用的地方，逐级看（后一级以前一级为前提）：

1. ``called``：写了调用；
2. ``format``：每个调用都是完好的 JSON，有名字与参数对象；
3. ``name``：调用的工具与标准答案相同（并行的几个调用不分先后）；
4. ``exact``：连参数也相同（按 JSON 的值比：键的次序、空白、1 与 1.0 都无所谓）。

不该调用、却给了工具的地方，看它有没有忍住：``restraint``。
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minimind.arguments import arg, parse_args
from minimind.console import progress
from minimind.dataset.jsonl import DataError, line_ranges, parse_line, read_lines
from minimind.errors import UserError, guard
from minimind.evaluate.common import (
    EvalArguments,
    Stopwatch,
    data_file,
    pick,
    print_table,
    rate,
    save_result,
)
from minimind.evaluate.generation import Written, generate_answers
from minimind.inference.reply import parse_reply
from minimind.inference.tool_calls import ToolCall
from minimind.ranges import MANY
from minimind.tokenizer import encode_chat
from minimind.tokenizer.render import call_text, parse_json_list, tools_of

LEVELS = ("called", "format", "name", "exact")


@dataclass
class ToolsArguments(EvalArguments, group="考题"):
    """工具调用：格式、名字、参数逐级看。"""

    data_path: str | None = arg(
        None,
        'jsonl：{"conversations"}（tools、tool_calls 在消息里）或 OpenAI 的 {"messages", "tools"}；'
        "默认 dataset/toolcall.jsonl",
        text="path",
    )
    max_new_tokens: int = arg(256, "每个回答最多多少个 token", low=1, high=MANY)
    max_length: int = arg(0, "提示最多多少个 token，更长的不考；0 表示模型的上下文减去回答", low=0, high=MANY)
    batch_size: int = arg(32, "同时写几个", low=1, high=65536)
    save_items: int = arg(0, "结果文件里附上每一个回答", (0, 1))


@dataclass(frozen=True)
class Case:
    """助手该说话的一处：之前的消息、可用的工具、标准答案里的调用（没有就是不该调用）。"""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    calls: list[dict[str, Any]]


def read_cases(path: Any) -> list[Case]:
    """读一个文件里全部的考点；没有工具的对话不考。

    Raises:
        DataError: 读不懂，附文件与行号。
    """
    cases, line = [], 0
    for start, end in line_ranges(path, 4 << 20):
        for raw in read_lines(path, start, end):
            line += 1
            try:
                if (record := parse_line(raw)) is not None:
                    cases += to_cases(record)
            except DataError as error:
                raise error.at(path, line) from None
            except UserError as error:
                raise DataError(error.what, expected=error.expected, fix="改正或删掉这一行").at(
                    path, line
                ) from None
    if not cases:
        raise UserError("没有一处可考", where=str(path), expected="带 tools 的对话", fix="换一个文件")
    return cases


def to_cases(record: dict[str, Any]) -> list[Case]:
    """一段对话 → 若干考点。"""
    turns = record.get("conversations", record.get("messages"))
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(
            "没有对话",
            field="conversations",
            expected="conversations 或 messages 列表",
            fix="对照格式改字段名",
        )
    tools = tools_of(turns, record.get("tools"))
    if not tools:
        return []
    cases = []
    for position, turn in enumerate(turns):
        if turn.get("role") == "assistant" and position:
            calls = [read_reference(call) for call in parse_json_list(turn.get("tool_calls"), "tool_calls")]
            cases.append(Case(turns[:position], tools, calls))
    return cases


def read_reference(call: dict[str, Any]) -> dict[str, Any]:
    """标准答案里的一个调用 → ``{"name", "arguments"}``；参数可以是 JSON 字符串。"""
    try:
        return json.loads(call_text(call))
    except ValueError:
        raise DataError(
            "标准答案的参数不是合法的 JSON", field="tool_calls", expected="JSON 对象", fix="改正或删掉这一行"
        ) from None


# ---------------------------------------------------------------- 判分


def canonical(value: Any) -> Any:
    """可散列、可比较的写法：键不分先后，``1`` 与 ``1.0`` 相同，``true`` 与 ``1`` 不同。"""
    if isinstance(value, dict):
        return ("object", frozenset((key, canonical(item)) for key, item in value.items()))
    if isinstance(value, list):
        return ("array", tuple(map(canonical, value)))
    if isinstance(value, bool) or value is None:
        return ("constant", str(value))
    return ("number", float(value)) if isinstance(value, int | float) else ("string", value)


def judge(calls: Sequence[ToolCall], expected: Sequence[dict[str, Any]]) -> dict[str, bool]:
    """该调用的一处，各级是否做到。"""
    called = bool(calls)
    well_formed = called and all(call.error is None for call in calls)
    name = well_formed and Counter(call.name for call in calls) == Counter(call["name"] for call in expected)
    exact = name and Counter((call.name, canonical(call.values())) for call in calls) == Counter(
        (call["name"], canonical(call["arguments"])) for call in expected
    )
    return dict(zip(LEVELS, (called, well_formed, name, exact)))


def summarize(cases: Sequence[Case], answers: Sequence[Written], tokenizer: Any) -> dict[str, Any]:
    """各级的比例。"""
    levels: dict[str, list[bool]] = {level: [] for level in LEVELS}
    restraint = []
    for case, answer in zip(cases, answers):
        calls = parse_reply(answer.ids, tokenizer=tokenizer).calls
        if case.calls:
            for level, reached in judge(calls, case.calls).items():
                levels[level].append(reached)
        else:
            restraint.append(not calls)
    return {
        "methods": {level: rate(hits).to_dict() for level, hits in levels.items()}
        | {"restraint": rate(restraint).to_dict(), "stopped": rate([a.finished for a in answers]).to_dict()},
        "should_call": len(levels["called"]),
        "should_not": len(restraint),
    }


@guard
def main(argv: list[str] | None = None) -> None:
    """命令行入口。"""
    from minimind.console import say
    from minimind.evaluate.common import Rate
    from minimind.inference.engine import context_length

    args = parse_args(ToolsArguments, argv)
    path = data_file(args.data_path, "toolcall.jsonl", "工具调用 jsonl")
    cases = pick(read_cases(path), args.limit, args.seed)
    loaded, clock = args.load(), Stopwatch()
    limit = args.max_length or context_length(loaded.model) - args.max_new_tokens
    prompts = [
        encode_chat(loaded.tokenizer, case.messages, case.tools, add_generation_prompt=True).ids
        for case in cases
    ]
    kept = [index for index, prompt in enumerate(prompts) if len(prompt) <= limit]
    if not kept:
        raise UserError(f"每处的提示都超过 {limit} 个 token", where=str(path), fix="调大 --max_length")
    if len(kept) < len(cases):
        say(f"{len(cases) - len(kept):,} 处的提示超过 {limit:,} 个 token，不考。")
    cases = [cases[index] for index in kept]
    with progress("工具调用", total=len(cases), unit="处") as bar:
        answers = generate_answers(
            loaded.model,
            loaded.tokenizer,
            [prompts[index] for index in kept],
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
            advance=bar.advance,
        )
    result = {"data": path.name, "questions": len(cases), **summarize(cases, answers, loaded.tokenizer)}
    titles = {
        "called": "该调用时调用了",
        "format": "　每个都完好",
        "name": "　　工具选对了",
        "exact": "　　　参数也全对",
        "restraint": "不该调用时忍住了",
        "stopped": "自己停下来",
    }
    rows = [
        (title, f"{entry['total']:,}", Rate(entry["correct"], entry["total"]).show())
        for name, title in titles.items()
        for entry in [result["methods"][name]]
    ]
    print_table(f"{loaded.source.name} · {path.name}", ["项目", "处", "比例 [95 % 区间]"], rows)
    if args.save_items:
        result["items"] = [{"expected": case.calls, "response": a.text} for case, a in zip(cases, answers)]
    save_result(args, "tools", loaded, clock, result)


if __name__ == "__main__":
    raise SystemExit(main())
