"""card.py 的子进程：一部分一个，边测边写；以及不必自己写循环的几部分。

每部分是一个函数 ``名字(card)``，测到一样就 ``card.note(...)``：随时可能被杀掉，写下的才算数。做不了就抛
:class:`LeftOut`，说出缺什么。
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import subprocess
import sys
import time
import traceback
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minimind.runtime.files import write_text

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[1]
# 各部分自己会说缺什么；这里记下来，事后看得出为什么没做
OPTIONAL = (
    "rich", "numpy", "safetensors", "tokenizers", "filelock", "jinja2", "pytest", "hypothesis", "psutil",
    "datasets", "trl", "fastapi", "uvicorn", "xgrammar",
)  # fmt: skip


class LeftOut(Exception):
    """这一部分做不了；消息是为什么。"""


class Card:
    """一部分要知道的：在什么设备上、多大的尺寸、写到哪里、还有多少时间。

    Args:
        notes: 结果写到这个文件。
        arguments: card.py 的参数，加上 ``seconds``：这一部分至多多少秒。
    """

    def __init__(self, notes: Path, arguments: dict[str, Any]):
        self.notes, self.quick = notes, bool(arguments["quick"])
        self.data_dir, self.folder = Path(arguments["data_dir"]), Path(arguments["run_dir"]).resolve()
        self.device_name, self.seconds = arguments["device"], arguments["seconds"]
        self.start, self.found = time.monotonic(), {}

    @cached_property
    def device(self) -> torch.device:
        from minimind.runtime.device import prepare_device, resolve_device

        device = resolve_device(self.device_name)
        prepare_device(device)
        return device

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def half(self) -> torch.dtype:
        import torch

        return torch.bfloat16

    def pick(self, full: Any, quick: Any) -> Any:
        """真的尺寸，或 ``--quick 1`` 的。"""
        return quick if self.quick else full

    def size(self, name: str, **overrides: Any) -> Any:
        """名为 ``name`` 的配置；``--quick 1`` 时是同类的一个极小的。"""
        from minimind.model import preset

        tiny = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
        return preset(name, **{**(tiny if self.quick else {}), **overrides})

    @property
    def seconds_left(self) -> float:
        return self.seconds - (time.monotonic() - self.start)

    def note(self, **found: Any) -> None:
        """记下测到的，立刻写进文件。"""
        self.found |= found
        write_text(self.notes, json.dumps(self.found, ensure_ascii=False))

    def timed(self, call: Any, repeats: int = 5, warmup: int = 2) -> float:
        """``call`` 一次的秒数：预热之后连着做几次，只同步一次，取平均。"""
        from minimind.runtime.device import synchronize

        for _ in range(self.pick(warmup, 1)):
            call()
        count = self.pick(repeats, 1)
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(count):
            call()
        synchronize(self.device)
        return (time.perf_counter() - start) / count

    def text(self, name: str, lines: int = 0) -> Path:
        """``--data_dir`` 里的文件（的前 ``lines`` 行）；没有就用内置的微世界里同类的。"""
        from train_peers import head_of

        path = self.data_dir / name
        if not path.is_file():
            from minimind.microworld import ensure_microworld

            stand_in = {"pretrain_zh": "pretrain", "pretrain_zh.heldout": "pretrain_heldout"}
            stem = path.name.removesuffix(".jsonl")
            stem = stand_in.get(stem, stem.replace(".heldout", "_heldout"))
            path = ensure_microworld() / f"{stem}.jsonl"
        return head_of(
            str(path), self.pick(lines, min(lines or 400, 400)), self.folder / "text" / path.parent.name
        )


def need(*names: str) -> None:
    """可选的包；缺了这一部分就不做。

    Raises:
        LeftOut: 缺哪个。
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise LeftOut(f"没有装 {'、'.join(missing)}，没有做")


# ---------------------------------------------------------------- 各部分


def environment(card: Card) -> None:
    """卡的名字与各样的版本；最先做，别的部分缺什么也看得出。"""
    missing = [name for name in OPTIONAL if find_spec(name) is None]
    card.note(python=platform.python_version(), missing=missing, slug="unknown")
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    card.note(commit=commit.stdout.strip() or None)
    import torch

    card.note(torch=torch.__version__, cuda=torch.version.cuda)
    from common import environment as described
    from common import slug

    where = described(card.device)
    name = f"cpu-{where['hardware']}" if card.device.type == "cpu" else where["hardware"]
    card.note(**where, slug=slug(name))
    if card.on_cuda:
        card.note(memory_gib=torch.cuda.get_device_properties(card.device).total_memory / 2**30)


def matmul(card: Card) -> None:
    """bf16 方阵 8192 相乘；旁边是标称。"""
    import torch

    from minimind.runtime.device import peak_flops

    n = card.pick(8192, 256)
    x, y = (torch.randn(n, n, device=card.device, dtype=card.half) for _ in range(2))
    card.note(tflops=2 * n**3 / card.timed(lambda: x @ y, 20) / 1e12)
    if (peak := peak_flops(card.device, card.half)) is not None:
        card.note(datasheet_tflops=peak / 1e12)


