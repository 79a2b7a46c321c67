"""测：数据有多少词元、分词多快；内存空着多少；训练一步多久、起步多久。

速度不另写一套来测：就拿数据的开头一小截，在子进程里跑几步真的 ``minimind pretrain``，读它的日志。
"""

from __future__ import annotations

import bz2
import itertools
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minimind.dataset.building import INLINE_BYTES, MAX_WORKERS
from minimind.dataset.cache import cached_tokens
from minimind.dataset.jsonl import DataError
from minimind.dataset.sources import raw_lines, shell_of
from minimind.dataset.spec import Part, parse_spec
from minimind.errors import UserError
from minimind.runtime.device import module_of
from minimind.runtime.fair_share import CGROUP_ROOT, available_cpus
from minimind.trainer.footprint import GB

SAMPLE_BYTES = 1 << 20  # 数据的开头这么多：分词半秒，够测几步
# 大文件由几个进程分词：每多一个多出这么多的速度，另加起子进程的几秒
WORKER_GAIN, POOL_SECONDS = 0.8, 5.0
WARMUP = 2  # 头几步含预热，不作数


@dataclass(frozen=True)
class DataSize:
    """一份数据：共多少词元，分词要几秒（已有缓存为 0），每个词元几个字节，bz2 压缩后每字节几比特。"""

    spec: str
    tokens: float
    tokenize_seconds: float
    bytes_per_token: float
    squeezed_bits: float
    sample: Path


@dataclass(frozen=True)
class Taken:
    """一个文件取了多少：共几字节，取了几字节、几行。"""

    path: Path
    total: int
    written: int
    lines: int


def take_from_files(parts: list[Part], target: Path) -> list[Taken]:
    """把各文件开头的几行写进 ``target``（共约 1 MB）；压缩与列式的按解开后的算。"""
    files = [path for part in parts for path in part.files]
    share = SAMPLE_BYTES // len(files) + 1
    found = []
    with target.open("wb") as out:
        for path in files:
            plain, taken, count, lines = shell_of(path) == "plain", 0, 0, raw_lines(path)
            for raw in lines:
                taken += out.write(raw + b"\n")
                count += 1
                if taken >= share:
                    break
            # 没有压缩的看大小就知道；压缩的得解开才知道有多少
            total = path.stat().st_size if plain else taken + sum(len(raw) + 1 for raw in lines)
            found.append(Taken(path, total, taken, count))
    return found


def take_sample(spec: str, target: Path, flag: str) -> tuple[int, float]:
    """把各文件开头的几行写进 ``target``（共约 1 MB），返回 ``(全部文件的字节数, 样本的字节数)``；压缩与列式的按解开后的算。"""
    found = take_from_files(parse_spec(spec, flag), target)
    return sum(one.total for one in found), sum(one.written for one in found)


def mixed_share(parts: list[Part], found: list[Taken]) -> float:
    """按权重配时，一轮的字节数是各文件首尾相接的几倍；没有写权重的是 1。

    一轮的条数是各组条数之和，第 k 组占 ``weight_k``（:mod:`minimind.dataset.mixture`）；各组一条多长不同，字节数就变了。
    """
    if parts[0].weight is None:
        return 1.0
    rows, length, rest = [], [], iter(found)
    for part in parts:
        own = [next(rest) for _ in part.files]
        length.append(sum(one.written for one in own) / max(sum(one.lines for one in own), 1))
        rows.append(sum(one.total for one in own) / max(length[-1], 1))
    mixed = sum(float(part.weight or 0) * mean for part, mean in zip(parts, length)) * sum(rows)
    return mixed / max(sum(one.total for one in found), 1)


def blame(error: UserError, sample: Path, spec: str, found: list[Taken]) -> UserError:
    """样本里的错误换成使用者的文件与行号：样本是临时的，用完就没了。"""
    if isinstance(error, DataError) and error.file == str(sample) and error.line:
        line = error.line
        for one in found:
            if line <= one.lines:
                return error.at(one.path, line)
            line -= one.lines
    what, where = (text and text.replace(str(sample), spec) for text in (error.what, error.where))
    return UserError(what or "", where=where, expected=error.expected, fix=error.fix)


