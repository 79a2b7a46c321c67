"""卡上的训练：光步子的速度与占峰值的份额，训练循环比它慢多少，自动编译，一步的时间去向。"""

from __future__ import annotations

import gc
import itertools
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from card_parts import ROOT, Card
from common import peak_memory, reset_peak_memory
from train_peers import build_ours, packed_batches

from minimind.dataset import PretrainDataset, collate_packed
from minimind.dataset.collate import to_device
from minimind.model import MiniMindConfig, flops_per_token
from minimind.runtime.device import autocast_context, peak_flops
from minimind.tokenizer import load_tokenizer
from minimind.trainer.compiling import CompiledBlocks
from minimind.trainer.optim import build_optimizer
from minimind.trainer.recipe import language_model_loss
from minimind.trainer.train_args import TrainArguments

ROWS, LENGTH = 64, 512  # 一步 32,768 个位置
LARGE_STEP = 131_072  # 优化器的份额按这么多词元一步算
PATIENCE = 20  # 发了 SIGTERM 等这么多秒


def random_rows(rows: int, length: int, vocab: int, seed: int) -> dict[str, Any]:
    """打包的随机行，每篇 60 到 340 个词元：与真实语料的长短相仿，批批不同。"""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(rows):
        lengths, left = [], length
        while left:
            lengths.append(min(left, int(torch.randint(60, 340, (1,), generator=generator))))
            left -= lengths[-1]
        ids = torch.randint(3, vocab, (length,), generator=generator)
        labels = ids.clone()
        labels[torch.tensor([0, *lengths[:-1]]).cumsum(0)] = -100
        positions = torch.cat([torch.arange(n) for n in lengths])
        made.append(
            dict(input_ids=ids, labels=labels, position_ids=positions, seg_lens=lengths, num_tokens=length)
        )
    return collate_packed(made)


class BareStep:
    """光步子：前向、反向、优化器，批已经在卡上；损失与优化器就是训练用的。

    Args:
        compiled: 逐层编译，与 ``--use_compile 1`` 同一个包装（不核对）。
    """

    def __init__(self, card: Card, config: MiniMindConfig, compiled: bool):
        self.card, self.config = card, config
        self.model = build_ours(config, card.device)
        self.wrapped: Any = self.model
        if compiled:
            torch._dynamo.reset()
            # 走通时不必真的生成代码：图的捕获与自动微分是同一条路
            self.wrapped = CompiledBlocks(self.model, backend=card.pick("inductor", "aot_eager"))
            self.wrapped.state = "on"
        self.optimizer = build_optimizer(self.model, TrainArguments(hidden_size=config.hidden_size))

    def forward_backward(self, batch: dict[str, Any]) -> torch.Tensor:
        with autocast_context(self.card.device, self.card.half):
            loss, _ = language_model_loss(self.wrapped, batch)
        (loss / batch["input_ids"].numel()).backward()
        return loss.detach()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def graphs_made() -> int:
    """至今编译过多少个图。"""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def measure_step(card: Card, config: MiniMindConfig, compiled: bool, peak: float | None) -> dict[str, float]:
    """一种做法的全部数字；编译的走完头一步之后批批段数不同，数又编译了几次。"""
    rows, length = card.pick((ROWS, LENGTH), (2, 128))
    batches = [
        to_device(random_rows(rows, length, config.vocab_size, seed), card.device) for seed in range(4)
    ]
    gc.collect()  # 上一个模型的
    reset_peak_memory(card.device)
    step, source = BareStep(card, config, compiled), itertools.cycle(batches)

    def whole() -> None:
        step.forward_backward(next(source))
        step.update()

    start = time.perf_counter()
    whole()
    first, before = time.perf_counter() - start, graphs_made()
    if compiled and getattr(step.wrapped, "state", "on") != "on":
        raise RuntimeError("编译失败，见这一部分的输出")
    seconds = card.timed(whole, 10, 3)

    def gradients_only() -> None:
        step.forward_backward(next(source))
        step.optimizer.zero_grad(set_to_none=True)

    forward_backward = card.timed(gradients_only, 10, 1)
    step.forward_backward(next(source))
    optimizer = card.timed(step.optimizer.step, 10, 1)  # 梯度还在
    tokens = rows * length
    context = (
        sum(float(b["cu_seqlens"].diff().double().square().sum()) for b in batches) / tokens / len(batches)
    )
    flops = flops_per_token(config, context) * tokens
    found = {
        "tokens_per_second": tokens / seconds,
        "step_ms": 1000 * seconds,
        "forward_backward_ms": 1000 * forward_backward,
        "optimizer_ms": 1000 * optimizer,
        "first_step_seconds": first,
        "peak_gib": peak_memory(card.device) / 2**30,
    }
    if peak:
        found["share_of_peak"] = flops / seconds / peak
    if compiled:
        found["recompilations"] = graphs_made() - before
    return found


