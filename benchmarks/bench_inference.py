"""推理的速度：单路、一批 32 条、读提示，对照 transformers 的 ``generate`` 与 llama.cpp。

一条命令::

    python benchmarks/bench_inference.py --threads 4            # 26M，随机权重，约一分钟
    python benchmarks/bench_inference.py --threads 4 --weight out/full_sft_512.pth --text heldout.jsonl

各家用同一组权重、同样的提示，全部贪心、每条写满，在同一个进程里轮流测：

- 本项目：引擎，``--ours`` 里的各种精度；结束符不起作用，不用前缀库；
- transformers：我们导出的 Hugging Face 目录，``generate``，fp32（显卡上与 ``--ours`` 的第一种相同）；
- llama.cpp：我们导出的 GGUF，经 llama-cpp-python（没有装就跳过）；它的接口一次只写一条，所以只有单路与读提示。

单路与成批的时间都含读那 ``prompt_length`` 个词元的提示。测的同时核对贪心的文字：fp32 的各家都要与 transformers 相同，
只许在两个候选的 logit 相差不到 ``TIE`` 处分开；降了精度的只记下有多少词元相同。给了 ``--text`` 还记每字节比特数差多少。
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import alternate, clock_for, median, print_table, write_result
from inference_peers import Peer, hugging_face, llama_cpp, open_weights, our_peer, rebuild

from minimind.arguments import arg, parse_args
from minimind.console import say
from minimind.errors import UserError, guard
from minimind.export.gguf import export_gguf
from minimind.export.hf import export_hf
from minimind.export.source import Source
from minimind.inference.int8 import int8_available, quantize_int8
from minimind.model import count_parameters
from minimind.runtime.device import DTYPES, resolve_device, synchronize

TIE = 1e-3  # fp32 的两种算法末位不同，两个候选差得比这还小就算并列
TEXT_ROWS = 64  # 比每字节比特数时用多少行（每行 512 个词元）


@dataclass
class InferenceBenchArguments:
    """推理的速度，对照 transformers 与 llama.cpp。"""

    preset: str = arg("small", "随机权重的尺寸；给了 --weight 时不用")
    weight: str = arg("", "训练好的 .pth；不给则按种子随机")
    ours: str = arg(
        "float32,bfloat16,int8", "本项目测哪几种：float32、bfloat16、int8，逗号分隔；第一种是基准"
    )
    gguf: str = arg("f32,f16", "llama.cpp 测哪几种：f32、f16、q8_0，逗号分隔；空的表示不测")
    prompt_length: int = arg(32, "单路与成批时提示多长")
    max_new_tokens: int = arg(128, "每条写多少个词元")
    batch: int = arg(32, "成批时几条")
    long_prompt: int = arg(512, "测读提示时多长")
    repeats: int = arg(5, "轮流测几次，取中位数")
    threads: int = arg(0, "CPU 线程数；0 表示按环境")
    text: str = arg("", "留出的 jsonl；给了就比各种精度的每字节比特数（要给 --weight）")
    device: str = arg("auto", "设备；llama.cpp 只在 CPU 上测")
    name: str = arg("", "结果文件名的后缀")


# ---------------------------------------------------------------- 测


def missing_packages() -> list[str]:
    """测 llama.cpp 还缺哪些包。"""
    return [name for name in ("llama_cpp", "gguf") if importlib.util.find_spec(name) is None]


def all_peers(
    args: InferenceBenchArguments, source: Source, folder: Path, device: torch.device
) -> tuple[dict[str, Peer], Any]:
    """各家，与核对文字用的 transformers 模型。"""
    ours = [kind for kind in args.ours.split(",") if kind]
    if "int8" in ours and (device.type != "cpu" or not int8_available()):
        say("int8 没有测：要 CPU 上精确的 int8 矩阵乘。")
        ours.remove("int8")
    longest = max(args.long_prompt, args.prompt_length) + args.max_new_tokens
    peers = {f"ours {kind}": our_peer(source, kind, device, args.batch, longest) for kind in ours}
    dtype = torch.float32 if device.type == "cpu" else DTYPES[ours[0]]
    export_hf(source, folder / "hf", torch.float32)
    peers["transformers"], reference = hugging_face(folder / "hf", dtype, device)
    kinds = [kind for kind in args.gguf.split(",") if kind]
    missing = missing_packages()
    if kinds and (missing or device.type != "cpu"):
        reason = (
            f"没有装 {'、'.join(missing)}（pip install llama-cpp-python gguf）"
            if missing
            else "它只在 CPU 上测"
        )
        say(f"llama.cpp 没有测：{reason}。")
        kinds = []
    context = max(args.long_prompt, args.prompt_length + args.max_new_tokens) + 8
    for kind in kinds:
        path = folder / f"{kind}.gguf"
        export_gguf(source, path, kind)
        peers[f"llama.cpp {kind}"] = llama_cpp(path, kind, torch.get_num_threads(), context)
    return peers, reference


def prompts_of(count: int, length: int, vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(3, vocab_size, (count, length), generator=generator).tolist()


def measure_rates(
    args: InferenceBenchArguments, peers: dict[str, Peer], vocab_size: int, device: torch.device
) -> tuple[dict[str, Any], dict[str, list[list[int]]]]:
    """三项速度，与单路写出的文字。"""
    work = {
        "single": (prompts_of(1, args.prompt_length, vocab_size), args.max_new_tokens),
        "batch": (prompts_of(args.batch, args.prompt_length, vocab_size), args.max_new_tokens),
        "prompt": (prompts_of(1, args.long_prompt, vocab_size), 1),
    }
    rates: dict[str, Any] = {}
    texts: dict[str, list[list[int]]] = {}
    for kind, (prompts, count) in work.items():
        chosen = {name: peer for name, peer in peers.items() if peer.parallel or len(prompts) == 1}
        written: dict[str, list[list[int]]] = {}

        def call(name: str, prompts=prompts, count=count, written=written) -> Callable[[], None]:
            return lambda: written.__setitem__(name, peers[name].write(prompts, count))

        say(f"{kind}……")
        calls = {name: call(name) for name in chosen}
        times = alternate(calls, args.repeats, lambda: synchronize(device), clock_for(device))
        # 读提示按读了多少个算，其余按写了多少个算
        tokens = len(prompts[0]) if kind == "prompt" else len(prompts) * count
        rates[kind] = {
            name: summary([tokens / second for second in seconds]) for name, seconds in times.items()
        }
        base = rates[kind]["transformers"]["tokens_per_second"]
        for one in rates[kind].values():
            one["over_transformers"] = one["tokens_per_second"] / base
        for name, rows in written.items():
            if any(len(row) != count for row in rows):
                raise RuntimeError(f"{name} 没有写满 {count} 个词元")
            texts.setdefault(name, []).extend(rows if kind != "prompt" else [])
    return rates, texts


def summary(rates: list[float]) -> dict[str, float]:
    return {"tokens_per_second": median(rates), "min": min(rates), "max": max(rates)}


@torch.inference_mode()
def compare_texts(
    args: InferenceBenchArguments, peers: dict[str, Peer], texts: dict[str, list[list[int]]], reference: Any
) -> dict[str, Any]:
    """各家的贪心文字与 transformers 的比：相同的条数，开头相同的词元占比，fp32 的各家分开处的 logit 差。

    Raises:
        RuntimeError: 有一家 fp32 的在并不并列的地方选了别的词。
    """
    vocab_size = reference.config.vocab_size
    prompts = prompts_of(1, args.prompt_length, vocab_size) + prompts_of(
        args.batch, args.prompt_length, vocab_size
    )
    result: dict[str, Any] = {}
    for name, rows in texts.items():
        if name == "transformers":
            continue
        same, common, gap = 0, 0, 0.0
        for prompt, mine, theirs in zip(prompts, rows, texts["transformers"]):
            length = next((i for i, (a, b) in enumerate(zip(mine, theirs)) if a != b), len(theirs))
            same, common = same + (length == len(theirs)), common + length
            if length < len(theirs) and peers[name].exact:
                ids = torch.tensor([prompt + theirs[:length]], device=reference.device)
                logits = reference(input_ids=ids).logits[0, -1].float()
                gap = max(gap, abs(float(logits[mine[length]] - logits[theirs[length]])))
        if peers[name].exact and reference.dtype == torch.float32 and gap > TIE:
            raise RuntimeError(f"{name} 的贪心文字与 transformers 不同，分开处的 logit 差 {gap:.4f}")
        total = sum(map(len, rows))
        result[name] = {"same": same, "rows": len(rows), "same_prefix": common / total}
        if peers[name].exact:
            result[name]["largest_tie"] = gap
    return result


def measure_quality(args: InferenceBenchArguments, source: Source) -> dict[str, float]:
    """各种精度的每字节比特数；bf16 的残差也是 bf16，与引擎相同。"""
    from minimind.evaluate.bpb import bits_per_byte

    exact = rebuild(source)
    models = {"float32": exact, "bfloat16": copy.deepcopy(exact).bfloat16()}
    if int8_available():
        models["int8"] = quantize_int8(copy.deepcopy(exact))
    return {
        name: bits_per_byte(model, source.tokenizer, args.text, max_rows=TEXT_ROWS)
        for name, model in models.items()
    }


# ---------------------------------------------------------------- 入口


def report(args: InferenceBenchArguments, result: dict[str, Any]) -> None:
    rows = []
    for name in result["rates"]["single"]:
        row = [name]
        for kind in ("single", "batch", "prompt"):
            one = result["rates"][kind].get(name)
            row.append(f"{one['tokens_per_second']:,.0f}（{one['over_transformers']:.2f}×）" if one else "—")
        agreement = result["agreement"].get(name)
        row.append(f"{agreement['same']}/{agreement['rows']}" if agreement else "—")
        rows.append(row)
    columns = ("", "单路", f"一批 {args.batch} 条", f"读 {args.long_prompt} 个词元的提示", "文字相同")
    caption = (
        f"词元/秒（是 transformers 的几倍），{torch.get_num_threads()} 个线程，{result['clock']} 的中位数。"
    )
    print_table(f"推理：{result['parameters'] / 1e6:.1f}M，贪心", columns, rows, caption)
    if "bits_per_byte" in result:
        quality = [(name, f"{value:.4f}") for name, value in result["bits_per_byte"].items()]
        print_table("每字节比特数", ("", "比特/字节"), quality)


def measure(args: InferenceBenchArguments) -> dict[str, Any]:
    device = resolve_device(args.device)
    if args.text and not args.weight:
        raise UserError("随机权重的每字节比特数没有意义", where="--text", fix="再给 --weight")
    with tempfile.TemporaryDirectory() as folder:
        source = open_weights(args.weight, args.preset, Path(folder))
        peers, reference = all_peers(args, source, Path(folder), device)
        rates, texts = measure_rates(args, peers, source.config.vocab_size, device)
        result: dict[str, Any] = {
            "arguments": asdict(args),
            "clock": clock_for(device).__name__,
            "parameters": count_parameters(reference),
            "rates": rates,
            "agreement": compare_texts(args, peers, texts, reference),
        }
        if args.text:
            result["bits_per_byte"] = measure_quality(args, source)
    return result


@guard
def main(argv: list[str] | None = None) -> int:
    """命令行入口。"""
    args = parse_args(InferenceBenchArguments, argv, prog="bench_inference")
    if args.threads:
        torch.set_num_threads(args.threads)
    result = measure(args)
    report(args, result)
    name = f"inference-{args.name}" if args.name else "inference"
    say(f"结果写在 {write_result(name, resolve_device(args.device), result)}。")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
