"""一个人慢不慢所有人：24 条短的在写，来一条 7,500 个词元的，短的还剩多少速度，占多少内存。

一条命令::

    OMP_NUM_THREADS=1 python benchmarks/bench_isolation.py     # 26M，随机权重，约一分钟

直接用引擎，没有网络。时钟见 :func:`common.clock_for`：单线程 CPU 是处理器时间，其余是墙钟。

- 一步：短的单独写、旁边有一条长的在写，各取若干步的中位数。
- 间隔：长的提示读着的时候（只续写、又给提示打分），短的两个词元之间最长隔多久。
- 内存：缓存占的字节，与在写的词元要的字节之比。
- 抽样：参数都相同、有 32 种，一步抽样的用时。
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from common import clock_for, median, print_table, seconds_of, write_result
from torch import nn

from minimind.arguments import arg, parse_args
from minimind.errors import guard
from minimind.inference.admission import default_chunk
from minimind.inference.engine import Engine
from minimind.inference.sampling import GREEDY, SamplingParams, sample_rows
from minimind.model import MiniMindForCausalLM, preset
from minimind.runtime.device import resolve_device, synchronize


@dataclass
class IsolationArguments:
    """一条长的对别人的影响。"""

    size: str = arg("small", "模型的尺寸，随机权重")
    writers: int = arg(24, "短的有几条")
    short: int = arg(100, "短的提示平均多少个词元")
    long: int = arg(7500, "长的提示多少个词元")
    steps: int = arg(30, "各测多少步")
    device: str = arg("auto", "设备")
    name: str = arg("", "结果文件名的后缀")


class IsolationBench:
    """各项测量共用的模型与时钟。"""

    def __init__(self, args: IsolationArguments):
        self.args, self.device = args, resolve_device(args.device)
        torch.manual_seed(0)
        self.model: nn.Module = MiniMindForCausalLM(preset(args.size)).eval().to(self.device)
        self.generator = torch.Generator().manual_seed(0)
        self.clock = clock_for(self.device)

    def prompt(self, length: int) -> list[int]:
        return torch.randint(3, self.model.config.vocab_size, (length,), generator=self.generator).tolist()

    def crowd(self) -> Engine:
        """短的都写起来了。"""
        args = self.args
        engine = Engine(
            self.model,
            eos_ids=(),
            max_slots=args.writers + 1,
            prefill_chunk=default_chunk(self.device),
        )
        for index in range(args.writers):
            length = args.short // 2 + index * args.short // args.writers
            engine.add_request(self.prompt(length), GREEDY, 4000)
        while len(engine.running) < args.writers:
            engine.step()
        return engine

    def timed(self, engine: Engine) -> float:
        """一步的毫秒数。"""
        return seconds_of(engine.step, lambda: synchronize(self.device), self.clock) * 1e3

    def memory(self, engine: Engine) -> dict[str, float]:
        """缓存占的与要的，MB，及其比。"""
        config, decoder = self.model.config, engine.decoder
        cache = decoder.cache
        taken = cache.nbytes if hasattr(cache, "nbytes") else cache.store.nbytes
        width = 2 * decoder.kv_heads * decoder.head_dim * config.num_hidden_layers
        tokens = sum(len(one.prompt_ids) + len(one.ids) for one in engine.running)
        needed = tokens * width * torch.empty(0, dtype=decoder.dtype).element_size()
        return {
            "cache_mb": round(taken / 2**20, 1),
            "needed_mb": round(needed / 2**20, 1),
            "ratio": round(taken / needed, 2),
        }

    def run(self, **options: Any) -> dict[str, float]:
        """短的单独写，来一条长的（``options`` 给它），读着，写着。"""
        engine, args = self.crowd(), self.args
        alone = median([self.timed(engine) for _ in range(args.steps)])
        before = self.memory(engine)
        request, gaps = engine.add_request(self.prompt(args.long), GREEDY, 4000, **options), []
        while all(one.request_id != request for one in engine.running):
            gaps.append(self.timed(engine))
        beside = median([self.timed(engine) for _ in range(args.steps)])
        return {
            "alone_ms": round(alone, 1),
            "beside_ms": round(beside, 1),
            "speed_left": round(alone / beside, 2),
            "longest_gap_ms": round(max(gaps), 1),
            "reading_steps": len(gaps),
            "ratio_alone": before["ratio"],
            **self.memory(engine),
        }

    def sampling(self) -> dict[str, float]:
        """一步抽样的毫秒数：32 行，参数一种与 32 种。"""
        logits = torch.randn(32, self.model.config.vocab_size, device=self.device) * 2
        uniform, result = torch.rand(32, device=self.device), {}
        for kinds in (1, 32):
            params = [
                SamplingParams(temperature=0.7 + i % kinds / 100, top_p=0.9 - i % kinds / 100)
                for i in range(32)
            ]
            step = lambda params=params: sample_rows(logits, params, uniform)  # noqa: E731
            times = [seconds_of(step, lambda: synchronize(self.device), self.clock) for _ in range(50)]
            result[f"kinds_{kinds}_ms"] = round(median(times) * 1e3, 2)
        return result


def measure(args: IsolationArguments) -> dict[str, Any]:
    """跑各项测量；打分要引擎有 ``score``。"""
    bench = IsolationBench(args)
    result = {"arguments": asdict(args), "clock": bench.clock.__name__, "generate": bench.run()}
    result["score"] = bench.run(score=0)
    result["sampling"] = bench.sampling()
    return result


def report(result: dict[str, Any]) -> None:
    """打印成表。"""
    rows = [[name, *result[name].values()] for name in ("generate", "score") if name in result]
    columns = ["来一条长的", *result["generate"]]
    print_table("短的还剩多少", columns, rows, f"时钟 {result['clock']}")
    print_table("一步抽样，32 行", list(result["sampling"]), [list(result["sampling"].values())])


@guard
def main(argv: list[str] | None = None) -> None:
    args = parse_args(IsolationArguments, argv)
    result = measure(args)
    report(result)
    write_result(f"isolation{args.name}", resolve_device(args.device), result)


if __name__ == "__main__":
    main()