def train_size(card: Card, name: str) -> None:
    config, peak = card.size(name), peak_flops(card.device, card.half)
    tokens = ROWS * LENGTH
    for mode in ("eager", "compiled"):
        found = measure_step(card, config, mode == "compiled", peak)
        larger = found["forward_backward_ms"] * LARGE_STEP / tokens + found["optimizer_ms"]
        card.note(**{mode: found}, optimizer_share_128k=found["optimizer_ms"] / larger)
        if name == "moe":
            width = config.moe_intermediate_size * (config.num_experts_per_tok + config.n_shared_experts)
            dense = card.size(name, use_moe=False, intermediate_size=width)
            plain = measure_step(card, dense, mode == "compiled", peak)
            ratio = found["step_ms"] / plain["step_ms"]
            card.note(**{f"{mode}_dense": plain, f"{mode}_time_over_dense": ratio, "time_over_dense": ratio})


def train_small(card: Card) -> None:
    train_size(card, "small")


def train_base(card: Card) -> None:
    train_size(card, "base")


def train_moe(card: Card) -> None:
    """混合专家，与同激活参数的稠密模型：一样宽，前馈宽度是激活的各专家之和。"""
    train_size(card, "moe")


# ---------------------------------------------------------------- 真的训练循环


class TrainerRun:
    """``python -m minimind train pretrain`` 的一个子进程：等它记下几行日志，发 SIGTERM，看多久退出。"""

    def __init__(self, card: Card, name: str, compile: str):
        self.folder = card.folder / name
        self.log = self.folder / "out" / "logs" / "pretrain.jsonl"
        self.output = self.folder / "said.txt"
        for old in (*self.folder.glob("out/logs/*.jsonl"), self.output):
            old.unlink(missing_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        size = card.pick(["--preset", "small"], ["--hidden_size", "64", "--num_hidden_layers", "2"])
        rows, length = card.pick((ROWS, LENGTH), (2, 128))
        self.interval = card.pick(20, 2)
        command = [sys.executable, str(ROOT / "trainer" / "train_pretrain.py"), *size]
        command += ["--data_path", str(card.text("pretrain_zh.jsonl", 20_000)), "--device", card.device_name]
        command += ["--batch_size", str(rows), "--max_seq_len", str(length), "--use_compile", compile]
        command += ["--epochs", "100000", "--max_steps", "50000", "--log_interval", str(self.interval)]
        command += ["--eval_interval", "0", "--save_interval", "0", "--dtype", "bfloat16", "--val_ratio", "0"]
        command += [
            "--save_dir",
            str(self.folder / "out"),
            "--checkpoint_dir",
            str(self.folder / "checkpoints"),
        ]
        self.stream = self.output.open("w")
        self.process = subprocess.Popen(command, stdout=self.stream, stderr=subprocess.STDOUT, cwd=ROOT)

    def lines(self) -> list[dict[str, Any]]:
        """至今的日志；最后一行可能还没写完。"""
        logs = list((self.folder / "out" / "logs").glob("*.jsonl"))
        text = logs[0].read_text(encoding="utf-8") if logs else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def said(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace")

    def wait(self, ready: Callable[[], bool], seconds: float) -> bool:
        """等到 ``ready()``，至多 ``seconds`` 秒；它先退出了就把它说的话报出来。"""
        deadline = time.monotonic() + seconds
        while not ready():
            if self.process.poll() is not None:
                raise RuntimeError(f"训练自己退出了（{self.process.returncode}）：{self.said()[-300:]}")
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def stop(self) -> float:
        """发 SIGTERM，返回到它退出的秒数；等不到就杀掉，返回等了多久。"""
        start = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
        return time.monotonic() - start

    def step_ms(self) -> float:
        """一步多少毫秒：第二行到最后一行，头一段含预热。"""
        lines = [line for line in self.lines() if "loss" in line]
        if len(lines) < 3:
            raise RuntimeError(f"训练只记下 {len(lines)} 行，算不出步时：{self.said()[-300:]}")
        first, last = lines[1], lines[-1]
        return 1000 * (last["time"] - first["time"]) / (last["step"] - first["step"])


def real_step_ms(card: Card, compiled: bool) -> float:
    """与训练循环同样的真实数据上的光步子，批已在卡上。"""
    rows, length = card.pick((ROWS, LENGTH), (2, 128))
    path = card.text("pretrain_zh.jsonl", 20_000)
    dataset = PretrainDataset(str(path), load_tokenizer(), length, split="all")
    made: Iterator[dict[str, Any]] = packed_batches(dataset, rows)
    batches = [to_device(next(made), card.device) for _ in range(8)]
    step, source = BareStep(card, card.size("small"), compiled), itertools.cycle(batches)

    def whole() -> None:
        step.forward_backward(next(source))
        step.update()

    return 1000 * card.timed(whole, 40, 8)


def loop(card: Card) -> None:
    """训练循环比光步子慢多少，都不编译：取数、记账、读回损失、裁剪都在这个差里。"""
    bare = real_step_ms(card, False)
    card.note(bare_step_ms=bare)
    run = TrainerRun(card, "loop", "0")
    run.wait(lambda: len(run.lines()) >= card.pick(9, 3), card.seconds_left - 8)
    card.note(stop_seconds=run.stop())
    card.note(loop_step_ms=run.step_ms(), lost_share=1 - bare / run.step_ms())
    card.note(tokens_per_second=run.lines()[-1]["tokens_per_s"])


def auto(card: Card) -> None:
    """``--use_compile auto`` 的真训练：用上没有，学没学会，收到信号多久退出（编译途中与训练途中各一次）。"""
    early = TrainerRun(card, "auto_early", "auto")
    seen = early.wait(lambda: "正在编译" in early.said() or bool(early.lines()), card.seconds_left / 3)
    time.sleep(card.pick(1.0, 0.0))
    if "正在编译" in early.said() and "编译与核对用时" not in early.said():
        card.note(compile_stop_seconds=early.stop())
    else:
        card.note(early="没有赶上编译的途中" if seen else "没有等到")
        early.stop()
    run = TrainerRun(card, "auto", "auto")
    run.wait(lambda: len(run.lines()) >= card.pick(9, 3), card.seconds_left - 10)
    card.note(stop_seconds=run.stop())
    losses = [line["loss"] for line in run.lines() if "loss" in line]
    said = re.findall(r"编译与核对用时.*|编译后的.*|编译失败.*|重新编译失败.*", run.said())
    card.note(compiled=int("编译与核对用时" in run.said()), said=said[:3])
    if len(losses) > 1:  # 只来得及记一行的看不出学没学会
        card.note(learned=losses[0] - losses[-1])
    card.note(loop_step_ms=run.step_ms(), tokens_per_second=run.lines()[-1]["tokens_per_s"])
