"""一次演示的家当：各阶段共用的设置、考卷、时钟与报告。"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minimind.demo.arguments import ROW_LENGTH, DemoArguments
from minimind.demo.exam import Papers
from minimind.demo.explain import explain
from minimind.evaluate.microworld import Answered, accuracy, evaluate_items
from minimind.figures import labeler
from minimind.paths import resolve_path
from minimind.report.build import write_answers
from minimind.report.curves import plot_rewards, plot_scores, plot_stage, plot_tasks
from minimind.report.logs import read_log
from minimind.report.report import Metric, Report
from minimind.report.training import collect_samples


@dataclass
class Road:
    """阶段之间要传的东西都在这里。

    Args:
        world: 微世界语料的文件夹。
        papers: 考卷。
        dtype: 测速选出的精度。
        untrained_bpb: 没训练过的模型的每字节比特数。
        rows: 按轮数走的语料各有多少行（偏好折合成行），排时间表用。
        pace: 各段走安排的几成步，机器慢时小于 1，见 :func:`minimind.demo.pace.fit_pace`。
        title: 正在走的阶段，记分牌的第一列。
        answers: ``{考试: 回答}``，写进 answers.jsonl；微调的成绩是后面各阶段的“之前”。
        rewards: ``{强化学习的阶段: (日志, 每步采样多少条)}``，画在同一张图里。
    """

    args: DemoArguments
    world: Path
    papers: Papers
    report: Report
    dtype: str = "auto"
    untrained_bpb: float | None = None
    rows: dict[str, int] = field(default_factory=dict)
    pace: float = 1.0
    title: str = ""
    answers: dict[str, list[Answered]] = field(default_factory=dict)
    rewards: dict[str, tuple[Path, int]] = field(default_factory=dict)
    answered_before: list[str] = field(default_factory=list)

    # ---- 训练 ----

    def common(self, **changes: Any) -> dict[str, Any]:
        """各阶段训练参数里相同的部分。"""
        args = self.args
        return {
            "save_dir": args.out_dir,
            "checkpoint_dir": f"{args.out_dir}/checkpoints",
            "preset": args.preset,
            "max_seq_len": ROW_LENGTH,
            "batch_size": args.batch_size,
            "max_steps": args.max_steps,
            "log_interval": 25,
            "save_interval": 0,
            "eval_interval": 100,
            "val_max_rows": 8 if args.fast else 64,
            "dtype": self.dtype,
            "device": args.device,
            "seed": args.seed,
            **changes,
        }

    def data(self, name: str) -> dict[str, str]:
        """某个阶段的训练与留出文件。"""
        return {
            "data_path": str(self.world / f"{name}.jsonl"),
            "val_path": str(self.world / f"{name}_heldout.jsonl"),
        }

    def steps(self, planned: int) -> int:
        """这一段走多少步：课程的安排，机器慢时少走，不超过 ``--max_steps``。"""
        planned = max(1, round(planned * self.pace))
        return min(planned, self.args.max_steps or planned)

    def epoch_steps(self, data: str, epochs: int, rows_per_step: int) -> int:
        """按轮数走完 ``data`` 的一段，``max_steps`` 填多少；0 是走满各轮。"""
        if self.pace == 1:
            return self.args.max_steps
        return self.steps(math.ceil(self.rows[data] * epochs / rows_per_step))

    # ---- 考试 ----

    def load(self, weight: str, **options: Any):
        """打开一个训练好的权重来考试。"""
        from minimind.inference.loading import load_for_inference

        return load_for_inference(
            save_dir=self.args.out_dir, weight=weight, device=self.args.device, **options
        )

    def sit(
        self, exam: str, loaded: Any, items: Sequence[dict], description: str, **options: Any
    ) -> list[Answered]:
        """考一次，记下回答。"""
        if self.args.fast:  # 没训练好的模型每题都写到上限
            options["max_new_tokens"] = 8
        results = evaluate_items(loaded.model, loaded.tokenizer, items, description=description, **options)
        self.answers[exam] = results
        return results

    def tuned(self, paper: str) -> list[Answered]:
        """微调模型在 ``chats`` 或 ``multistep`` 上的成绩，后面各阶段的“之前”；没考过就现在考。"""
        exam = f"full_sft_{paper}"
        if exam not in self.answers:
            self.sit(exam, self.load("full_sft"), getattr(self.papers, paper), "微调模型的成绩")
        return self.answers[exam]

    # ---- 报告 ----

    def score(self, name: str, english: str, before: float | None, after: float, **options: Any) -> None:
        """记分牌上添一行；``english`` 是没有中文字体时图上的短名。"""
        told = {"english": english, "explanation": explain(english)}
        self.report.metrics.append(Metric(self.title, name, before, after, **told, **options))

    def folder(self) -> Path:
        """报告的目录，没有就建立。"""
        folder = resolve_path(self.args.report_dir)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def draw_curve(self, name: str, caption: str, *logs: Path, legend: Sequence[str] = ()) -> None:
        """一个阶段的曲线；几份日志画在一起比较。训练途中的样例与采样的回答也收进报告。

        Args:
            legend: 各份日志的中文名，有中文字体时用。
        """
        records = {log.stem: read_log(log) for log in logs}
        collect_samples(self.report, records)
        label = labeler()
        named = {label(chinese, stem): records[stem] for stem, chinese in zip(records, legend)} or records
        if plot_stage(named, label(self.title, name), self.folder() / f"{name}.png"):
            self.report.figures[f"{name}.png"] = caption

    def draw_tasks(self) -> None:
        """各任务微调前后的正确率。"""
        tasks = self.report.tasks
        before, after = ({task: entry[side] for task, entry in tasks.items()} for side in ("before", "after"))
        titles = {task: entry["title"] for task, entry in tasks.items()}
        plot_tasks(before, after, self.folder() / "tasks.png", titles)
        self.report.figures["tasks.png"] = "各任务微调前后的正确率"

    def draw_rewards(self) -> None:
        """已走完的强化学习阶段的奖励，横轴是采样的条数：同样的预算，谁学得快。"""
        curves = {name: (read_log(log), rollouts) for name, (log, rollouts) in self.rewards.items()}
        plot_rewards(curves, self.folder() / "rewards.png", accuracy(self.tuned("multistep")))
        self.report.figures["rewards.png"] = "强化学习的奖励，横轴是采样了多少条回答"

    def recall_rewards(self, names: Collection[str]) -> None:
        """上一次走的强化学习阶段，从日志里找回奖励的曲线。"""
        from minimind.demo import reinforce

        for name in sorted(names):
            arguments = getattr(reinforce, f"{name}_arguments")(self)
            log = (
                resolve_path(self.args.out_dir) / "logs" / f"{arguments.save_weight}_{arguments.width}.jsonl"
            )
            if log.is_file():
                self.rewards[name.upper()] = log, arguments.batch_size * arguments.num_generations

    def write_report(self) -> Path:
        """把到此为止的结果写盘，返回 report.md 的路径。"""
        write_answers(self.folder() / "answers.jsonl", self.answers, self.answered_before)
        return self.report.write(self.folder())

    def draw_scoreboard(self) -> None:
        """记分牌的图，全程走完才画。"""
        ratios = [metric for metric in self.report.metrics if metric.kind == "ratio"]
        rows = [(f"{m.stage}：{m.name}", m.english, m.before, m.after) for m in ratios]
        if rows:
            plot_scores(rows, self.folder() / "scoreboard.png")
            self.report.figures["scoreboard.png"] = "各阶段前后"
