"""训练速度：同一结构、同一数据、同一台机器、同一个进程里与 transformers 的 ``LlamaForCausalLM`` 轮流测。

一条命令::

    python benchmarks/bench_train.py                    # small（26M）
    python benchmarks/bench_train.py --dtype bfloat16   # 两边都用 bf16 autocast

比三件事：

- 整行（没有填充）的原始速度：只看模型自身的开销；
- 真实数据上的有效词元（非填充）每秒：本项目打包成行，对照 (a) 补齐到最大长度——公开项目的做法，
  (b) 补齐到本批最长；长度 340 的预训练与 1024 的微调；
- 截断丢掉的文字：公开做法把超过 ``max_seq_len`` 的部分丢掉，本项目切块、一个字不丢。

一步 = 前向 + 反向 + AdamW，两边同一个优化器、同样的权重、同样的精度。内存在各自的子进程里测，互不影响。
有 CUDA 时另测 base（104M）bf16 + compile 的利用率、对未编译对照的倍数，以及混合专家对同激活参数稠密模型的耗时比。
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import (
    SHARED,
    alternate,
    clock_for,
    median,
    peak_memory,
    print_table,
    reset_peak_memory,
    write_result,
)
from train_peers import (
    Batch,
    Stepper,
    batch_lengths,
    build_ours,
    build_peer,
    encode_documents,
    fill_share,
    full_rows,
    head_of,
    packed_batches,
    padded_batches,
)

from minimind.arguments import arg, parse_args
from minimind.console import say
from minimind.dataset import PretrainDataset, SFTDataset
from minimind.errors import guard
from minimind.model import MiniMindConfig, count_parameters, flops_per_token, preset
from minimind.runtime.device import (
    DTYPES,
    peak_flops,
    resolve_device,
    synchronize,
)
from minimind.tokenizer import encode_plain_batch, load_tokenizer

MODES = ("ours", "pad_max", "pad_longest")
TITLES = {
    "ours": "本项目（打包）",
    "pad_max": "对照 (a) 补齐到最大",
    "pad_longest": "对照 (b) 补齐到本批最长",
}


@dataclass
class TrainBenchArguments:
    """训练速度与内存，对照 transformers 的 LlamaForCausalLM。"""

    preset: str = arg("small", "模型尺寸（tiny、small、base）")
    pretrain_path: str = arg(str(SHARED / "pretrain_zh.jsonl"), "预训练数据")
    sft_path: str = arg(str(SHARED / "sft.jsonl"), "微调数据")
    pretrain_len: int = arg(340, "预训练的行长")
    sft_len: int = arg(1024, "微调的行长")
    batch_size: int = arg(4, "每步行数；越小，补齐到本批最长的对照 (b) 越占便宜")
    repeats: int = arg(3, "每种做法轮流测几次，取中位数")
    batches: int = arg(1, "每次测几步（不同的真实批次）")
    documents: int = arg(4000, "取数据的前多少行；0 表示全部")
    device: str = arg("auto", "设备")
    dtype: str = arg("float32", "计算精度，两边相同", tuple(DTYPES))
    threads: int = arg(0, "CPU 线程数；0 表示按环境")
    cache_dir: str = arg("out/bench_train", "分词缓存与截取的数据放在哪里")
    memory: int = arg(1, "是否测内存（各开一个子进程）", (0, 1))
    cuda_part: int = arg(1, "有 CUDA 时是否测 base 与混合专家", (0, 1))
    child: str = arg("", "内部使用：在子进程里测这一种做法的内存")
    name: str = arg("", "结果文件名的后缀")


def make_batches(
    args: TrainBenchArguments, kind: str, mode: str, tokenizer: Any
) -> tuple[Iterator[Batch], float]:
    """这种做法的批次，与它在全部数据上的非填充占比。"""
    max_len = args.pretrain_len if kind == "pretrain" else args.sft_len
    path = head_of(
        args.pretrain_path if kind == "pretrain" else args.sft_path, args.documents, Path(args.cache_dir)
    )
    if mode == "ours":
        cls = PretrainDataset if kind == "pretrain" else SFTDataset
        dataset = cls(str(path), tokenizer, max_len, split="all", cache_dir=args.cache_dir)
        return packed_batches(dataset, args.batch_size), 1 - dataset.stats["padding_share"]
    documents = encode_documents(path, kind, tokenizer)
    to_longest = mode == "pad_longest"
    fill = fill_share(batch_lengths(documents, max_len, args.batch_size), max_len, to_longest)
    return padded_batches(documents, max_len, args.batch_size, to_longest, tokenizer.pad_token_id), fill


# ---------------------------------------------------------------- 测量


def speeds(
    steps: dict[str, Callable[[], int]], repeats: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """轮流测；每个 ``steps[name]()`` 走几步并返回有效词元数。返回各自的词元/秒（各次的中位数）与极差。"""
    counts: dict[str, list[int]] = {name: [] for name in steps}

    def counted(name: str) -> Callable[[], None]:
        return lambda: counts[name].append(steps[name]())

    times = alternate(
        {name: counted(name) for name in steps}, repeats, lambda: synchronize(device), clock_for(device)
    )
    result = {}
    for name, seconds in times.items():
        rates = [count / second for count, second in zip(counts[name][1:], seconds)]  # 第 0 次是预热
        result[name] = {"tokens_per_second": median(rates), "min": min(rates), "max": max(rates)}
    return result


def measure_full_rows(args: TrainBenchArguments, ours: Stepper, peer: Stepper, length: int) -> dict[str, Any]:
    batch = full_rows(ours.model.config.vocab_size, args.batch_size, length)

    def step(stepper: Stepper) -> Callable[[], int]:
        def run() -> int:
            for _ in range(args.batches):
                stepper(batch)
            return args.batches * batch["num_tokens"]

        return run

    return speeds({"ours": step(ours), "peer": step(peer)}, args.repeats, ours.device)


def measure_real(
    args: TrainBenchArguments, ours: Stepper, peer: Stepper, kind: str, tokenizer: Any
) -> dict[str, Any]:
    """有效词元/秒 = 实测的位置/秒（真实批次，含填充）× 整轮数据上的非填充占比。"""
    fills: dict[str, float] = {}

    def step(mode: str) -> Callable[[], int]:
        stepper = ours if mode == "ours" else peer
        source, fills[mode] = make_batches(args, kind, mode, tokenizer)
        prepared = [next(source) for _ in range((args.repeats + 1) * args.batches)]  # 取数不计时
        position = iter(range(len(prepared)))

        def run() -> int:
            total = 0
            for _ in range(args.batches):
                batch = prepared[next(position)]
                stepper(batch)
                total += batch["input_ids"].numel()
            return total

        return run

    measured = speeds({mode: step(mode) for mode in MODES}, args.repeats, ours.device)
    for mode, rates in measured.items():
        positions = rates["tokens_per_second"]
        rates.update({key: value * fills[mode] for key, value in rates.items()})
        rates.update(fill=fills[mode], positions_per_second=positions)
    return measured


def lost_text(args: TrainBenchArguments, tokenizer: Any) -> dict[str, float]:
    """截断丢掉的字符占比：公开做法（首尾各一个控制词元，正文留 max_len − 2 个）与本项目。"""
    path = head_of(args.pretrain_path, args.documents, Path(args.cache_dir))
    texts = [
        json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()
    ]
    total = kept = 0
    encoded = encode_plain_batch(tokenizer, texts)
    for text, ids in zip(texts, encoded):
        total += len(text)
        room = args.pretrain_len - 2
        kept += len(text) if len(ids) <= room else len(tokenizer.decode(ids[:room]))
    dataset = PretrainDataset(str(path), tokenizer, args.pretrain_len, split="all", cache_dir=args.cache_dir)
    targets = sum(len(ids) + 1 for ids in encoded)  # 首词元没有上文，其余（含结束符）都应当是目标
    return {"peer": 1 - kept / total, "ours": 1 - dataset.stats["targets"] / targets}


def measure_memory(args: TrainBenchArguments) -> dict[str, dict[str, float]]:
    """每种做法在自己的子进程里走三步，取内存最高值（MiB），并减去走之前已占的。"""
    result: dict[str, dict[str, float]] = {}
    for kind in ("pretrain", "sft"):
        for mode in MODES:
            command = [sys.executable, str(Path(__file__).resolve()), "--child", f"{kind}:{mode}"]
            for key, value in asdict(args).items():
                if key not in ("child", "name"):
                    command += [f"--{key}", str(value)]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            result.setdefault(kind, {})[mode] = json.loads(output.splitlines()[-1])
    return result


def memory_child(args: TrainBenchArguments) -> None:
    """子进程：建模型、走三步，打印内存 JSON。"""
    kind, mode = args.child.split(":")
    device, dtype = resolve_device(args.device), DTYPES[args.dtype]
    config, tokenizer = preset(args.preset), load_tokenizer()
    source, _ = make_batches(args, kind, mode, tokenizer)
    prepared = [next(source) for _ in range(3)]
    build = build_ours if mode == "ours" else build_peer
    stepper = Stepper(build(config, device), device, dtype, mode == "ours")
    reset_peak_memory(device)
    before = peak_memory(device)
    for batch in prepared:
        stepper(batch)
    peak = peak_memory(device)
    print(json.dumps({"peak_mib": peak / 2**20, "added_mib": (peak - before) / 2**20}))


# ---------------------------------------------------------------- CUDA


def measure_cuda(args: TrainBenchArguments, device: torch.device) -> dict[str, Any]:
    """base（104M）bf16：compile 的利用率、对未编译对照的倍数；混合专家对同激活参数的稠密模型。

    每个模型测完就释放，因为 104M 加优化器状态同时放几份会挤占显存。
    """
    dtype, length, rows = torch.bfloat16, 1024, 32

    def rate(config: MiniMindConfig, build: Callable[..., Any], compile: bool) -> float:
        model = build(config, device)
        stepper = Stepper(model, device, dtype, build is build_ours, compile)
        batch = full_rows(config.vocab_size, rows, length)

        def run() -> int:
            for _ in range(10):
                stepper(batch)
            return 10 * batch["num_tokens"]

        return speeds({"x": run}, args.repeats, device)["x"]["tokens_per_second"]

    base = preset("base")
    moe = preset("moe")
    active = moe.num_experts_per_tok + moe.n_shared_experts
    dense = preset("moe", use_moe=False, intermediate_size=moe.moe_intermediate_size * active)
    compiled, peer = rate(base, build_ours, True), rate(base, build_peer, False)
    eager = rate(base, build_ours, False)
    moe_rate, dense_rate = rate(moe, build_ours, False), rate(dense, build_ours, False)
    moe_compiled, dense_compiled = rate(moe, build_ours, True), rate(dense, build_ours, True)
    peak = peak_flops(device, dtype)
    return {
        "compiled_tokens_per_second": compiled,
        "eager_tokens_per_second": eager,
        "peer_tokens_per_second": peer,
        "utilisation": compiled * flops_per_token(base, length) / peak if peak else None,
        "speedup_over_peer": compiled / peer,
        "moe_time_over_dense": dense_rate / moe_rate,
        "moe_time_over_dense_compiled": dense_compiled / moe_compiled,
    }


# ---------------------------------------------------------------- 入口


def show(args: TrainBenchArguments, result: dict[str, Any]) -> None:
    rows = []
    for length, name in ((args.pretrain_len, "full_rows_pretrain_len"), (args.sft_len, "full_rows_sft_len")):
        ours, peer = (result[name][k]["tokens_per_second"] for k in ("ours", "peer"))
        rows.append(
            [f"整行 {length}（无填充）", f"{ours:,.0f}", f"{peer:,.0f}", "—", f"{ours / peer:.2f}", "—"]
        )
    for kind, length in (("pretrain", args.pretrain_len), ("sft", args.sft_len)):
        ours, a, b = (result[kind][mode]["tokens_per_second"] for mode in MODES)
        rows.append(
            [
                f"{kind} {length}",
                f"{ours:,.0f}",
                f"{a:,.0f}",
                f"{b:,.0f}",
                f"{ours / a:.2f}",
                f"{ours / b:.2f}",
            ]
        )
    print_table(
        f"有效词元/秒：{args.preset}（{result['parameters'] / 1e6:.1f}M），每步 {args.batch_size} 行，{args.dtype}",
        ["数据", "本项目", "(a) 补到最大", "(b) 补到最长", "比 (a)", "比 (b)"],
        rows,
        f"整行一栏的 (a) 是对照的原始速度。目标：整行 ≥ 0.95，微调比 (a) ≥ 3.2。时钟 {result['clock']}。",
    )
    lost = result["lost_text"]
    print_table(
        f"预训练 {args.pretrain_len} 个词元时丢掉的文字", ["做法", "丢掉"],
        [["公开做法（截断）", f"{lost['peer']:.1%}"], ["本项目（切块）", f"{lost['ours']:.1%}"]],
    )  # fmt: skip
    if "memory" in result:
        print_table(
            "内存最高值（MiB；括号里是训练三步新增的）", ["数据", *(TITLES[mode] for mode in MODES)],
            [
                [kind, *(f"{m[mode]['peak_mib']:,.0f}（+{m[mode]['added_mib']:,.0f}）" for mode in MODES)]
                for kind, m in result["memory"].items()
            ],
        )  # fmt: skip
    if "cuda" in result:
        cuda = result["cuda"]
        print_table(
            "CUDA：base 104M，bf16", ["量", "值"], [[k, f"{v:,.3f}" if v else "—"] for k, v in cuda.items()]
        )


@guard
def main(argv: list[str] | None = None) -> int:
    args = parse_args(TrainBenchArguments, argv, prog="bench_train")
    if args.threads:
        torch.set_num_threads(args.threads)
    args.threads = torch.get_num_threads()
    if args.child:
        memory_child(args)
        return 0
    device, dtype = resolve_device(args.device), DTYPES[args.dtype]
    config, tokenizer = preset(args.preset), load_tokenizer()
    ours = Stepper(build_ours(config, device), device, dtype, True)
    peer = Stepper(build_peer(config, device), device, dtype, False)
    result: dict[str, Any] = {
        "arguments": asdict(args),
        "parameters": count_parameters(ours.model),
        "clock": clock_for(device).__name__,
    }
    for length, name in ((args.pretrain_len, "full_rows_pretrain_len"), (args.sft_len, "full_rows_sft_len")):
        say(f"整行 {length} …")
        result[name] = measure_full_rows(args, ours, peer, length)
    for kind in ("pretrain", "sft"):
        say(f"{kind} 的真实数据 …")
        result[kind] = measure_real(args, ours, peer, kind, tokenizer)
    result["lost_text"] = lost_text(args, tokenizer)
    del ours, peer
    if args.memory:
        say("内存 …")
        result["memory"] = measure_memory(args)
    if device.type == "cuda" and args.cuda_part:
        say("CUDA：base 与混合专家 …")
        result["cuda"] = measure_cuda(args, device)
    show(args, result)
    suffix = f"-{args.name}" if args.name else ""
    say(f"结果写入 {write_result(f'train-{args.dtype}{suffix}', device, result)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
