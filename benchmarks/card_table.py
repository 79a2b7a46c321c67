"""卡上的目标，与最后的那张表：目标旁边是测到的，达到没有。只用标准库。"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Goal:
    """一行。

    part、key: 结果里的位置；wanted: 目标，``None`` 是只看不评；at_least: 真为至少，假为至多；form: 数怎么写。
    """

    part: str
    key: str
    title: str
    wanted: float | None = None
    at_least: bool = True
    form: str = "{:,.0f}"

    def met(self, value: float) -> bool:
        return value >= self.wanted if self.at_least else value <= self.wanted

    def goal(self) -> str:
        if self.wanted is None:
            return "—"
        return ("≥ " if self.at_least else "≤ ") + self.form.format(self.wanted)


PERCENT, RATIO, PLAIN = "{:.1%}", "{:.2f}×", "{:,.1f}"


def training_goals(size: str, share: float) -> list[Goal]:
    part = f"train_{size}"
    rows = []
    for mode, name in (("eager", "逐算子"), ("compiled", "编译")):
        goal = share if mode == "compiled" else None
        rows += [
            Goal(part, f"{mode}.tokens_per_second", f"训练 {size}，{name}：词元/秒"),
            Goal(part, f"{mode}.share_of_peak", f"训练 {size}，{name}：占峰值", goal, form=PERCENT),
            Goal(part, f"{mode}.step_ms", f"训练 {size}，{name}：一步毫秒", form=PLAIN),
            Goal(part, f"{mode}.peak_gib", f"训练 {size}，{name}：内存最高 GiB", form=PLAIN),
        ]
    return [
        *rows,
        Goal(part, "optimizer_share_128k", f"优化器占 128k 词元一步的，{size}", 0.03, False, PERCENT),
        Goal(part, "compiled.recompilations", f"训练 {size}，编译：头一步之后又编译", 0, False),
    ]


def decoding_goals(size: str, alone: float | None, many: float | None) -> list[Goal]:
    rows = []
    for count in (1, 32, 64, 256):
        wanted = {1: alone, 256: many}.get(count)
        rows.append(Goal(f"decode_{size}", f"recorded.{count}", f"解码 {size}，录制，{count} 条", wanted))
        rows.append(Goal(f"decode_{size}", f"recorded_sampled.{count}", f"　按温度 1 抽，{count} 条"))
        rows.append(Goal(f"decode_{size}", f"plain.{count}", f"解码 {size}，不录制，{count} 条"))
    return rows


GOALS: tuple[Goal, ...] = (
    Goal("matmul", "tflops", "矩阵乘 bf16，TFLOP/s（测）"),
    Goal("matmul", "datasheet_tflops", "矩阵乘 bf16，TFLOP/s（标称）"),
    Goal("cuda_tests", "failed", "pytest -m cuda：没过", 0, False),
    Goal("cuda_tests", "passed", "pytest -m cuda：过了"),
    Goal("selftest", "failed", "selftest：不对的项", 0, False),
    *training_goals("small", 0.35),
    *training_goals("base", 0.50),
    *training_goals("moe", 0.40),
    Goal("train_moe", "time_over_dense", "moe 的时间 ÷ 同激活参数稠密", 1.35, False, RATIO),
    Goal("loop", "lost_share", "训练循环比光步子慢的份额，small", 0.03, False, PERCENT),
    Goal("auto", "compiled", "--use_compile auto：用上了编译（1 是）", 1),
    Goal("auto", "learned", "--use_compile auto：损失降了多少", 0.1, form="{:.3f}"),
    Goal("auto", "stop_seconds", "收到信号到退出，秒", 5, False, PLAIN),
    Goal("auto", "compile_stop_seconds", "编译途中收到信号到退出，秒", 5, False, PLAIN),
    *decoding_goals("small", 4000, 500_000),
    *decoding_goals("base", 2000, 250_000),
    *decoding_goals("moe", None, None),
    Goal("prompts", "tokens_per_second", "读提示 8 × 512，small：词元/秒", 1_000_000),
    Goal("rollout", "tokens_per_second", "采样，256 条：词元/秒"),
    Goal("rollout", "ratio", "采样 ÷ generate", 10, form=RATIO),
    Goal("grpo_step", "ours_seconds", "GRPO 一步，秒", form="{:.2f}"),
    Goal("grpo_step", "ratio", "GRPO 一步，TRL ÷ 本项目", 5, form=RATIO),
    Goal("server", "tokens_per_second", "服务，64 路：词元/秒", 40_000),
    Goal("profile", "eager.useful_share", "base 逐算子：矩阵乘与注意力的份额", form=PERCENT),
    Goal("profile", "compiled.useful_share", "base 编译：矩阵乘与注意力的份额", 0.65, form=PERCENT),
    Goal("road", "ours.pretrain_bpb", "真实文本：预训练，每字节比特数", form="{:.4f}"),
    Goal("road", "public.pretrain_bpb", "　公开做法，同样的时间", form="{:.4f}"),
    Goal("road", "ours.sft_bpb", "真实文本：微调，每字节比特数", form="{:.4f}"),
    Goal("road", "public.sft_bpb", "　公开做法，同样的时间", form="{:.4f}"),
)


def find(results: dict[str, Any], part: str, key: str) -> Any:
    """``a.b`` 形的键；没有为 None。"""
    value: Any = results.get(part, {})
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def table_rows(results: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """（项目，测到的，目标，达到没有）。CPU 上的数不与卡的目标比。"""
    judged = find(results, "environment", "device") == "cuda"
    rows = []
    for goal in GOALS:
        value = find(results, goal.part, goal.key)
        if value is None:
            if goal.wanted is not None:
                rows.append((goal.title, "未测", goal.goal(), "未测"))
            continue
        shown = goal.form.format(value)
        if goal.wanted is None:
            rows.append((goal.title, shown, "—", ""))
        else:
            verdict = ("达到" if goal.met(value) else "没有达到") if judged else "不评（不是卡）"
            rows.append((goal.title, shown, goal.goal(), verdict))
    return rows


def width_of(text: str) -> int:
    """终端里占几格：汉字占两格。"""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def print_columns(rows: Sequence[Sequence[str]]) -> None:
    """首列左对齐，其余右对齐。"""
    widths = [max(width_of(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [
            text + " " * (width - width_of(text)) if i == 0 else " " * (width - width_of(text)) + text
            for i, (text, width) in enumerate(zip(row, widths))
        ]
        print("  ".join(cells).rstrip())


def show(results: dict[str, Any], parts: Sequence[Any]) -> None:
    """机器，各部分的下落，然后是目标与测到的。"""
    where = results.get("environment", {})
    names = ("hardware", "torch", "cuda", "transformers", "python", "commit")
    print("  ".join(f"{name} {where[name]}" for name in names if where.get(name)))
    done = [part for part in parts if part.name in results]
    print_columns(
        [("部分", "秒", "")]
        + [
            (part.title, str(results[part.name].get("seconds", "")), results[part.name]["status"])
            for part in done
        ]
    )
    print()
    print_columns([("项目", "测到的", "目标", "达到没有"), *table_rows(results)])
