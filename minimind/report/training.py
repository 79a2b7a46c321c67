"""``minimind report``：把训练日志画成曲线，写成一份报告；训练途中也可以随时看。"""

from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minimind.arguments import Arguments, arg, parse_args
from minimind.console import format_duration, say
from minimind.errors import UserError, guard
from minimind.paths import printable, resolve_path
from minimind.report.curves import plot_stage
from minimind.report.logs import read_log, series
from minimind.report.report import Report
from minimind.runtime.files import check_writable
from minimind.trainer.exhibits import exchanges, number


@dataclass
class ReportArguments(Arguments):
    """把训练日志画成曲线，写成 report.md。"""

    save_dir: str = arg("out", "权重与日志的目录，读其中的 logs/*.jsonl", text="path")
    weight: str | None = arg(None, "只看这个名字的日志，例如 pretrain；不给则全部", text="name")
    report_dir: str = arg("out/report", "报告的目录", text="path")


def summarize(records: list[dict]) -> str:
    """一份日志的一句话：步数、词元、用时、首末损失、验证。"""
    _, losses = series(records, "loss")
    last = records[-1]
    parts = [f"{last['step']:,} 步"]
    for key, text in (
        ("tokens", "{:,.0f} 词元"),
        ("tokens_per_s", "{:,.0f} 词元/秒"),
        ("mfu", "利用率 {:.0%}"),
    ):
        _, values = series(records, key)
        if values:
            parts.append(text.format(values[-1] if key == "tokens" else sorted(values)[len(values) // 2]))
    _, seconds = series(records, "time")
    if seconds:
        parts.append(format_duration(seconds[-1]))
    if losses:
        parts.append(f"损失 {losses[0]:.3f} → {losses[-1]:.3f}")
    _, bpb = series(records, "val_bpb")
    if bpb:
        parts.append(f"验证每字节比特 {bpb[0]:.3f} → {bpb[-1]:.3f}（最低 {min(bpb):.3f}）")
    for key, name in (("reward", "奖励"), ("val_reward", "留出题得分"), ("accuracy", "分得清好坏")):
        _, values = series(records, key)
        if values:
            parts.append(f"{name} {values[0]:.3f} → {values[-1]:.3f}")
    return "，".join(parts)


def timeline(records: list[dict], moments: int = 4) -> dict[str, list[tuple[int, str]]]:
    """样例：``{提示: [(步, 回答)]}``，从头到尾均匀地取至多 ``moments`` 次；没有样例是空的。"""
    shown = [(record["step"], found) for record in records if (found := exchanges(record.get("samples")))]
    last = len(shown) - 1
    picked = sorted({round(k * last / (moments - 1)) for k in range(moments)}) if shown else []
    found: dict[str, list[tuple[int, str]]] = {}
    for step, samples in (shown[i] for i in picked):
        for one in samples:
            found.setdefault(one["prompt"], []).append((step, one["answer"]))
    return found


def collect_samples(report: Report, logs: dict[str, list[dict]]) -> None:
    """训练途中的样例与最后一次采样的回答收进报告，``{名字: 日志}``。"""
    for name, records in logs.items():
        if prompts := timeline(records):
            report.timelines[name] = prompts
        if rollouts := [found for record in records if (found := scored(record.get("rollouts")))]:
            report.rollouts[name] = rollouts[-1]


def scored(value: Any) -> list[dict]:
    """一份采样的回答里有总分的；各条奖励只留是数的。"""
    found = []
    for one in exchanges(value):
        parts = one["parts"] if isinstance(one.get("parts"), dict) else {}
        if number(one.get("reward")) is not None:
            kept = {name: score for name, score in parts.items() if number(score) is not None}
            found.append({**one, "kind": str(one.get("kind", "")), "parts": kept})
    return found


def build(save_dir: Path, folder: Path, weight: str | None = None) -> Report:
    """读日志、画图，返回还没写盘的报告。

    Raises:
        UserError: 没有日志。
    """
    logs = sorted((save_dir / "logs").glob(f"{glob.escape(weight)}_*.jsonl" if weight else "*.jsonl"))
    found = {printable(path.stem): records for path in logs if (records := read_log(path))}
    if not found:
        raise UserError(
            "没有训练日志",
            where=str(save_dir / "logs"),
            expected=f"{weight or '*'} 的 jsonl 日志",
            fix="先运行一个训练命令，或用 --save_dir 指向它的输出目录",
        )
    report = Report(title="训练报告")
    for name, records in found.items():
        report.facts[name] = summarize(records)
        collect_samples(report, {name: records})
        if plot_stage(records, name, folder / f"{name}.png"):
            report.figures[f"{name}.png"] = f"{name} 曲线"
    return report


@guard
def main(argv: list[str] | None = None) -> None:
    """命令行入口。"""
    args = parse_args(ReportArguments, argv)
    folder = resolve_path(args.report_dir)
    check_writable(folder, "--report_dir")
    report = build(resolve_path(args.save_dir), folder, args.weight)
    path = report.write(folder)
    for name, text in report.facts.items():
        say(f"{name}：{text}")
    say(f"报告：{path}")
