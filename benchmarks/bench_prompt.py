"""读提示：长提示进来时别人要等多久，多轮对话的第二轮多快出第一个词元。

一条命令::

    OMP_NUM_THREADS=1 python benchmarks/bench_prompt.py     # 26M，随机权重，约一分钟

直接用引擎，没有网络。时钟见 :func:`common.clock_for`：单线程 CPU 是处理器时间，其余是墙钟；每项取几次里最短的。

- 分块：8 条在写的时候来一个长提示，一步读多少个（0 是不拆）。记长提示的第一个词元，与别人两个词元之间最长隔多久。
- 前缀库：一问一答之后，带着历史再问一句，用与不用前缀库。
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from common import clock_for, print_table, write_result
from torch import nn

from minimind.arguments import arg, parse_args
from minimind.errors import guard
from minimind.inference.engine import Engine
from minimind.inference.sampling import GREEDY
from minimind.model import MiniMindForCausalLM, preset
from minimind.runtime.device import resolve_device, synchronize


@dataclass
class PromptBenchArguments:
    """读提示的速度：分块与前缀库。"""

    size: str = arg("small", "模型的尺寸，随机权重")
    prompts: str = arg("1000,4000", "长提示各多少个词元，逗号分隔")
    chunks: str = arg("0,128,256,512,1024", "一步读多少个位置，0 是不拆")
    writers: int = arg(8, "长提示进来时有几条在写")
    histories: str = arg("200,1000,3000", "第一轮的提示各多少个词元")
    answer: int = arg(64, "第一轮的回答多少个词元")
    question: int = arg(20, "第二轮新加多少个词元")
    repeats: int = arg(3, "每项测几次，取最短的")
    device: str = arg("auto", "设备")
    name: str = arg("", "结果文件名的后缀")


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part.strip()]


class PromptBench:
    """两项测量共用的模型、时钟与提示。"""

    def __init__(self, args: PromptBenchArguments):
        self.args, self.device = args, resolve_device(args.device)
        torch.manual_seed(0)
        self.model: nn.Module = MiniMindForCausalLM(preset(args.size)).eval().to(self.device)
        self.generator = torch.Generator().manual_seed(0)
        self._clock = clock_for(self.device)

    def now(self) -> float:
        synchronize(self.device)
        return self._clock()

    def prompt(self, length: int) -> list[int]:
        return torch.randint(3, self.model.config.vocab_size, (length,), generator=self.generator).tolist()

    def long_prompt(self, length: int, chunk: int) -> dict[str, float]:
        """来一个长提示：它的第一个词元与别人最长的间隔，毫秒。"""
        writers, prompt = self.args.writers, self.prompt(length)
        engine = Engine(self.model, eos_ids=(), max_slots=writers + 1, prefill_chunk=chunk or None)
        for _ in range(writers):
            engine.add_request(self.prompt(50), GREEDY, self.model.config.max_position_embeddings)
        while len(engine.running) < writers:
            engine.step()
        engine.step()
        request, gaps = engine.add_request(prompt, GREEDY, 4), []
        start = self.now()
        while all(sequence.request_id != request for sequence in engine.running):
            before = self.now()
            engine.step()
            gaps.append(self.now() - before)
        return {"first_token_ms": (self.now() - start) * 1e3, "longest_gap_ms": max(gaps) * 1e3}

    def second_turn(self, history: int, tokens: int) -> dict[str, float]:
        """第二轮的第一个词元，毫秒；``reused`` 是抄来的提示位置数。"""
        engine = Engine(self.model, eos_ids=(), max_slots=2, prefix_cache_tokens=tokens)
        prompt = self.prompt(history)
        engine.add_request(prompt, GREEDY, self.args.answer)
        (first,) = [sequence for _ in range(self.args.answer) for sequence in engine.step()]
        prompt = prompt + first.ids + self.prompt(self.args.question)
        start = self.now()
        engine.add_request(prompt, GREEDY, 4)
        engine.step()
        return {"first_token_ms": (self.now() - start) * 1e3, "reused": engine.prompt_tokens[1]}

    def best(self, measure: Any, *inputs: int) -> dict[str, float]:
        """重复几次，各项取最小。"""
        runs = [measure(*inputs) for _ in range(self.args.repeats)]
        return {key: round(min(run[key] for run in runs), 1) for key in runs[0]}


def measure(args: PromptBenchArguments) -> dict[str, Any]:
    """跑两项测量。"""
    bench, chunked, turns = PromptBench(args), [], []
    for length in numbers(args.prompts):
        for chunk in numbers(args.chunks):
            result = bench.best(bench.long_prompt, length, chunk)
            chunked.append({"prompt": length, "chunk": chunk, **result})
    for history in numbers(args.histories):
        for tokens in (0, 16384):
            result = bench.best(bench.second_turn, history, tokens)
            turns.append({"history": history, "prefix_cache_tokens": tokens, **result})
    clock = bench._clock.__name__
    return {"arguments": asdict(args), "clock": clock, "chunked": chunked, "second_turn": turns}


def report(result: dict[str, Any]) -> None:
    """打印两张表。"""
    for key, title, columns in (
        ("chunked", "来一个长提示", ("提示词元", "一步读", "它的首词元 ms", "别人最长间隔 ms")),
        ("second_turn", "第二轮", ("第一轮的提示", "前缀库", "首词元 ms", "抄来的词元")),
    ):
        print_table(title, columns, [list(row.values()) for row in result[key]], f"时钟 {result['clock']}")


@guard
def main(argv: list[str] | None = None) -> None:
    args = parse_args(PromptBenchArguments, argv)
    result = measure(args)
    report(result)
    write_result(f"prompt{args.name}", resolve_device(args.device), result)


if __name__ == "__main__":
    main()
