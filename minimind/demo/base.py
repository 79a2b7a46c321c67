"""演示的前两段：预训练与监督微调；后面的都从这里的权重开始。"""

from __future__ import annotations

from minimind.demo.arguments import ROW_LENGTH
from minimind.demo.exam import of_level
from minimind.demo.road import Road
from minimind.evaluate.bpb import bits_per_byte
from minimind.evaluate.microworld import accuracy
from minimind.recipes import full_sft, pretrain
from minimind.report.build import pick_samples, task_table

# 两段共用的日程：百分之三的步预热，最后七成衰减
SCHEDULE = {"schedule": "wsd", "warmup_ratio": 0.03, "decay_ratio": 0.7}


def pretrain_arguments(road: Road) -> pretrain.PretrainArguments:
    """与 ``minimind pretrain`` 是同一个 dataclass。"""
    epochs = road.args.pretrain_epochs
    plan = {"epochs": epochs, "learning_rate": road.args.pretrain_lr}
    plan["max_steps"] = road.epoch_steps("pretrain", epochs, road.args.batch_size)
    return pretrain.PretrainArguments(**road.common(**SCHEDULE, **plan), **road.data("pretrain"))


def sft_arguments(road: Road) -> full_sft.SFTArguments:
    """与 ``minimind sft`` 是同一个 dataclass。"""
    plan = {"epochs": road.args.sft_epochs, "learning_rate": road.args.sft_lr}
    plan["max_steps"] = road.epoch_steps("sft", road.args.sft_epochs, road.args.batch_size)
    return full_sft.SFTArguments(**road.common(**SCHEDULE, **plan), **road.data("sft"))


def heldout_bpb(road: Road, model, tokenizer) -> float:
    """预训练留出文本的每字节比特数。"""
    papers = road.papers
    return bits_per_byte(model, tokenizer, papers.heldout, max_length=ROW_LENGTH, max_rows=papers.bpb_rows)


def run_pretrain(road: Road) -> None:
    """预训练，再考每字节比特、填空与微调前的对话。"""
    result = pretrain.run(pretrain_arguments(road))
    road.draw_curve("pretrain", "预训练曲线", result.log)
    base = road.load("pretrain")
    bpb = heldout_bpb(road, base.model, base.tokenizer)
    road.score(
        "每字节比特（留出文本，越低越好）",
        "pretrain: bits per byte",
        road.untrained_bpb,
        bpb,
        kind="number",
        higher_is_better=False,
    )
    cloze = road.sit("cloze", base, road.papers.cloze, "填空", max_new_tokens=16)
    road.score(f"填空答对（留出 {len(cloze)} 题）", "pretrain: cloze", None, accuracy(cloze))
    road.sit("before_sft", base, road.papers.chats, "微调前的对话", max_new_tokens=32)


def run_sft(road: Road) -> None:
    """监督微调，再考没见过的题目；成绩留给后面各段作“之前”。"""
    result = full_sft.run(sft_arguments(road))
    road.draw_curve("full_sft", "微调曲线", result.log)
    if "before_sft" not in road.answers:  # 只补这一段：预训练是上一次走的
        base = road.load("pretrain")
        road.sit("before_sft", base, road.papers.chats, "微调前的对话", max_new_tokens=32)
    before, after = road.answers["before_sft"], road.tuned("chats")
    for level, title in (("easy", "对话答对"), ("hard", "难题答对（多步、多位数）")):
        if new := of_level(after, level):
            old = accuracy(of_level(before, level))
            road.score(f"{title}（留出 {len(new)} 题）", f"sft: {level} dialogue", old, accuracy(new))
    road.report.tasks = task_table(before, after)
    road.report.samples = pick_samples(before, after)
    road.draw_tasks()
    road.tuned("multistep")
