"""推测解码：核对几个词元比写一个贵多少，在真实的文字上写起来快多少。

一条命令::

    OMP_NUM_THREADS=1 python benchmarks/bench_draft.py                       # 只测核对的贵贱，约两分钟
    OMP_NUM_THREADS=1 python benchmarks/bench_draft.py --sizes small --texts sft.jsonl,reason_sft.jsonl,toolcall_minimind.jsonl

都用随机权重，直接用引擎，没有网络。时钟见 :func:`common.clock_for`：单线程 CPU 是处理器时间，其余是墙钟。

- 核对：几行各 ``1 + k`` 个位置一次前向，与各写一个的一步之比，轮流测，取各自最短的。
- 写：每个文件抽几段对话，照常算、照常抽，写下的却是文件里最后的那一答；不猜与猜轮流，取比值的中位数。
  量的是“模型若这样写”的快慢，与模型练得好不好无关。
"""

from __future__ import annotations

import functools
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import alternate, clock_for, median, need_file, print_table, write_result
from torch import Tensor, nn

from minimind.arguments import arg, parse_args
from minimind.errors import guard
from minimind.inference.draft_model import DraftModel
from minimind.inference.engine import Engine
from minimind.inference.int8 import quantize_int8
from minimind.inference.sampling import GREEDY
from minimind.inference.shared import SharedModel
from minimind.inference.speculative import PromptLookup
from minimind.model import MiniMindForCausalLM, preset
from minimind.paths import resolve_path
from minimind.runtime.device import DTYPES, resolve_device, synchronize
from minimind.runtime.weights import open_weights
from minimind.tokenizer import encode_chat, load_tokenizer


@dataclass
class DraftBenchArguments:
    """推测解码的贵贱与快慢。"""

    sizes: str = arg("tiny,small,base", "核对的贵贱测哪几个尺寸（随机权重），逗号分隔")
    kinds: str = arg("float32,bfloat16,int8", "哪几种精度")
    rows: str = arg("1,2,4,8", "核对时同时几行；空的不测")
    widths: str = arg("1,2,3,4,6,8,12,16", "各猜几个")
    context: int = arg(200, "各行前面有多少个词元")
    texts: str = arg("", "对话的 jsonl，逗号分隔；给了才测写起来快多少")
    writers: str = arg("1,2", "写的时候同时几路")
    conversations: int = arg(20, "每个文件抽几段对话")
    small: str = arg("", "练好的小权重（.pth）；给了还量由它来猜")
    repeats: int = arg(5, "轮流测几次")
    name: str = arg("", "结果文件名的后缀")


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part.strip()]


def random_model(size: str, kind: str, device: torch.device) -> nn.Module:
    """随机权重，``kind`` 精度。"""
    torch.manual_seed(0)
    return convert(MiniMindForCausalLM(preset(size)), kind, device)


def convert(model: nn.Module, kind: str, device: torch.device) -> nn.Module:
    """换成 ``kind`` 精度。"""
    model = model.eval().requires_grad_(False).to(device)
    return quantize_int8(model) if kind == "int8" else model.to(DTYPES[kind])


@torch.inference_mode()
def verification_cost(model: nn.Module, rows: int, args: DraftBenchArguments, clock: Any) -> dict[str, Any]:
    """核对 ``1 + k`` 个位置与写一个的一步各多少毫秒。"""
    decoder = Engine(model, eos_ids=(), max_slots=rows).decoder
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(3, model.config.vocab_size, (count,), generator=generator).tolist()

    decoder.prefill([ids(args.context) for _ in range(rows)], list(range(rows)))
    starts = [args.context] * rows
    tokens, positions = torch.tensor(ids(rows)).to(decoder.device), torch.tensor(starts).to(decoder.device)
    calls = {"decode": lambda: decoder.decode(tokens, positions, starts)}
    for width in numbers(args.widths):
        spans = [ids(1 + width) for _ in range(rows)]
        calls[str(width)] = lambda spans=spans: decoder.verify(spans, range(rows), starts)
    times = alternate(calls, 4 * args.repeats, lambda: synchronize(decoder.device), clock)
    best = {name: min(one) for name, one in times.items()}
    ratios = {name: round(value / best["decode"], 2) for name, value in best.items() if name != "decode"}
    return {"rows": rows, "decode_ms": round(best["decode"] * 1e3, 2), **ratios}


def answers_of(path: Path, tokenizer: Any, count: int) -> list[tuple[list[int], list[int]]]:
    """抽 ``count`` 段对话：最后一答之前的全部，与那一答。"""
    lines = need_file(path).read_text(encoding="utf-8").splitlines()
    pairs = []
    for line in random.Random(0).sample(lines, len(lines)):
        record = json.loads(line)
        encoding = encode_chat(tokenizer, record["conversations"], tools=record.get("tools"))
        ids, target = encoding.ids, encoding.target
        stop = max((i + 1 for i, wanted in enumerate(target) if wanted), default=0)
        start = stop
        while start and target[start - 1]:
            start -= 1
        if start < stop <= 1024:
            pairs.append((ids[:start], ids[start:stop]))
        if len(pairs) == count:
            break
    return pairs


