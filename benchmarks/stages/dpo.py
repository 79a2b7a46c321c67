"""DPO：开口客气，别的本事不掉。"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from bench_stages import Bench, Goal, Outcome

from minimind.dataset import DPODataset
from minimind.dataset.jsonl import line_ranges, parse_line, read_lines
from minimind.evaluate.microworld import accuracy, evaluate_items
from minimind.microworld.graders import style_of
from minimind.recipes.dpo import DPOArguments
from minimind.recipes.dpo import run as train_dpo
from minimind.report.logs import read_log
from minimind.trainer.reference import pair_logprobs

TITLE = "DPO：开口客气"


def goals(accuracy: Goal, polite: float) -> list[Goal]:
    """``accuracy`` 是什么因损失而异；``polite`` 是客气要涨多少。"""
    return [
        accuracy,
        Goal("ranking", "留出的偏好对：好的概率更高"),
        Goal("polite", "留出的提问：写出的回答客气", at_least=polite, change=True),
        Goal("grumpy", "留出的提问：写出的回答不耐烦"),
        Goal("tasks", "全部简单题答对", at_least=-0.05, change=True),
        Goal("finished", "回答写出了结束符"),
    ]


GOALS = goals(Goal("accuracy", "留出的偏好对：好的隐含回报更高", at_least=0.90), polite=0.40)
# 演示里用的就是这一组
SETTINGS = {
    "max_seq_len": 256,
    "batch_size": 16,
    "learning_rate": 1.8e-4,
    "embed_lr_scale": 0.5,
    "sft_coef": 1.0,
    "log_interval": 5,
    "eval_interval": 0,
}


def exam(bench: Bench, loaded: Any) -> dict[str, float]:
    """写出来的腔调、各任务的成绩、偏好对的高低。"""
    pairs = DPODataset(bench.world / "dpo_heldout.jsonl", loaded.tokenizer, SETTINGS["max_seq_len"])
    logps = pair_logprobs(loaded.model, pairs, batch_size=32, dtype=torch.float32, description="偏好对的概率")
    return {"ranking": float((logps[:, 0] > logps[:, 1]).float().mean()), **spoken(bench, loaded)}


def spoken(bench: Bench, loaded: Any) -> dict[str, float]:
    """写出来的腔调与各任务的成绩，都由判分器自己量。"""
    path = bench.world / "dpo_heldout.jsonl"
    lines = (raw for start, end in line_ranges(path, 1 << 22) for raw in read_lines(path, start, end))
    asked = [
        {"task": "style", "messages": parse_line(raw)["chosen"][:-1], "answer": "polite", "grader": "style"}
        for raw in lines
    ]
    styled = evaluate_items(loaded.model, loaded.tokenizer, asked, description="腔调")
    styles = [style_of(answered.response) for answered in styled]
    tasks = evaluate_items(loaded.model, loaded.tokenizer, bench.items("easy"), description="各任务")
    return {
        "polite": styles.count("polite") / len(styles),
        "grumpy": styles.count("grumpy") / len(styles),
        "tasks": accuracy(tasks),
        "finished": sum(answered.finished for answered in [*styled, *tasks]) / (len(styled) + len(tasks)),
    }


def before(bench: Bench) -> dict[str, float]:
    return exam(bench, bench.open(bench.base, "full_sft"))


def settings(bench: Bench, seed: int, folder: Path, **changes: Any) -> DPOArguments:
    return DPOArguments(**bench.common(seed, folder, "dpo"), **{**SETTINGS, **changes})


def run(bench: Bench, seed: int, **changes: Any) -> Outcome:
    """训练一次并考试；``changes`` 是与 :data:`SETTINGS` 不同的设置，别的损失（orpo、simpo、kto）用它。"""
    folder = bench.folder(seed)
    result = train_dpo(settings(bench, seed, folder, **changes))
    metrics = exam(bench, bench.open(folder, "dpo")) | {"accuracy": result.metrics["val_accuracy"]}
    rows = [row for row in read_log(result.log) if "lr" in row]
    names = ("loss", "accuracy", "margin", "kl", "reward_chosen", "reward_rejected")
    curves = {
        name: [[row["step"], round(row[name], 4)] for row in rows] for name in names if name in rows[-1]
    }
    return Outcome(metrics, curves, notes={"settings": {**SETTINGS, **changes}, "val": result.metrics})