def cuda_tests(card: Card) -> None:
    """``pytest -m cuda``：只收有这个记号的文件，省下收集的时间。没有卡时它们各自跳过。"""
    need("pytest", "hypothesis")
    files = [
        path
        for path in (ROOT / "tests").rglob("test_*.py")
        if "mark.cuda" in path.read_text(encoding="utf-8")
    ]
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-p", "no:cacheprovider", "--tb=short", "-rfE"]
    if find_spec("xdist") is not None:
        command += ["-p", "no:xdist"]
    done = subprocess.run([*command, *map(str, sorted(files))], cwd=ROOT, capture_output=True, text=True)
    print(done.stdout, done.stderr, sep="\n")
    last = (done.stdout.strip().splitlines() or [""])[-1]
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (\w+)", last)}
    if done.returncode not in (0, 1) or not counts:
        raise RuntimeError(f"pytest 退出码 {done.returncode}：{last}")
    failures = re.findall(r"^(?:FAILED|ERROR) (.+)", done.stdout, re.MULTILINE)
    card.note(
        passed=counts.get("passed", 0),
        failed=counts.get("failed", 0) + counts.get("error", 0) + counts.get("errors", 0),
        skipped=counts.get("skipped", 0),
        failures=failures[:20],
    )


def selftest(card: Card) -> None:
    """``minimind selftest``；``--quick 1`` 时只给它几秒，剩下的它自己记为未测。"""
    from minimind.selftest.rows import FAILED, PASSED

    out = card.folder / "selftest.json"
    # 它自己的时间从导入之后算起；录制与编译的一项可以长过剩下的
    minutes = card.pick(max(card.seconds_left - 25, 5), 4) / 60
    command = [sys.executable, "-m", "minimind", "selftest", "--device", card.device_name]
    done = subprocess.run([*command, "--minutes", f"{minutes:.3f}", "--out", str(out)], cwd=ROOT)
    report = json.loads(out.read_text(encoding="utf-8"))
    statuses = [row["status"] for row in report["rows"]]
    card.note(exit_code=done.returncode, verdict=report["verdict"])
    card.note(failed=statuses.count(FAILED), passed=statuses.count(PASSED), of=len(statuses))
    card.note(wrong=[row for row in report["rows"] if row["status"] == FAILED][:10])


def grpo_step(card: Card) -> None:
    """GRPO 一整步的秒数，真的走配方；装了 TRL 就与它的 GRPOTrainer 比。"""
    import bench_rl
    from common import median

    from minimind.microworld import ensure_microworld

    data = ensure_microworld() / "rl.jsonl"
    args = bench_rl.RLBenchArguments(
        prompts=card.pick(16, 2),
        num_generations=card.pick(16, 2),
        max_new_tokens=card.pick(128, 4),
        grpo_steps=card.pick(4, 1),
        dtype="float32" if card.device.type == "cpu" else "bfloat16",
        run_dir=str(card.folder / "grpo"),
    )
    size = card.pick("small", "tiny")
    ours = median(bench_rl.our_steps(args, size, card.device, data))
    card.note(ours_seconds=ours, rows=args.prompts * args.num_generations)
    missing = [name for name in ("trl", "datasets") if find_spec(name) is None]
    if missing:
        card.note(status=f"做完（没有装 {'、'.join(missing)}，没有与 TRL 比）")
        return
    peer = median(bench_rl.trl_steps(args, size, card.device, data))
    card.note(trl_seconds=peer, ratio=peer / ours)


def server(card: Card) -> None:
    """64 路流式客户端的总词元/秒，经过真的服务。"""
    need("fastapi", "uvicorn", "psutil")
    import bench_server

    args = bench_server.ServerBenchArguments(
        size=card.pick("small", "tiny"),
        clients=card.pick(64, 2),
        max_new_tokens=card.pick(256, 4),
        device=card.device_name,
        run_dir=str(card.folder / "server"),
    )
    folder, questions = bench_server.weights_folder(args), bench_server.Questions(args)
    service = bench_server.our_service(args, folder)
    with service:
        bench_server.throughput(args, service, questions)  # 预热：录制、编译都在这里
        for _ in range(card.pick(3, 1)):
            one = bench_server.throughput(args, service, questions)
            best = max(one["tokens_per_second"], card.found.get("tokens_per_second", 0.0))
            card.note(tokens_per_second=best, cpu_ms_per_token=one["cpu_ms_per_token"])


# ---------------------------------------------------------------- 入口


def main(argv: list[str]) -> int:
    """``card_parts.py 模块 部分 结果文件 参数``：做一部分；出了错写明白，退出码 1。"""
    module, name, notes, arguments = argv
    card = Card(Path(notes), json.loads(arguments))
    os.chdir(ROOT)
    home = sys.modules[__name__] if module == Path(__file__).stem else importlib.import_module(module)
    try:
        getattr(home, name)(card)
    except Exception as error:  # 一部分坏了别的照做，所以什么错都记下来
        if type(error).__name__ == "LeftOut":  # 这个文件既是入口又是模块，类有两个
            card.note(status=str(error))
            return 0
        traceback.print_exc()
        missing = isinstance(error, ModuleNotFoundError)
        reason = f"没有装 {error.name}，没有做" if missing else f"出错：{type(error).__name__}: {error}"[:400]
        card.note(status=reason)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