class Replay:
    """照常算、照常抽，写下的却是给定的答案：随机权重也能在真实的文字上计时。只用于贪心、各行的答案都已知。"""

    def __init__(self, engine: Engine, answers: dict[tuple[int, int], list[int]]):
        self.engine, self.answers = engine, answers
        engine._state.accept = self.wrap(engine._state.accept)
        engine._state.sample = self.wrap(engine._state.sample)

    def wrap(self, method: Any) -> Any:
        def call(logits: Tensor, rows: Any, extra: Any) -> Any:
            drafts = extra if isinstance(extra, list) else [[]] * len(rows)
            wanted = []
            for row, draft in zip(rows, drafts):
                answer, done = (
                    self.answers[row.sequence.request_id, row.sequence.index],
                    len(row.sequence.ids),
                )
                wanted += answer[done : done + 1 + len(draft)]
            places = torch.arange(len(wanted)), torch.tensor(wanted)
            logits[places] = logits.amax(1) + 1  # 在抽样之前抬高要写的那个：抽样的每一步都照走
            return method(logits, rows, extra)

        return call


def writing(
    model: nn.Module, makers: dict[str, Any], pairs: Any, rows: int, args: DraftBenchArguments, clock: Any
) -> dict[str, Any]:
    """同时 ``rows`` 路写完这些答案，不猜与各种猜法各多快；``makers`` 是各种猜的人，头一个是不猜。"""
    steps: dict[str, int] = {}

    def write(name: str) -> None:
        engine = Engine(model, eos_ids=(), max_slots=rows, draft=makers[name]())
        numbers = [engine.add_request(prompt, GREEDY, len(answer)) for prompt, answer in pairs]
        Replay(engine, {(number, 0): answer for number, (_, answer) in zip(numbers, pairs)})
        steps[name], spent[name] = 0, 0.0
        while engine.has_unfinished:
            writing = not engine._admission.queue or len(engine.running) == rows
            before = clock()
            engine.step()
            if writing:  # 读提示的一步两边一样，不算在内
                spent[name] += clock() - before
                steps[name] += 1

    spent: dict[str, float] = {}
    times: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(args.repeats):
        for name in makers:
            write(name)
            times[name].append(spent[name])
    result = {"rows": rows, "tokens": sum(len(answer) for _, answer in pairs), "steps": steps["none"]}
    for name in [*makers][1:]:
        ratios = [a / b for a, b in zip(times["none"], times[name])]
        result |= {f"{name}_steps": steps[name], f"{name}_speedup": round(median(ratios), 3)}
    return result


def measure(args: DraftBenchArguments) -> dict[str, Any]:
    """两项测量。"""
    device = resolve_device("auto")
    clock, cost, speed = clock_for(device), [], []
    tokenizer = load_tokenizer()
    for size in args.sizes.split(","):
        for kind in args.kinds.split(","):
            model = random_model(size, kind, device)
            makers = {"none": lambda: None, "prompt": PromptLookup}
            if args.small:
                small = convert(open_weights(resolve_path(args.small))[0], kind, device)
                makers["small"] = functools.partial(DraftModel, SharedModel(small))
            for rows in numbers(args.rows):
                cost.append({"size": size, "kind": kind, **verification_cost(model, rows, args, clock)})
            for text in filter(None, args.texts.split(",")):
                pairs = answers_of(resolve_path(text), tokenizer, args.conversations)
                for rows in numbers(args.writers):
                    row = writing(model, makers, pairs, rows, args, clock)
                    speed.append({"size": size, "kind": kind, "text": Path(text).name, **row})
    names = ",".join(Path(text).name for text in args.texts.split(","))  # 路径不写进结果
    arguments = {**asdict(args), "texts": names}
    return {"arguments": arguments, "clock": clock.__name__, "verification": cost, "writing": speed}


def report(result: dict[str, Any]) -> None:
    """打印两张表。"""
    for key, title in (("verification", "核对 1 + k 个位置是一步的几倍"), ("writing", "写")):
        if rows := result[key]:
            table = [list(row.values()) for row in rows]
            print_table(title, list(rows[0]), table, f"时钟 {result['clock']}")


@guard
def main(argv: list[str] | None = None) -> None:
    args = parse_args(DraftBenchArguments, argv)
    result = measure(args)
    report(result)
    write_result(f"draft{args.name}", resolve_device("auto"), result)


if __name__ == "__main__":
    main()
