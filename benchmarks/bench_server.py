"""服务的速度：32 路流式客户端的总词元/秒，第一个词元要等多久；对照 transformers 批量 32 与 llama.cpp 的服务。

一条命令::

    python benchmarks/bench_server.py                       # 26M，随机权重，4 核 CPU 约四分钟
    python benchmarks/bench_server.py --save_dir out --weight full_sft   # 换成训练好的

同一组权重、同样的提示，在同一次运行里轮流测：

- 本项目：子进程里的 ``minimind serve``，32 个客户端各要一条 ``max_new_tokens`` 的流式回答；
- transformers：本进程里的 ``generate``，一批 32 条，左填充；没有服务的开销，提示也是现成的词元；
- llama.cpp：``python -m llama_cpp.server`` 开我们自己导出的 GGUF（没有装就跳过）。它一次只答一个，别的排队。

第一个词元：``single`` 是一个客户端一问接一问；``loaded`` 是 8 个客户端错开进场，各自一问接一问，长短不一。
随机权重按温度 1 抽样，偶尔会写出结束符，所以都按实际写出的词元算；transformers 关掉结束符，每条写满。
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import median, print_table, write_result
from server_clients import Answer, Service, crowd

from minimind.arguments import arg, parse_args
from minimind.console import say
from minimind.errors import guard
from minimind.inference.loading import load_for_inference
from minimind.model import MiniMindForCausalLM, preset
from minimind.paths import resolve_path
from minimind.runtime.checkpoint import config_dict, save_weights, weights_path
from minimind.runtime.device import resolve_device, synchronize
from minimind.tokenizer import encode_chat, load_tokenizer, tokenizer_fingerprint

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class ServerBenchArguments:
    """服务的速度，对照 transformers 与 llama.cpp 的服务。"""

    size: str = arg("small", "随机权重的尺寸；给了 --save_dir 时不用")
    save_dir: str = arg("", "训练好的权重所在的目录；不给则当场造一份随机的")
    weight: str = arg("full_sft", "权重的名字")
    clients: int = arg(32, "测总速度时几个客户端，也是 transformers 的批量")
    max_new_tokens: int = arg(128, "测总速度时每条回答至多多少个词元")
    prompt_chars: int = arg(40, "每个提示多少个字")
    loaded_clients: int = arg(8, "测第一个词元时几个客户端算忙")
    questions: int = arg(12, "测第一个词元时每个客户端问几次")
    repeats: int = arg(5, "总速度轮流测几次，取中位数")
    temperature: float = arg(1.0, "三家相同的温度，0 是贪心")
    gguf: str = arg("f32,f16", "llama.cpp 用的精度，逗号分隔；空的表示不测")
    dtype: str = arg("auto", "本项目服务的计算精度")
    device: str = arg("auto", "本项目与 transformers 的设备")
    run_dir: str = arg("out/bench_server", "权重、GGUF 与子进程的日志放在哪里")
    name: str = arg("", "结果文件名的后缀")


# ---------------------------------------------------------------- 准备


def weights_folder(args: ServerBenchArguments) -> Path:
    """权重所在的目录；没有给就写一份随机的。"""
    if args.save_dir:
        return resolve_path(args.save_dir)
    folder = resolve_path(args.run_dir) / "weights"
    torch.manual_seed(0)
    model = MiniMindForCausalLM(preset(args.size))
    sidecar = {
        "config": config_dict(model.config),
        "tokenizer_hash": tokenizer_fingerprint(load_tokenizer()),
        "recipe": "full_sft",
    }
    save_weights(model, weights_path(model.config, args.weight, folder), sidecar)
    return folder


def child_environment() -> dict[str, str]:
    """子进程用这一份代码，线程数与本进程相同。"""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())}


def our_service(args: ServerBenchArguments, folder: Path) -> Service:
    command = [sys.executable, "-m", "minimind", "serve", "--port", "{port}", "--save_dir", str(folder)]
    command += ["--weight", args.weight, "--device", args.device, "--dtype", args.dtype]
    command += ["--max_slots", str(args.clients), "--max_length", "1024"]
    return Service(command, "/health", resolve_path(args.run_dir) / "ours.log", child_environment())


def llama_service(args: ServerBenchArguments, folder: Path, kind: str) -> Service:
    """导出成 GGUF，用 llama-cpp-python 自带的服务打开。"""
    path = resolve_path(args.run_dir) / f"{kind}.gguf"
    export = [sys.executable, "-m", "minimind", "export", "gguf", args.weight, str(path)]
    export += ["--save_dir", str(folder), "--type", kind, "--force"]
    subprocess.run(export, check=True, env=child_environment(), stdout=subprocess.DEVNULL)
    threads = str(torch.get_num_threads())
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(path), "--port", "{port}"]
    command += ["--n_ctx", "1024", "--n_threads", threads, "--n_threads_batch", threads]
    # 默认来了新请求就打断正在写的；要它写完
    command += ["--interrupt_requests", "false", "--verbose", "false"]
    return Service(command, "/v1/models", resolve_path(args.run_dir) / f"{kind}.log", child_environment())


def llama_reason() -> str | None:
    """不能测 llama.cpp 的服务的缘故。"""
    for name in ("llama_cpp", "sse_starlette", "starlette_context", "pydantic_settings"):
        if importlib.util.find_spec(name) is None:
            return f"没有装 {name}；pip install 'llama-cpp-python[server]'"
    return None


class Questions:
    """一个接一个不重样的问题：长度相同，内容各异，谁也沾不到前一个的提示缓存。"""

    def __init__(self, args: ServerBenchArguments):
        self.args, self.rng = args, random.Random(0)
        pool = "云川渡口来了几条船装着盐茶和羊毛毯从雪顶镇到海边要走多少天路上会经过哪些地方请说明白"
        self.pool = list(pool)

    def text(self) -> str:
        return "".join(self.rng.choices(self.pool, k=self.args.prompt_chars))

    def body(self, tokens: int) -> dict[str, Any]:
        options = {"temperature": self.args.temperature, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
        messages = [{"role": "user", "content": self.text()}]
        return {"messages": messages, "max_tokens": tokens, "seed": self.rng.randrange(2**31), **options}


# ---------------------------------------------------------------- 测


def throughput(args: ServerBenchArguments, service: Service, questions: Questions) -> dict[str, float]:
    """一轮：每个客户端一条，总词元/秒；另记服务进程每个词元的处理器毫秒。"""
    bodies = [[questions.body(args.max_new_tokens)] for _ in range(args.clients)]
    cpu = service.cpu_seconds()
    answers = asyncio.run(crowd(service.port, bodies, 0.0))
    cpu = service.cpu_seconds() - cpu
    tokens = sum(answer.tokens for answer in answers)
    wall = max(answer.end for answer in answers) - min(answer.start for answer in answers)
    return {"tokens_per_second": tokens / wall, "cpu_ms_per_token": 1000 * cpu / tokens, "tokens": tokens}


class Generate:
    """transformers 的 ``generate``，同一组权重。"""

    def __init__(self, args: ServerBenchArguments, folder: Path):
        from transformers import LlamaForCausalLM

        from minimind.export.layouts import hf_config

        loaded = load_for_inference(save_dir=str(folder), weight=args.weight, device="cpu", dtype="float32")
        config = LlamaForCausalLM.config_class(**hf_config(loaded.model.config, torch.float32))
        self.device = resolve_device(args.device)
        peer = LlamaForCausalLM(config).eval()
        peer.load_state_dict(loaded.model.state_dict())
        dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        self.model, self.tokenizer, self.args = peer.to(self.device, dtype), loaded.tokenizer, args
        self.model.generation_config.eos_token_id, self.model.generation_config.pad_token_id = None, 0

    def __call__(self, questions: Questions) -> dict[str, float]:
        args = self.args
        turns = [[{"role": "user", "content": questions.text()}] for _ in range(args.clients)]
        rows = [encode_chat(self.tokenizer, turn, add_generation_prompt=True).ids for turn in turns]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=self.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=self.device)
        options: dict[str, Any] = {"do_sample": False}
        if args.temperature:
            options = {"do_sample": True, "temperature": args.temperature, "top_k": 0, "top_p": 1.0}
        synchronize(self.device)
        start, cpu = time.perf_counter(), time.process_time()
        out = self.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=args.max_new_tokens, **options
        )
        synchronize(self.device)
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
        tokens = (out.shape[1] - width) * len(rows)
        return {"tokens_per_second": tokens / wall, "cpu_ms_per_token": 1000 * cpu / tokens, "tokens": tokens}


def percentile(values: list[float], share: float) -> float:
    """线性内插的分位数。"""
    return float(torch.tensor(values, dtype=torch.float64).quantile(share))


def waits(answers: list[Answer]) -> dict[str, float]:
    """第一个词元的等待，毫秒。"""
    values = [1000 * answer.first_token for answer in answers]
    return {"p50": percentile(values, 0.5), "p95": percentile(values, 0.95), "count": len(values)}


def first_token(args: ServerBenchArguments, service: Service, questions: Questions) -> dict[str, Any]:
    """闲时与忙时各测一遍；闲时的每次只写几个词元，问的次数与忙时一样多。"""
    count = args.loaded_clients * args.questions
    alone = asyncio.run(crowd(service.port, [[questions.body(4) for _ in range(count)]], 0.0))
    # 长短不一，客户端们才不会一直同进同退
    lengths = [args.max_new_tokens // 4, args.max_new_tokens // 2, args.max_new_tokens * 3 // 4]
    bodies = [
        [questions.body(questions.rng.choice(lengths)) for _ in range(args.questions)]
        for _ in range(args.loaded_clients)
    ]
    loaded = asyncio.run(crowd(service.port, bodies, 0.05))
    result = {"single": waits(alone), "loaded": waits(loaded)}
    result["p95_ratio"] = result["loaded"]["p95"] / result["single"]["p95"]
    return result


def measure(args: ServerBenchArguments) -> dict[str, Any]:
    folder = weights_folder(args)
    questions = Questions(args)
    reason = llama_reason()
    kinds = [kind for kind in args.gguf.split(",") if kind]
    if kinds and reason:
        say(f"llama.cpp 的服务没有测：{reason}。")
        kinds = []
    with ExitStack() as stack:
        ours = stack.enter_context(our_service(args, folder))
        peers = {
            f"llama.cpp {kind}": stack.enter_context(llama_service(args, folder, kind)) for kind in kinds
        }
        calls = {"ours": lambda: throughput(args, ours, questions)}
        generate = Generate(args, folder)
        calls["transformers"] = lambda: generate(questions)
        for name, service in peers.items():
            calls[name] = lambda service=service: throughput(args, service, questions)
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
        for repeat in range(-1, args.repeats):  # 先各预热一次；轮流测，机器忙闲的起伏由各家平摊
            for name, call in calls.items():
                say(f"{name}：{'预热' if repeat < 0 else f'第 {repeat + 1} 轮'}……")
                one = call()
                if repeat >= 0:
                    rounds[name].append(one)
        say("第一个词元……")
        first = first_token(args, ours, questions)
    return {"throughput": {name: summary(runs) for name, runs in rounds.items()}, "first_token_ms": first}


def summary(runs: list[dict[str, float]]) -> dict[str, float]:
    rates = [run["tokens_per_second"] for run in runs]
    return {
        "tokens_per_second": median(rates),
        "min": min(rates),
        "max": max(rates),
        "cpu_ms_per_token": median([run["cpu_ms_per_token"] for run in runs]),
        "tokens": median([run["tokens"] for run in runs]),
    }


def report(args: ServerBenchArguments, result: dict[str, Any]) -> None:
    ours = result["throughput"]["ours"]
    rows = []
    for name, one in result["throughput"].items():
        title = {"ours": "本项目的服务", "transformers": f"transformers 批量 {args.clients}"}.get(name, name)
        ratio = ours["tokens_per_second"] / one["tokens_per_second"]
        cpu = one["cpu_ms_per_token"]
        rows.append((title, f"{one['tokens_per_second']:,.0f}", f"{ratio:.2f}×", f"{cpu:.3f}"))
    columns = ("", "词元/秒", "本项目是它的", "处理器毫秒/词元")
    print_table(f"{args.clients} 路流式", columns, rows)
    first = result["first_token_ms"]
    rows = [
        (title, f"{one['p50']:.1f}", f"{one['p95']:.1f}", one["count"])
        for title, one in (
            ("1 个客户端", first["single"]),
            (f"{args.loaded_clients} 个客户端", first["loaded"]),
        )
    ]
    caption = f"p95 之比 {first['p95_ratio']:.2f}"
    print_table("第一个词元，毫秒", ("", "p50", "p95", "次数"), rows, caption)


@guard
def main(argv: list[str] | None = None) -> int:
    """命令行入口。"""
    args = parse_args(ServerBenchArguments, argv)
    # 默认的 SIGTERM 当场就死，with 来不及收尾，开着的服务会留下来
    signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))
    result = measure(args)
    report(args, result)
    name = f"server-{args.name}" if args.name else "server"
    path = write_result(name, resolve_device(args.device), {"arguments": asdict(args), **result})
    say(f"结果写在 {path}。")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
