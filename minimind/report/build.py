"""把演示的结果写成一份报告：曲线、记分牌、各任务、样例和全部回答。"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from minimind.dataset.microworld import TASKS
from minimind.evaluate.microworld import Answered, accuracy, by_task
from minimind.report.curves import plot_stage, plot_tasks
from minimind.report.logs import read_log
from minimind.report.report import Metric, Report, Sample

# 报告里展示多少道题；每个任务一道，按任务次序均匀地取，不挑好的
SAMPLES = 12


def level(results: Sequence[Answered], name: str) -> list[Answered]:
    """某个难度的题：``easy`` 计入总成绩，``hard`` 要多步推导或多位数，另列一行。"""
    return [answered for answered in results if answered.item["level"] == name]


def task_table(before: Sequence[Answered], after: Sequence[Answered]) -> dict[str, dict]:
    """``{任务: {"title", "items", "before", "after", "level"}}``。"""
    old = by_task(before)
    return {
        task: {
            "title": TASKS[task].title if task in TASKS else task,
            "level": group[0].item["level"],
            "items": len(group),
            "before": accuracy(old.get(task, [])),
            "after": accuracy(group),
        }
        for task, group in by_task(after).items()
    }


def pick_samples(before: Sequence[Answered], after: Sequence[Answered]) -> list[Sample]:
    """每个任务的第一道题，均匀取 :data:`SAMPLES` 个任务；答错的照样列出。"""
    pairs = {}
    for old, new in zip(before, after):
        pairs.setdefault(new.item["task"], (old, new))
    chosen = list(pairs.values())
    step = max(len(chosen) / SAMPLES, 1.0)
    picked = [chosen[int(i * step)] for i in range(min(SAMPLES, len(chosen)))]
    return [
        Sample(
            task=new.item["task"],
            prompt=_question(new.item),
            reference=new.item.get("reference", new.item["answer"]),
            before=old.response,
            after=new.response,
            score=new.score,
        )
        for old, new in picked
    ]


def _question(item: dict) -> str:
    """题面：最后一个用户或工具回合的文字。"""
    turns = [turn for turn in item.get("messages", []) if turn["role"] in ("user", "tool")]
    return turns[-1]["content"] if turns else item["prompt"]


def build_report(
    folder: Path,
    *,
    facts: dict[str, str],
    bpb: tuple[float, float],
    cloze: Sequence[Answered],
    before: Sequence[Answered],
    after: Sequence[Answered],
    logs: dict[str, Path],
) -> Report:
    """画好曲线、写好 ``answers.jsonl``，返回还没写盘的 :class:`Report`。

    Args:
        bpb: 预训练前后留出文本的每字节比特数。
        cloze: 预训练后的填空。
        before, after: 微调前后同一批对话题，同序。
        logs: ``{阶段: JSON 行日志}``。
    """
    folder.mkdir(parents=True, exist_ok=True)
    tasks = task_table(before, after)
    easy, hard = (level(after, name) for name in ("easy", "hard"))
    old_easy, old_hard = (level(before, name) for name in ("easy", "hard"))
    metrics = [
        Metric("预训练", "每字节比特（留出文本，越低越好）", *bpb, kind="number", higher_is_better=False),
        Metric("预训练", f"填空答对（留出 {len(cloze)} 题）", None, accuracy(cloze)),
        Metric("微调", f"对话答对（留出 {len(easy)} 题）", accuracy(old_easy), accuracy(easy)),
    ]
    if hard:
        title = f"难题答对（多步、多位数，留出 {len(hard)} 题）"
        metrics.append(Metric("微调", title, accuracy(old_hard), accuracy(hard)))

    figures = {}
    captions = {"pretrain": "预训练曲线", "full_sft": "微调曲线"}
    for stage, log in logs.items():
        if plot_stage(read_log(log), stage, folder / f"{stage}.png"):
            figures[f"{stage}.png"] = captions.get(stage, stage)
    plot_tasks(
        {task: entry["before"] for task, entry in tasks.items()},
        {task: entry["after"] for task, entry in tasks.items()},
        folder / "tasks.png",
    )
    figures["tasks.png"] = "各任务微调前后的正确率"
    write_answers(folder / "answers.jsonl", {"cloze": cloze, "before_sft": before, "after_sft": after})
    return Report(
        title="MiniMind 演示成绩单",
        facts=facts,
        metrics=metrics,
        tasks=tasks,
        samples=pick_samples(before, after),
        figures=figures,
    )


def write_answers(path: Path, exams: dict[str, Sequence[Answered]]) -> None:
    """全部题目与回答，一行一题，便于自己核对。"""
    with path.open("w", encoding="utf-8") as file:
        for exam, results in exams.items():
            for answered in results:
                record = {
                    "exam": exam,
                    "task": answered.item["task"],
                    "question": _question(answered.item),
                    "answer": answered.item["answer"],
                    "response": answered.response,
                    "score": answered.score,
                }
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
