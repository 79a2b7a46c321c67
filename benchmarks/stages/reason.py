"""推理：多步题写出步骤再答，与同样的词元数下直接报答案的对照。"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench_stages import Bench, Goal, Outcome

from minimind.answers import well_formed
from minimind.evaluate.microworld import Answered, accuracy, evaluate_items
from minimind.recipes.reason import ReasonArguments
from minimind.recipes.reason import run as train_reason

TITLE = "推理：先想再答"
FIGURE = {"title": "Reason vs direct answers, tiny model", "y": "training loss", "log_y": True}
GOALS = [
    Goal("multistep", "多步题答对（留出）"),
    Goal("direct", "对照：直接报答案，训练词元数相同"),
    Goal("gain", "比直接报答案多", at_least=0.20),
    Goal("formatted", "标签完整", at_least=0.97),
    Goal("ended", "自己停下", at_least=0.97),
    Goal("easy", "简单题答对（留出）"),
]
# 两边走同样多步、每步同样多位置
STEPS, ROWS, ROW_LENGTH = 120, 8, 256


def exam_items(bench: Bench) -> list[dict[str, Any]]:
    """推理留出文件里的题：240 道，去掉重复的问句。"""
    items: dict[str, dict[str, Any]] = {}
    limit = 3 * bench.args.items_per_task or None
    for line in (bench.world / "rl_heldout.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        messages = record["conversations"][:-1]
        question = messages[-1]["content"]
        items[question] = {
            "task": "multistep",
            "prompt": question,
            "messages": messages,
            "answer": record["answer"],
            "grader": record["grader"],
        }
    return list(items.values())[:limit]


def exam(bench: Bench, loaded: Any, description: str) -> list[Answered]:
    return evaluate_items(loaded.model, loaded.tokenizer, exam_items(bench), description=description)


def before(bench: Bench) -> dict[str, float]:
    loaded = bench.open(bench.base, "full_sft")
    results = exam(bench, loaded, "多步题")
    easy = evaluate_items(loaded.model, loaded.tokenizer, bench.items("easy"), description="简单题")
    return {
        "multistep": accuracy(results),
        "formatted": share(well_formed(answered.response) for answered in results),
        "ended": share(answered.finished for answered in results),
        "easy": accuracy(easy),
    }


def share(flags: Any) -> float:
    flags = list(flags)
    return sum(flags) / len(flags)


def settings(bench: Bench, seed: int, folder: Path, stage: str = "reason") -> ReasonArguments:
    """演示里用的就是这一组；对照只换数据。"""
    return ReasonArguments(
        **bench.common(seed, folder, stage),
        max_seq_len=ROW_LENGTH,
        batch_size=ROWS,
        epochs=100,
        max_steps=STEPS,
    )


def run(bench: Bench, seed: int) -> Outcome:
    """训练推理与对照各一次并考试。"""
    metrics: dict[str, float] = {}
    curves, notes = {}, {}
    for stage in ("reason", "reason_direct"):
        folder = bench.folder(seed, stage)
        result = train_reason(settings(bench, seed, folder, stage))
        loaded = bench.open(folder, "reason")
        results = exam(bench, loaded, stage)
        curves[stage] = bench.loss_curve(result.log)
        notes[stage] = [[answered.item["prompt"], answered.response] for answered in results[:3]]
        if stage == "reason_direct":
            metrics["direct"] = accuracy(results)
            continue
        easy = evaluate_items(loaded.model, loaded.tokenizer, bench.items("easy"), description="简单题")
        metrics = {
            "multistep": accuracy(results),
            "formatted": share(well_formed(answered.response) for answered in results),
            "ended": share(answered.finished for answered in results),
            "easy": accuracy(easy),
        }
    metrics["gain"] = metrics["multistep"] - metrics["direct"]
    return Outcome(metrics, curves, notes)
