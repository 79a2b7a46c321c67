"""必须调用工具时，调用得和自己决定时一样好吗：同一批题，tool_choice 依次为 auto、required、点名，数写对了几个。

    python benchmarks/check_forced_calls.py --save_dir out/demo --weight full_sft

    python benchmarks/check_forced_calls.py --save_dir out/demo --weight full_sft --data_path out/demo/microworld/eval.jsonl --questions 24

没有 ``--data_path`` 时，题是“用计算器算a*b”（两位数乘一位数，与微世界里教的相同，由种子定），工具是 calculator(expression) 与 clock()；
有时取文件里头 ``--questions`` 处该调用的地方，工具与标准答案都是它写着的。都贪心。三种的 exact 应当差不超过一个：约束只该挡住写错的，
不该让写对的变错。走的是服务器真的那条路（同一个 :class:`ChatAnswer` 与引擎线程）。
"""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import dataclass
from pathlib import Path

from minimind.arguments import arg, parse_args
from minimind.errors import guard
from minimind.evaluate.tools_accuracy import Case, to_cases
from minimind.inference.arguments import LoadArguments

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "calculator",
            "description": "计算算式",
            "parameters": {
                "type": "object",
                "properties": {"expression": {"type": "string"}},
                "required": ["expression"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "clock",
            "description": "查时间",
            "parameters": {"type": "object", "properties": {}},
        },
    },
]
CHOICES = ("auto", "required", "named")


@dataclass
class ForcedArguments(LoadArguments):
    """自己决定与必须调用，写对的个数。"""

    questions: int = arg(40, "几道题")
    seed: int = arg(42, "题的种子")
    data_path: str | None = arg(None, "带工具的 jsonl，取其中该调用的地方；默认现编计算器的题", text="path")


def questions(args: ForcedArguments) -> list[Case]:
    """互不相同的题：文件里的，或两位数乘一位数的算式。"""
    if args.data_path:
        records = map(json.loads, Path(args.data_path).read_text("utf-8").splitlines())
        cases = [case for record in records for case in to_cases(_with_answer(record)) if case.calls]
        return cases[: args.questions]
    pairs = [(a, b) for a in range(11, 90) for b in range(2, 10)]
    cases = []
    for a, b in random.Random(args.seed).sample(pairs, args.questions):
        messages = [{"role": "user", "content": f"用计算器算{a}*{b}"}]
        call = {"name": "calculator", "arguments": {"expression": f"{a}*{b}"}}
        cases.append(Case(messages, TOOLS, [call]))
    return cases


def _with_answer(record: dict) -> dict:
    """微世界的考题把标准答案写在对话外面：接到对话末尾。"""
    if record.get("grader") != "tool_call":
        return record
    answer = {"role": "assistant", "content": "", "tool_calls": [json.loads(record["answer"])]}
    return {"messages": [*record["messages"], answer]}


async def count(model, asked: list[Case], choice: str) -> dict[str, int]:
    """调用了几个、与标准答案相同的几个、为什么停。"""
    from minimind.serve.chat import ChatAnswer
    from minimind.serve.generation import Settings, submit
    from minimind.serve.metrics import Metrics
    from minimind.serve.schemas import ChatRequest

    settings, metrics = Settings(), Metrics()

    async def one(case: Case) -> dict:
        named = {"type": "function", "function": {"name": case.calls[0]["name"]}}
        # 系统消息里的工具从请求的 tools 进去；空的系统消息就不要了
        messages = [{key: value for key, value in turn.items() if key != "tools"} for turn in case.messages]
        body = {
            "messages": [turn for turn in messages if turn["role"] != "system" or turn["content"]],
            "tools": case.tools,
            "tool_choice": named if choice == "named" else choice,
            "temperature": 0,
            "max_tokens": 64,
        }
        answer = ChatAnswer(model, ChatRequest.model_validate(body))
        return (await answer.whole(submit(answer.job, settings), settings, metrics))["choices"][0]

    found = {"calls": 0, "exact": 0, "finished": 0}
    for case, made in zip(asked, await asyncio.gather(*map(one, asked))):
        calls = made["message"].get("tool_calls") or []
        found["calls"] += bool(calls)
        found["finished"] += made["finish_reason"] == "tool_calls"
        functions = [(c["function"]["name"], _loads(c["function"]["arguments"])) for c in calls]
        found["exact"] += functions == [(call["name"], call["arguments"]) for call in case.calls]
    return found


def _loads(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None


@guard
def main(argv: list[str] | None = None) -> int:
    """命令行入口；差得超过一个时退出码 1。"""
    from minimind.inference.loading import stop_ids
    from minimind.serve.models import ServedModel
    from minimind.serve.runner import EngineRunner

    args = parse_args(ForcedArguments, argv)
    loaded = args.load()
    eos = stop_ids(loaded.model, loaded.tokenizer)
    runner = EngineRunner(loaded.model, eos, max_slots=16, max_queue=args.questions, max_length=2048)
    model, asked = ServedModel("minimind", loaded, runner), questions(args)
    results = {name: asyncio.run(count(model, asked, name)) for name in CHOICES}
    runner.close()
    for name, found in results.items():
        print(f"{name:10}" + "  ".join(f"{key} {value}/{len(asked)}" for key, value in found.items()))
    exact = [found["exact"] for found in results.values()]
    return int(min(exact[1:]) < exact[0] - 1)


if __name__ == "__main__":
    raise SystemExit(main())
