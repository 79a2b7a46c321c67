"""写出微世界的全部文件，或找到已经写好的一份。"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from minimind.arguments import Arguments, arg, parse_args
from minimind.console import say
from minimind.errors import UserError
from minimind.paths import resolve_path
from minimind.runtime.files import file_lock, replacing

from .core import HELDOUT, TRAIN
from .stages import Corpus
from .tasks import build_tasks

# 语料的写法一变就加一，旧缓存随之作废
FORMAT_VERSION = 8
DEFAULT_DIR = "dataset/microworld"


def make_microworld(out_dir: str | Path, scale: float = 1.0, seed: int = 42) -> dict[str, Path]:
    """把微世界写成每个阶段的 jsonl。

    Args:
        out_dir: 目标文件夹，没有就建立；同名文件会被覆盖。
        scale: 训练部分的规模，1.0 约 150 万预训练词元；留出部分不随它变。
        seed: 随机种子，同一种子两次写出的文件逐字节相同。

    Returns:
        ``{文件名去掉 .jsonl: 路径}``，另有 ``meta``。

    Raises:
        UserError: 规模不是正数，或文件夹写不进去。
    """
    if not scale > 0:
        raise UserError(f"规模 {scale} 不是正数", where="--scale", expected="大于 0 的数，例如 1.0")
    out_dir = resolve_path(out_dir)
    with _writing(out_dir):
        return _write_all(out_dir, scale, seed)


@contextmanager
def _writing(out_dir: Path) -> Iterator[None]:
    """同一个文件夹同时只有一个进程写；写不进去时一句话。"""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with file_lock(out_dir / ".lock", lambda: say(f"另一个进程正在写微世界语料 {out_dir}，等它完成")):
            yield
    except OSError as error:
        raise UserError(
            f"写不进微世界语料（{error.strerror}）", where=str(out_dir), fix="换一个可写且有空间的文件夹"
        ) from error


def _write_all(out_dir: Path, scale: float, seed: int) -> dict[str, Path]:
    corpus = Corpus(build_tasks(seed), scale, seed)
    paths: dict[str, Path] = {}
    counts: dict[str, dict[str, int]] = {}
    stages = {
        "pretrain": corpus.pretrain,
        "sft": corpus.sft,
        "lora_identity": corpus.lora_identity,
        "dpo": corpus.dpo,
        "reason": corpus.reason,
        "reason_direct": lambda side: corpus.reason(side, direct=True),
        "rl": corpus.rl,
        "agent": corpus.agent,
        "agent_sft": corpus.agent_sft,
    }
    jobs = [(name, make, TRAIN) for name, make in stages.items()]
    jobs += [(f"{name}_heldout", make, HELDOUT) for name, make in stages.items()]
    for name, make, side in jobs:
        paths[name], counts[name] = _write_jsonl(out_dir / f"{name}.jsonl", make(side))
    paths["eval"], counts["eval"] = _write_jsonl(out_dir / "eval.jsonl", corpus.evaluation())
    meta = {"format_version": FORMAT_VERSION, "scale": scale, "seed": seed, "files": counts}
    paths["meta"] = out_dir / "meta.json"
    _replace_text(paths["meta"], json.dumps(meta, ensure_ascii=False, indent=1) + "\n")
    return paths


def _write_jsonl(path: Path, records: list[dict]) -> tuple[Path, dict[str, int]]:
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    _replace_text(path, text)
    return path, {"lines": len(records), "bytes": len(text.encode())}


def _replace_text(path: Path, text: str) -> None:
    """写临时文件再改名，中断不会留下半个文件。"""
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode("utf-8"))


def ensure_microworld(scale: float = 1.0, seed: int = 42, out_dir: str | Path | None = None) -> Path:
    """返回写好的微世界文件夹；没有、不全或参数不同就（重）写一份。

    默认规模与种子放在 ``dataset/microworld``，其余放在带参数的兄弟文件夹，互不覆盖。
    """
    if out_dir is None:
        default = scale == 1.0 and seed == 42
        out_dir = DEFAULT_DIR if default else f"{DEFAULT_DIR}_x{scale:g}_s{seed}"
    folder = resolve_path(out_dir)
    if not _is_current(folder, scale, seed):
        # 几个进程（torchrun 的各进程、并行的几次训练）可能同时来：只有一个写，其余等它写完直接用。
        # 各写各的虽然内容相同，却会改掉别人正在分词的文件的时间，那边就当作“分词途中被改动”
        with _writing(folder):
            if not _is_current(folder, scale, seed):
                _write_all(folder, scale, seed)
    return folder


def _is_current(folder: Path, scale: float, seed: int) -> bool:
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        sizes = {name: (folder / f"{name}.jsonl").stat().st_size for name in meta["files"]}
    except (OSError, ValueError, KeyError):
        return False
    same = (meta.get("format_version"), meta.get("scale"), meta.get("seed")) == (FORMAT_VERSION, scale, seed)
    return same and all(sizes[name] == info["bytes"] for name, info in meta["files"].items())


@dataclass
class MakeArguments(Arguments):
    """写出微世界“云川”的全部语料与题目（几秒钟，不联网）"""

    out_dir: str = arg(DEFAULT_DIR, "目标文件夹", metavar="DIR", text="path")
    scale: float = arg(1.0, "训练部分的规模，1.0 约 150 万预训练词元", above=0, high=100)
    seed: int = arg(42, "随机种子；同一种子写出的文件逐字节相同", low=0, high=2**63 - 1)


def main_make(argv: list[str] | None = None) -> int:
    """``minimind data make-microworld DIR``：写出微世界语料。"""
    options = parse_args(MakeArguments, argv, prog="minimind data make-microworld")
    paths = make_microworld(options.out_dir, options.scale, options.seed)
    meta = json.loads(paths["meta"].read_text(encoding="utf-8"))
    for name, info in meta["files"].items():
        say(f"{name}.jsonl：{info['lines']:,} 行，{info['bytes'] / 1e6:.2f} MB")
    say(f"微世界写在 {paths['meta'].parent}")
    return 0