def size_up(cls: type, spec: str, folder: Path, tokenizer: Any, flag: str, length: int) -> DataSize:
    """一份数据有多大：开头一截真的分一次词，别的按字节数推；分过词的直接数。

    Args:
        cls: 数据集类，如 :class:`minimind.dataset.PretrainDataset`；坏行照它的规矩报错。
        folder: 样本与它的缓存放在哪里。
    """
    sample = folder / f"{cls.kind}.jsonl"
    parts = parse_spec(spec, flag)
    found = take_from_files(parts, sample)
    total, written = sum(one.total for one in found), sum(one.written for one in found)
    start = time.perf_counter()
    try:
        dataset = cls(sample, tokenizer, length, cache_dir=folder / "cache", num_workers=0)
    except UserError as error:
        raise blame(error, sample, spec, found) from error
    seconds = time.perf_counter() - start
    ids = np.asarray(dataset.cache.ids)
    text = tokenizer.decode(ids, skip_special_tokens=True).encode()
    rate, workers = written / max(seconds, 1e-3), min(available_cpus(), MAX_WORKERS)
    tokenize = total / rate
    if total > INLINE_BYTES and workers > 1:
        tokenize = POOL_SECONDS + tokenize / (1 + WORKER_GAIN * (workers - 1))
    tokens = len(ids) * total / written
    cached = [cached_tokens(one.path, cls.kind, tokenizer) for one in found]
    if all(count is not None for count in cached):
        tokens, tokenize = float(sum(cached)), 0.0  # type: ignore[arg-type]
    tokens *= mixed_share(parts, found)
    # 几十个字节的，压缩的头尾比正文还大：至多 8，就是压不动
    bits = min(8 * len(bz2.compress(text)) / max(len(text), 1), 8.0)
    return DataSize(spec, tokens, tokenize, len(text) / len(ids), bits, sample)


def free_memory(device: torch.device) -> float | None:
    """现在空着的内存或显存，GB；问不到为 None。"""
    if device.type in ("cuda", "npu"):
        return module_of(device).mem_get_info(device)[0] / GB
    if device.type == "mps":
        return torch.mps.recommended_max_memory() / GB
    rooms = [_meminfo(), _cgroup_room()]
    known = [room for room in rooms if room is not None]
    return min(known) / GB if known else None


def _meminfo() -> float | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    except (OSError, ValueError, IndexError):
        return None
    try:  # macOS：只问得到一共多少，按七成算
        return 0.7 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _cgroup_room(root: Path = CGROUP_ROOT) -> float | None:
    """容器还给多少；没有限制为 None。"""
    try:
        limit, used = (int((root / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # 没有这一层，或写着 max
        return None
    return float(max(limit - used, 0))


def trial(flags: list[str], sample: Path, folder: Path, steps: int) -> tuple[float, float]:
    """在子进程里真的训练 ``steps`` 步，返回 ``(一步几秒, 其余一共几秒)``。

    Args:
        flags: 计划里 pretrain 的参数，批、精度、设备都在内。

    Raises:
        UserError: 没有跑成；附它说的最后一句。
    """
    from minimind.report.logs import read_log

    out = folder / "trial"
    words = [*flags, "--data_path", str(sample), "--max_steps", str(steps), "--epochs", "100000"]
    words += ["--val_ratio", "0", "--sample_prompts", "0", "--log_interval", "1"]
    words += ["--save_dir", str(out), "--checkpoint_dir", str(out / "checkpoints")]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "minimind", "pretrain", *words],
        env={**os.environ, "MINIMIND_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    wall = time.perf_counter() - start
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise UserError(
            f"试跑几步没有跑成（退出码 {done.returncode}）：{said[-1] if said else '它什么也没说'}",
            where="minimind pretrain " + " ".join(words),
            fix="单独运行这一条看看，或用 --preset tiny、--memory_gb 换小一点的",
        )
    times = [record["time"] for record in read_log(next((out / "logs").glob("*.jsonl"))) if "loss" in record]
    seconds = [later - earlier for earlier, later in itertools.pairwise(times)][WARMUP - 1 :]
    return sum(seconds) / len(seconds), wall - times[-1]


def sampling_seconds(model: torch.nn.Module, tokenizer: Any, device: torch.device) -> float:
    """验证时答一次三个内置的提示要几秒；没训练过的模型不会停，写满为止，是上限。"""
    from minimind.trainer import samples

    prompts = samples.read_prompts(3, plain=True)
    sampler = samples.Sampler(prompts, tokenizer, True, model.config.max_position_embeddings)
    start = time.perf_counter()
    sampler.take(model, device, {})
    return time.perf_counter() - start
