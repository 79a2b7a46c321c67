"""演示：从零走完全程，几分钟后得到一个会答题的小模型和一份成绩单。

造数据 → 预训练 → 考填空 → 监督微调 → 考对话 → 写报告 → 对话。每一步都是正式命令用的同一段代码，
只是尺寸小、数据是内置的微世界。产物在 ``out/demo``，不碰使用者自己的权重。
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from minimind.arguments import arg, parse_args
from minimind.console import console, format_duration, say
from minimind.errors import guard
from minimind.pace import Clock, probe_speed
from minimind.paths import resolve_path

# 一步 2,048 个位置：同样的词元数，步子小而多学得更好；微世界的文档与对话都不到 256 个词元
ROW_LENGTH, ROWS = 256, 8
# 考一道题的时间折合多少个训练词元（实测 40 到 60：逐词生成没有训练那样的大矩阵，但一题只写十几个词）
TOKENS_PER_ITEM = 60


@dataclass
class DemoArguments:
    """从零走完全程：造数据、预训练、微调、评测、出报告、对话。"""

    out_dir: str = arg("out/demo", "数据、权重与日志的目录")
    report_dir: str = arg("out/report", "报告的目录")
    preset: str = arg("tiny", "模型尺寸")
    scale: float = arg(1.0, "微世界训练语料的规模")
    pretrain_epochs: int = arg(1, "预训练轮数")
    sft_epochs: int = arg(1, "微调轮数")
    pretrain_lr: float = arg(6e-3, "预训练的最高学习率")
    sft_lr: float = arg(1.5e-3, "微调的最高学习率")
    max_steps: int = arg(0, "每个阶段至多多少步；0 表示由轮数决定")
    items_per_task: int = arg(0, "每个任务至多考几题；0 表示全部")
    batch_size: int = arg(ROWS, f"每步多少行，每行 {ROW_LENGTH} 个词元")
    fast: int = arg(0, "只看流程通不通：百分之一的数据、每阶段 4 小步、每个任务 1 题", (0, 1))
    chat: int = arg(1, "结束后打开对话（仅当在终端里运行）", (0, 1))
    device: str = arg("auto", "设备：auto、cpu、cuda:0、npu:0、mps")
    seed: int = arg(42, "随机种子")


def stage_arguments(args: DemoArguments, world: Path):
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


@dataclass
class Exam:
    """考卷与各次成绩。"""

    cloze: list[dict]
    chats: list[dict]
    heldout: Path
    bpb_rows: int

    def bits_per_byte(self, model, tokenizer) -> float:
        from minimind.evaluate.bpb import bits_per_byte

        return bits_per_byte(model, tokenizer, self.heldout, max_length=ROW_LENGTH, max_rows=self.bpb_rows)


def plan(args: DemoArguments, pre_args, sft_args, exam: Exam, start: float) -> tuple[Clock, float]:
    """测速并排出时间表；选好的线程数与精度就地生效。

    Args:
        start: 全程开始的时刻（``time.perf_counter``）。

    Returns:
        ``(时钟, 没训练过的模型的每字节比特数)``。
    """
    from minimind.dataset import PretrainDataset, SFTDataset
    from minimind.trainer.trainer_utils import init_model, model_config, start_run

    device = start_run(pre_args)

    def fresh_model():
        return init_model(model_config(pre_args), "none", None, args.out_dir, device)

    model, tokenizer = fresh_model()
    pre_rows = PretrainDataset(pre_args.data_path, tokenizer, max_length=ROW_LENGTH)
    sft_rows = SFTDataset(sft_args.data_path, tokenizer, max_length=ROW_LENGTH)
    say("测速……")
    dtype, speed = probe_speed(model, pre_rows, args.batch_size, ROW_LENGTH)
    pre_args.dtype = sft_args.dtype = dtype
    start_run(pre_args)  # 测速动过随机数与权重，重新开始
    untrained_bpb = exam.bits_per_byte(fresh_model()[0], tokenizer)
    tokens = {
        "pretrain": rows_to_train(pre_rows, args.pretrain_epochs, args) * ROW_LENGTH,
        "exam1": (len(exam.cloze) + len(exam.chats)) * TOKENS_PER_ITEM,
        "sft": rows_to_train(sft_rows, args.sft_epochs, args) * ROW_LENGTH,
        "exam2": len(exam.chats) * TOKENS_PER_ITEM,
    }
    clock = Clock({name: count / speed for name, count in tokens.items()}, start)
    say(f"{speed:,.0f} 词元/秒（{dtype}）；全程预计 {format_duration(clock.expected)}。")
    return clock, untrained_bpb


def run(args: DemoArguments) -> Path:
    """走完全程，返回 report.md 的路径。"""
    from minimind.dataset.microworld import ensure_microworld
    from minimind.evaluate.microworld import evaluate_items, read_items
    from minimind.recipes import full_sft, pretrain
    from minimind.report.build import build_report

    start = time.perf_counter()
    if args.fast:
        args.scale, args.max_steps, args.batch_size, args.items_per_task = 0.01, 4, 4, 1
    out_dir, report_dir = resolve_path(args.out_dir), resolve_path(args.report_dir)
    say(f"写微世界语料到 {out_dir / 'microworld'}……")
    world = ensure_microworld(args.scale, args.seed, out_dir / "microworld")
    items = read_items(world / "eval.jsonl")
    exam = Exam(
        *(pick_items(items, kind, args.items_per_task) for kind in ("cloze", "chat")),
        world / "pretrain_heldout.jsonl",
        32 if args.fast else 0,
    )
    pre_args, sft_args = stage_arguments(args, world)
    clock, untrained_bpb = plan(args, pre_args, sft_args, exam, start)

    clock.begin("pretrain", "预训练：读百科、算式和故事，学会接着往下写")
    first = pretrain.run(pre_args)
    clock.end("pretrain")

    clock.begin("exam1", "评测预训练：留出文本的每字节比特、填空，以及微调前的对话")
    base = open_weights(args, "pretrain")
    trained_bpb = exam.bits_per_byte(base.model, base.tokenizer)
    cloze = evaluate_items(base.model, base.tokenizer, exam.cloze, max_new_tokens=16, description="填空")
    before = evaluate_items(
        base.model, base.tokenizer, exam.chats, max_new_tokens=32, description="微调前的对话"
    )
    clock.end("exam1")

    clock.begin("sft", "监督微调：学会按问答的样子回答")
    second = full_sft.run(sft_args)
    clock.end("sft")

    clock.begin("exam2", "评测微调：没见过的题目")
    tuned = open_weights(args, "full_sft")
    after = evaluate_items(tuned.model, tuned.tokenizer, exam.chats, description="微调后的对话")
    clock.end("exam2")

    facts = run_facts(args, tuned.model, pre_args.dtype, clock, first.step, second.step)
    report = build_report(
        report_dir,
        facts=facts,
        bpb=(untrained_bpb, trained_bpb),
        cloze=cloze,
        before=before,
        after=after,
        logs={"pretrain": first.log, "full_sft": second.log},
    )
    path = report.write(report_dir)
    console.print()
    console.print(report.scoreboard())
    say(
        f"报告：{path}\n权重：{second.weights}\n再次对话：minimind chat --save_dir {args.out_dir} --temperature 0"
    )
    return path


def run_facts(args: DemoArguments, model, dtype: str, clock: Clock, *steps: int) -> dict[str, str]:
    """报告开头的说明：在什么机器上、多大的模型、各用了多久。"""
    import torch

    from minimind.model import count_parameters
    from minimind.trainer.device import device_name

    return {
        "设备": f"{device_name(next(model.parameters()).device)}，{dtype}",
        "PyTorch": torch.__version__,
        "模型": f"{args.preset}，{count_parameters(model) / 1e6:.2f}M 参数",
        "预训练": f"{steps[0]} 步，{format_duration(clock.actual['pretrain'])}",
        "微调": f"{steps[1]} 步，{format_duration(clock.actual['sft'])}",
        "评测": format_duration(clock.actual["exam1"] + clock.actual["exam2"]),
        "全程": f"{format_duration(clock.elapsed())}（开始时预计 {format_duration(clock.expected)}）",
        "种子与规模": f"{args.seed}，{args.scale:g}",
    }


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
