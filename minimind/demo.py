"""演示：从零走完全程，几分钟后得到一个会答题的小模型和一份成绩单。

造数据 → 预训练 → 考填空 → 监督微调 → 考对话 → 写报告 → 对话。每一步都是正式命令用的同一段代码，
只是尺寸小、数据是内置的微世界。产物在 ``out/demo``，不碰使用者自己的权重。
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from minimind.arguments import arg, parse_args
from minimind.console import console, format_duration, say
from minimind.errors import guard
from minimind.paths import resolve_path

# 一步 2,048 个位置：同样的词元数，步子小而多学得更好；微世界的文档与对话都不到 256 个词元
ROW_LENGTH, ROWS = 256, 8
# 各项评测花的时间折合多少个训练词元（实测：每道题生成的词元少，但逐词生成没有训练那样的大矩阵）
EVAL_TOKENS = {"cloze": 60_000, "chat": 300_000}


@dataclass
class DemoArguments:
    """从零走完全程：造数据、预训练、微调、评测、出报告、对话。"""

    out_dir: str = arg("out/demo", "数据、权重与日志的目录")
    report_dir: str = arg("out/report", "报告的目录")
    preset: str = arg("tiny", "模型尺寸")
    scale: float = arg(1.0, "微世界训练语料的规模")
    pretrain_epochs: int = arg(1, "预训练轮数")
    sft_epochs: int = arg(1, "微调轮数")
    pretrain_lr: float | None = arg(None, "预训练的最高学习率；不给则按模型宽度")
    sft_lr: float | None = arg(None, "微调的最高学习率；不给则按模型宽度")
    max_steps: int = arg(0, "每个阶段至多多少步；0 表示由轮数决定")
    items_per_task: int = arg(0, "每个任务至多考几题；0 表示全部")
    batch_size: int = arg(ROWS, f"每步多少行，每行 {ROW_LENGTH} 个词元")
    fast: int = arg(0, "只看流程通不通：百分之一的数据、每阶段 4 小步、每个任务 1 题", (0, 1))
    chat: int = arg(1, "结束后打开对话（仅当在终端里运行）", (0, 1))
    device: str = arg("auto", "设备：auto、cpu、cuda:0、npu:0、mps")
    seed: int = arg(42, "随机种子")


@dataclass
class Clock:
    """全程的预计用时：各步先给估计，走完一步就用实际用时换掉，并按快慢修正剩下的。"""

    estimates: dict[str, float]
    start: float = field(default_factory=time.perf_counter)
    actual: dict[str, float] = field(default_factory=dict)

    def left(self) -> float:
        """还要多少秒。"""
        done = sum(self.estimates[name] for name in self.actual)
        ratio = sum(self.actual.values()) / done if done else 1.0
        return ratio * sum(seconds for name, seconds in self.estimates.items() if name not in self.actual)

    def begin(self, name: str, title: str) -> None:
        number = list(self.estimates).index(name) + 1
        say(f"\n[{number}/{len(self.estimates)}] {title}（全程剩余约 {format_duration(self.left())}）")
        self._mark = time.perf_counter()

    def end(self, name: str) -> None:
        self.actual[name] = time.perf_counter() - self._mark

    def elapsed(self) -> float:
        return time.perf_counter() - self.start


def stage_arguments(args: DemoArguments, world: Path, dtype: str):
    """两个阶段的训练参数；与命令行 ``minimind pretrain``、``minimind sft`` 是同一个 dataclass。"""
    from minimind.recipes.full_sft import SFTArguments
    from minimind.recipes.pretrain import PretrainArguments

    common = {
        "save_dir": args.out_dir,
        "checkpoint_dir": f"{args.out_dir}/checkpoints",
        "preset": args.preset,
        "max_seq_len": ROW_LENGTH,
        "batch_size": args.batch_size,
        "max_steps": args.max_steps,
        "schedule": "wsd",
        "warmup_ratio": 0.03,
        "decay_ratio": 0.7,
        "log_interval": 25,
        "save_interval": 0,
        "eval_interval": 100,
        "val_max_rows": 64,
        "device": args.device,
        "dtype": dtype,
        "seed": args.seed,
    }
    pretrain = PretrainArguments(
        data_path=str(world / "pretrain.jsonl"),
        val_path=str(world / "pretrain_heldout.jsonl"),
        epochs=args.pretrain_epochs,
        learning_rate=args.pretrain_lr,
        **common,
    )
    sft = SFTArguments(
        data_path=str(world / "sft.jsonl"),
        val_path=str(world / "sft_heldout.jsonl"),
        epochs=args.sft_epochs,
        learning_rate=args.sft_lr,
        **common,
    )
    return pretrain, sft


def pick_threads(call: Callable[[], None]) -> int:
    """CPU 上用几个线程最快：从 1 起翻倍，快不到一成半就停；设好并返回线程数。

    机器正忙，或容器只给两个核却看得见几十个时，线程多了会在屏障前互相空等：四核机器负载到 15 时，
    4 线程实测比 1 线程慢一百倍。上限是 torch 的默认值，所以 OMP_NUM_THREADS 仍然管用。
    """
    import torch

    from minimind.trainer.device import time_call

    most, best, threads = torch.get_num_threads(), float("inf"), 1
    candidate = 1
    while True:
        torch.set_num_threads(candidate)
        seconds = time_call(call)
        if seconds > best / 1.15:
            break
        best, threads = seconds, candidate
        if candidate == most:
            break
        candidate = min(2 * candidate, most)
    torch.set_num_threads(threads)
    return threads


def probe_speed(model, dataset, rows: int) -> tuple[str, float]:
    """选精度并测速：用真数据走几个完整的训练步，每步 ``rows`` 行。

    Returns:
        ``(精度的名字, 每秒多少个词元)``。
    """
    import torch

    from minimind.dataset import collate_packed
    from minimind.trainer.device import autocast_context, choose_dtype, synchronize, time_call
    from minimind.trainer.loop import language_model_loss
    from minimind.trainer.optim import build_optimizer
    from minimind.trainer.train_args import TrainArguments
    from minimind.trainer.validation import to_device

    device = next(model.parameters()).device

    def take(count: int) -> dict:
        return to_device(collate_packed([dataset[i % len(dataset)] for i in range(count)]), device)

    def step(dtype: torch.dtype, batch: dict, optimizer=None) -> None:
        with autocast_context(device, dtype):
            loss, count, _ = language_model_loss(model, batch)
        (loss / count).backward()
        if optimizer is not None:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        synchronize(device)

    few, full = take(max(rows // 4, 1)), take(rows)
    if device.type == "cpu":
        pick_threads(lambda: step(torch.float32, few))
    dtype = choose_dtype("auto", device, lambda dtype: step(dtype, few))
    name = str(dtype).removeprefix("torch.")
    precision = name if dtype == torch.bfloat16 else "float32"
    optimizer = build_optimizer(model, TrainArguments(), newton_schulz_dtype=precision)
    return name, rows * ROW_LENGTH / time_call(lambda: step(dtype, full, optimizer))


def pick_items(items: list[dict], kind: str, per_task: int) -> list[dict]:
    """某一类考题；``per_task`` 大于 0 时每个任务只取前几题。LoRA 的身份题要等换了身份再考。"""
    chosen, seen = [], {}
    for item in items:
        if item["kind"] != kind or item["task"].startswith("lora_"):
            continue
        seen[item["task"]] = seen.get(item["task"], 0) + 1
        if not per_task or seen[item["task"]] <= per_task:
            chosen.append(item)
    return chosen


def rows_to_train(dataset, epochs: int, args: DemoArguments) -> int:
    """一个阶段要训练多少行。"""
    rows = len(dataset) * epochs
    return min(rows, args.max_steps * args.batch_size) if args.max_steps else rows


def open_weights(args: DemoArguments, weight: str):
    from minimind.inference.loading import load_for_inference

    return load_for_inference(save_dir=args.out_dir, weight=weight, device=args.device)


def run(args: DemoArguments) -> Path:
    """走完全程，返回 report.md 的路径。"""
    import torch

    from minimind.dataset import PretrainDataset, SFTDataset
    from minimind.dataset.microworld import ensure_microworld
    from minimind.evaluate.bpb import bits_per_byte
    from minimind.evaluate.microworld import evaluate_items, read_items
    from minimind.model import count_parameters
    from minimind.recipes import full_sft, pretrain
    from minimind.report.build import build_report
    from minimind.trainer.device import device_name
    from minimind.trainer.trainer_utils import init_model, model_config, start_run

    start = time.perf_counter()
    if args.fast:
        args.scale, args.max_steps, args.batch_size, args.items_per_task = 0.01, 4, 4, 1
    out_dir = resolve_path(args.out_dir)
    say(f"写微世界语料到 {out_dir / 'microworld'}……")
    world = ensure_microworld(args.scale, args.seed, out_dir / "microworld")
    pre_args, sft_args = stage_arguments(args, world, "auto")

    device = start_run(pre_args)
    model, tokenizer = init_model(model_config(pre_args), "none", None, args.out_dir, device)
    pre_rows = PretrainDataset(pre_args.data_path, tokenizer, max_length=ROW_LENGTH)
    sft_rows = SFTDataset(sft_args.data_path, tokenizer, max_length=ROW_LENGTH)
    items = read_items(world / "eval.jsonl")
    cloze, chats = (pick_items(items, kind, args.items_per_task) for kind in ("cloze", "chat"))
    heldout = str(world / "pretrain_heldout.jsonl")

    def measure_bpb(model) -> float:
        return bits_per_byte(
            model, tokenizer, heldout, max_length=ROW_LENGTH, max_rows=32 if args.fast else 0
        )

    untrained_bpb = measure_bpb(model)
    say("测速……")
    dtype, speed = probe_speed(model, pre_rows, args.batch_size)
    del model
    pre_args.dtype = sft_args.dtype = dtype
    share = {"cloze": len(cloze) / 330, "chat": len(chats) / 880}
    exam = {kind: EVAL_TOKENS[kind] * share[kind] / speed for kind in share}
    row_seconds = ROW_LENGTH / speed
    clock = Clock(
        {
            "pretrain": rows_to_train(pre_rows, args.pretrain_epochs, args) * row_seconds,
            "exam1": exam["cloze"] + exam["chat"],
            "sft": rows_to_train(sft_rows, args.sft_epochs, args) * row_seconds,
            "exam2": exam["chat"],
        },
        start,
    )
    expected = clock.elapsed() + clock.left()
    say(f"{speed:,.0f} 词元/秒（{dtype}）；全程预计 {format_duration(expected)}。")

    clock.begin("pretrain", "预训练：读百科、算式和故事，学会接着往下写")
    first = pretrain.run(pre_args)
    clock.end("pretrain")

    clock.begin("exam1", "评测预训练：留出文本的每字节比特、填空，以及微调前的对话")
    base = open_weights(args, "pretrain")
    trained_bpb = measure_bpb(base.model)
    cloze_results = evaluate_items(base.model, tokenizer, cloze, max_new_tokens=16, description="填空")
    before = evaluate_items(base.model, tokenizer, chats, max_new_tokens=32, description="微调前的对话")
    clock.end("exam1")

    clock.begin("sft", "监督微调：学会按问答的样子回答")
    second = full_sft.run(sft_args)
    clock.end("sft")

    clock.begin("exam2", "评测微调：没见过的题目")
    tuned = open_weights(args, "full_sft")
    after = evaluate_items(tuned.model, tokenizer, chats, description="微调后的对话")
    clock.end("exam2")

    facts = {
        "设备": f"{device_name(device)}，{dtype}",
        "PyTorch": torch.__version__,
        "模型": f"{args.preset}，{count_parameters(tuned.model) / 1e6:.2f}M 参数",
        "预训练": f"{first.step} 步，{format_duration(clock.actual['pretrain'])}",
        "微调": f"{second.step} 步，{format_duration(clock.actual['sft'])}",
        "评测": format_duration(clock.actual["exam1"] + clock.actual["exam2"]),
        "全程": f"{format_duration(clock.elapsed())}（开始时预计 {format_duration(expected)}）",
        "种子与规模": f"{args.seed}，{args.scale:g}",
    }
    report = build_report(
        resolve_path(args.report_dir),
        facts=facts,
        bpb=(untrained_bpb, trained_bpb),
        cloze=cloze_results,
        before=before,
        after=after,
        logs={"pretrain": first.log, "full_sft": second.log},
    )
    path = report.write(resolve_path(args.report_dir))
    console.print()
    console.print(report.scoreboard())
    say(
        f"报告：{path}\n权重：{second.weights}\n再次对话：minimind chat --save_dir {args.out_dir} --temperature 0"
    )
    return path


def open_chat(args: DemoArguments) -> None:
    """在终端里接着对话；没有终端（管道、持续集成）就什么也不做。"""
    if not (args.chat and sys.stdin.isatty() and sys.stdout.isatty()):
        return
    from minimind import chat

    say("\n可以问它微世界里的事了，例如：麦香镇的地标是什么？ 27+35 等于多少？ 你是谁？（空行退出）")
    chat_args = chat.ChatArguments(
        save_dir=args.out_dir, temperature=0.0, device=args.device, mode="manual", max_new_tokens=200
    )
    chat.run(chat.open_session(chat_args), chat_args)


@guard
def main(argv: list[str] | None = None) -> None:
    """命令行入口。"""
    args = parse_args(DemoArguments, argv)
    run(args)
    open_chat(args)
