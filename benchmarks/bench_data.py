"""数据：分词速度、启动时间、内存，对照公开项目的做法。

一条命令::

    python benchmarks/bench_data.py
    python benchmarks/bench_data.py --copies 28      # 36 MB 的文件重复 28 份，约 1 GB

对照是公开项目的写法：启动时把每一行 ``json.loads`` 进列表，``__getitem__`` 里逐条调用分词器，截断并补齐到最大长度。
四个量都在各自的子进程里测（同一个解释器、同样的单线程）：

- 分词 MB/s（单核，两边用同一个分词器）；
- 从进程启动到拿到第一批：冷（没有缓存）与热（已有缓存）；
- 到那时的内存最高值；
- 之后取数的有效词元/秒。
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minimind.arguments import arg, parse_args
from minimind.console import say
from minimind.errors import guard
from minimind.runtime.files import replacing

MODES = ("peer", "cold", "warm")
TITLES = {
    "peer": "公开做法（全部读入，取时分词）",
    "cold": "本项目，第一次（建缓存）",
    "warm": "本项目，第二次",
}


@dataclass
class DataBenchArguments:
    """分词速度、启动时间与内存，对照“全部读入、取时分词”。"""

    data_path: str = arg("", "预训练 jsonl；不给则用 ../shared/data/pretrain_zh.jsonl")
    copies: int = arg(1, "把数据重复几份再测，用来看内存与启动时间怎样随语料变大")
    megabytes: float = arg(8.0, "测单核分词速度用多少 MB")
    max_seq_len: int = arg(340, "行长")
    batch_size: int = arg(32, "每批行数")
    batches: int = arg(50, "启动之后再取多少批，测取数速度")
    workers: int = arg(0, "建缓存的进程数；0 表示全部核")
    repeats: int = arg(3, "单核分词测几次，取中位数")
    work_dir: str = arg("out/bench_data", "缓存与放大的数据放在哪里")
    child: str = arg("", "内部使用：在子进程里跑这一种做法")
    name: str = arg("", "结果文件名的后缀")


# ---------------------------------------------------------------- 子进程：启动到第一批


def peer_dataset(path: str, tokenizer: Any, max_len: int) -> Any:
    """公开项目的数据集写法。"""
    import torch

    class JsonList(torch.utils.data.Dataset):
        def __init__(self) -> None:
            self.samples = []
            with open(path, encoding="utf-8") as file:
                for line in file:
                    self.samples.append(json.loads(line))

        def __len__(self) -> int:
            return len(self.samples)

        def __getitem__(self, index: int) -> tuple[Any, int]:
            text = f"{tokenizer.bos_token}{self.samples[index]['text']}{tokenizer.eos_token}"
            encoded = tokenizer(
                text, max_length=max_len, padding="max_length", truncation=True, return_tensors="pt"
            )
            ids = encoded.input_ids.squeeze(0)
            return ids, int((ids != tokenizer.pad_token_id).sum())

    return JsonList()


def start_up(args: DataBenchArguments) -> dict[str, float]:
    """子进程：从启动到第一批，再取若干批；``--child`` 给出做法。"""
    import torch
    from common import peak_memory

    from minimind.tokenizer import load_tokenizer

    torch.set_num_threads(1)
    tokenizer = load_tokenizer()
    if args.child == "peer":
        dataset = peer_dataset(args.data_path, tokenizer, args.max_seq_len)

        def collate(rows: list) -> tuple[Any, int]:
            return torch.stack([ids for ids, _ in rows]), sum(count for _, count in rows)
    else:
        from minimind.dataset import PretrainDataset, collate_packed

        dataset = PretrainDataset(
            args.data_path, tokenizer, args.max_seq_len, cache_dir=f"{args.work_dir}/cache",
            num_workers=args.workers or None,
        )  # fmt: skip

        def collate(rows: list) -> tuple[Any, int]:
            return collate_packed(rows), sum(row["num_tokens"] for row in rows)

    loader = iter(
        torch.utils.data.DataLoader(dataset, batch_size=args.batch_size, shuffle=True, collate_fn=collate)
    )
    next(loader)
    result = {"start_seconds": time.time() - float(os.environ["BENCH_DATA_START"])}
    result["peak_mib"] = peak_memory(torch.device("cpu")) / 2**20
    start, tokens = time.perf_counter(), 0
    for _, (_, count) in zip(range(args.batches), loader):
        tokens += count
    result["loading_tokens_per_second"] = tokens / (time.perf_counter() - start)
    return result


# ---------------------------------------------------------------- 单核分词


def tokenize_speed(args: DataBenchArguments) -> dict[str, float]:
    """子进程：单核分词 MB/s。``RAYON_NUM_THREADS=1`` 由父进程设好。"""
    from common import alternate, median

    from minimind.tokenizer import encode_plain_batch, load_tokenizer

    tokenizer = load_tokenizer()
    texts, size = [], 0
    with open(args.data_path, encoding="utf-8") as file:
        for line in file:
            texts.append(json.loads(line)["text"])
            size += len(texts[-1].encode())
            if size > args.megabytes * 1e6:
                break

    def ours() -> None:
        for start in range(0, len(texts), 512):
            encode_plain_batch(tokenizer, texts[start : start + 512])

    def peer() -> None:
        for text in texts:
            tokenizer(text, max_length=args.max_seq_len, padding="max_length", truncation=True)

    # 单核：处理器时间，别的进程抢占不算在内
    times = alternate({"ours": ours, "peer": peer}, args.repeats, clock=time.process_time)
    return {name: size / 1e6 / median(seconds) for name, seconds in times.items()}


# ---------------------------------------------------------------- 父进程


def run_child(args: DataBenchArguments, mode: str, **env: str) -> dict[str, float]:
    command = [sys.executable, str(Path(__file__).resolve()), "--child", mode]
    for key, value in asdict(args).items():
        if key not in ("child", "name"):
            command += [f"--{key}", str(value)]
    environment = {**os.environ, "BENCH_DATA_START": str(time.time()), **env}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def enlarged(path: Path, copies: int, folder: Path) -> Path:
    """把文件重复 ``copies`` 份；每份的每条正文前加编号，内容各不相同。"""
    if copies <= 1:
        return path
    target = folder / f"{path.stem}-x{copies}.jsonl"
    if not target.exists():
        with replacing(target) as partial, partial.open("w", encoding="utf-8") as out:
            for copy in range(copies):
                with path.open(encoding="utf-8") as file:
                    for line in file:
                        text = json.loads(line)["text"]
                        out.write(json.dumps({"text": f"{copy}：{text}"}, ensure_ascii=False) + "\n")
    return target


def show(args: DataBenchArguments, result: dict[str, Any]) -> None:
    from common import print_table

    speed = result["tokenize_mb_per_second"]
    print_table(
        "单核分词（同一个分词器）", ["做法", "MB/s", "倍数"],
        [
            ["公开做法：逐条调用，补齐到最大", f"{speed['peer']:.2f}", "1.00"],
            ["本项目：成批", f"{speed['ours']:.2f}", f"{speed['ours'] / speed['peer']:.2f}"],
        ],
    )  # fmt: skip
    peer = result["start"]["peer"]
    rows = []
    for mode in MODES:
        r = result["start"][mode]
        rows.append(
            [
                TITLES[mode],
                f"{r['start_seconds']:.1f}",
                f"{r['start_seconds'] / peer['start_seconds']:.2f}",
                f"{r['peak_mib']:,.0f}",
                f"{r['peak_mib'] / peer['peak_mib']:.2f}",
                f"{r['loading_tokens_per_second']:,.0f}",
                f"{r['loading_tokens_per_second'] / peer['loading_tokens_per_second']:.1f}",
            ]
        )
    print_table(
        f"启动与取数：{result['bytes'] / 1e6:,.0f} MB，行长 {args.max_seq_len}",
        ["做法", "到第一批（秒）", "倍数", "内存最高（MiB）", "倍数", "取数 词元/秒", "倍数"],
        rows,
        "从进程启动算起，含导入 torch 与分词器；内存不含建缓存的子进程。",
    )


@guard
def main(argv: list[str] | None = None) -> int:
    args = parse_args(DataBenchArguments, argv, prog="bench_data")
    if args.child:
        print(json.dumps(tokenize_speed(args) if args.child == "tokenize" else start_up(args)))
        return 0
    import torch
    from common import SHARED, need_file, write_result

    source = need_file(args.data_path or SHARED / "pretrain_zh.jsonl").resolve()
    work = Path(args.work_dir).resolve()
    work.mkdir(parents=True, exist_ok=True)
    args.work_dir = str(work)
    path = enlarged(source, args.copies, work)
    args.data_path = str(path)
    say("单核分词 …")
    single = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    result: dict[str, Any] = {
        "arguments": asdict(args),
        "bytes": path.stat().st_size,
        "tokenize_mb_per_second": run_child(args, "tokenize", **single),
        "start": {},
    }
    shutil.rmtree(work / "cache", ignore_errors=True)  # 冷启动从没有缓存开始
    for mode in MODES:
        say(f"{TITLES[mode]} …")
        result["start"][mode] = run_child(args, mode)
    show(args, result)
    suffix = f"-{args.name}" if args.name else ""
    say(f"结果写入 {write_result(f'data{suffix}', torch.device('cpu'), result)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
