"""机器忙时还剩多少速度：旁边有一个忙碌的进程，训练与解码各保住闲时的几成。

一条命令（约二十分钟；先把别的程序都停下）::

    python benchmarks/bench_fair_share.py

同一次运行里轮流测三家，各在闲时与忙时：我们（按 :mod:`minimind.runtime.fair_share` 增减线程）、线程数用
``OMP_NUM_THREADS`` 定死的我们、transformers 的同一个模型。每家每次是一个新进程，用默认的线程数，前 ``--settle`` 秒不算：
那是预热与看账的时间。忙碌的进程是一个普通优先级的空循环。目标：忙时至少是闲时的 45 %，闲时比定死线程数至多慢 3 %。
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass

import torch
from common import print_table, write_result

from minimind.arguments import arg, parse_args
from minimind.errors import guard
from minimind.export.twin import transformers_twin
from minimind.inference.engine import Engine
from minimind.inference.sampling import SamplingParams
from minimind.model import MiniMindForCausalLM, preset
from minimind.runtime.fair_share import fair_share
from minimind.trainer.optim import build_optimizer
from minimind.trainer.train_args import TrainArguments

SIDES = {"ours": "我们", "fixed": "我们，线程数定死", "transformers": "transformers"}
WORKS = {"train": "训练", "decode": "解码"}
ROWS, LENGTH, PROMPT, ANSWER = 16, 256, 64, 192


@dataclass
class FairShareArguments:
    """机器忙时还剩多少速度。"""

    size: str = arg("tiny", "模型的尺寸，随机权重")
    seconds: float = arg(12.0, "每次测多少秒")
    settle: float = arg(8.0, "开头多少秒不算")
    others: int = arg(1, "旁边有几个忙碌的进程")
    repeats: int = arg(3, "每项测几次，取中位数")
    work: str = arg("", "（内部）子进程做什么")
    side: str = arg("", "（内部）子进程是哪一家")


@contextmanager
def busy_process():
    """一个普通优先级、一刻不停的进程。"""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def trainer(args: FairShareArguments):
    """一次训练步的函数，返回词元数。"""
    model = MiniMindForCausalLM(preset(args.size)).train()
    if args.side == "transformers":
        model = transformers_twin(model).train()
    optimizer = (
        torch.optim.AdamW(model.parameters())
        if args.side == "transformers"
        else build_optimizer(model, TrainArguments(), newton_schulz_dtype="float32")
    )
    ids = torch.randint(3, model.config.vocab_size, (ROWS, LENGTH))

    def step() -> int:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        fair_share().lap()  # 训练循环每步之后做的事；线程数定死时什么也不做
        return ids.numel()

    return step


def decoder(args: FairShareArguments):
    """写完一批回答的函数，返回词元数。"""
    model = MiniMindForCausalLM(preset(args.size)).eval()
    prompts = torch.randint(3, model.config.vocab_size, (8, PROMPT))
    if args.side == "transformers":
        twin = transformers_twin(model).eval()
        options = {"max_new_tokens": ANSWER, "min_new_tokens": ANSWER, "do_sample": False, "pad_token_id": 0}
        options["attention_mask"] = torch.ones_like(prompts)
        return lambda: twin.generate(prompts, **options)[:, PROMPT:].numel()
    engine = Engine(model, eos_ids=set(), max_slots=8)

    def answers() -> int:
        for row in prompts.tolist():
            engine.add_request(row, SamplingParams(temperature=0.0), ANSWER)
        written = 0
        while engine.has_unfinished:
            written += sum(len(sequence.ids) for sequence in engine.step())
        return written

    return answers


def work(args: FairShareArguments) -> None:
    """子进程：干活，打印每秒词元数。"""
    torch.manual_seed(0)
    call = {"train": trainer, "decode": decoder}[args.work](args)
    begin = time.monotonic()
    while time.monotonic() - begin < args.settle:
        call()
    begin, tokens = time.monotonic(), 0
    while time.monotonic() - begin < args.seconds:
        tokens += call()
    print(tokens / (time.monotonic() - begin))


def measure(args: FairShareArguments, kind: str, side: str, others: int) -> float:
    """起一个子进程测一次，返回每秒词元数。"""
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    if side == "fixed":
        environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    flags = {"size": args.size, "seconds": args.seconds, "settle": args.settle, "work": kind, "side": side}
    command = [sys.executable, __file__, *(f"--{key}={value}" for key, value in flags.items())]
    with ExitStack() as stack:
        for _ in range(others):
            stack.enter_context(busy_process())
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1])


@guard
def main() -> None:
    args = parse_args(FairShareArguments)
    if args.work:
        work(args)
        return
    speeds: dict[tuple[str, str, int], list[float]] = {}
    for _ in range(args.repeats):
        for kind in WORKS:
            for others in (0, args.others):
                for side in SIDES:
                    speeds.setdefault((kind, side, others), []).append(measure(args, kind, side, others))
    speed = {key: statistics.median(values) for key, values in speeds.items()}
    rows, result = [], {}
    for kind, title in WORKS.items():
        for side, name in SIDES.items():
            quiet, loaded = speed[kind, side, 0], speed[kind, side, args.others]
            runs = {name: speeds[kind, side, n] for name, n in (("quiet", 0), ("loaded", args.others))}
            result[f"{kind}/{side}"] = {"runs": runs, "kept": loaded / quiet}
            against = quiet / speed[kind, "fixed", 0]
            rows.append(
                [
                    f"{title} {name}",
                    f"{quiet:,.0f}",
                    f"{loaded:,.0f}",
                    f"{loaded / quiet:.0%}",
                    f"{against:.1%}",
                ]
            )
    columns = ["", "闲 词元/秒", f"旁边 {args.others} 个忙", "保住", "闲时比定死"]
    print_table(f"{args.size}，{torch.get_num_threads()} 线程", columns, rows)
    options = {k: v for k, v in asdict(args).items() if k not in ("work", "side")}
    print(write_result("fair-share", torch.device("cpu"), {"arguments": options, "speeds": result}))


if __name__ == "__main__":
    sys.exit(main())
