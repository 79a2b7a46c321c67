"""必须调用工具时，调用得和自己决定时一样好吗：同一批题，tool_choice 依次为 auto、required、点名，数写对了几个。

    python benchmarks/check_forced_calls.py --save_dir out/demo --weight full_sft

题是“用计算器算a*b”（两位数乘一位数，与微世界里教的相同，由种子定），工具是 calculator(expression) 与 clock()，贪心。三种的 exact 应当
差不超过一个：约束只该挡住写错的，不该让写对的变错。走的是服务器真的那条路（同一个 :class:`ChatAnswer` 与引擎线程）。
"""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import dataclass

from minimind.arguments import arg, parse_args
from minimind.errors import guard
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
CHOICES = {
    "auto": "auto",
    "required": "required",
    "named": {"type": "function", "function": {"name": "calculator"}},
}


@dataclass
class ForcedArguments(LoadArguments):
    """自己决定与必须调用，写对的个数。"""

    questions: int = arg(40, "几道题")
    seed: int = arg(42, "题的种子")


def questions(count: int, seed: int) -> list[str]:
    """``count`` 个两位数乘一位数的算式，互不相同。"""
    pairs = random.Random(seed).sample([(a, b) for a in range(11, 90) for b in range(2, 10)], count)
    return [f"{a}*{b}" for a, b in pairs]


async def count(model, asked: list[str], choice) -> dict[str, int]:
    """调用了几个、算式抄对了几个、为什么停。"""
    from minimind.serve.chat import ChatAnswer
    from minimind.serve.generation import Settings, submit
    from minimind.serve.metrics import Metrics
    from minimind.serve.schemas import ChatRequest

    settings, metrics = Settings(), Metrics()

    async def one(expression: str) -> dict:
        message = {"role": "user", "content": f"用计算器算{expression}"}
        body = {"messages": [message], "tools": TOOLS, "tool_choice": choice, "temperature": 0}
        answer = ChatAnswer(model, ChatRequest.model_validate({**body, "max_tokens": 64}))
        return (await answer.whole(submit(answer.job, settings), settings, metrics))["choices"][0]

    found = {"calls": 0, "exact": 0, "finished": 0}
    for expression, made in zip(asked, await asyncio.gather(*map(one, asked))):
        calls = made["message"].get("tool_calls") or []
        found["calls"] += bool(calls)
        found["finished"] += made["finish_reason"] == "tool_calls"
        functions = [(c["function"]["name"], c["function"]["arguments"]) for c in calls]
        right = {"expression": expression}
        found["exact"] += any(n == "calculator" and _loads(a) == right for n, a in functions)
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
    model, asked = ServedModel("minimind", loaded, runner), questions(args.questions, args.seed)
    results = {name: asyncio.run(count(model, asked, choice)) for name, choice in CHOICES.items()}
    runner.close()
    for name, found in results.items():
        print(f"{name:10}" + "  ".join(f"{key} {value}/{len(asked)}" for key, value in found.items()))
    exact = [found["exact"] for found in results.values()]
    return int(min(exact[1:]) < exact[0] - 1)


if __name__ == "__main__":
    raise SystemExit(main())
